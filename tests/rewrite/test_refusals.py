"""Models that are refused before anything is done, each with what to do instead."""

import warnings

import pytest
import torch
from networks import image, small_net
from torch import nn

from spherify.convert import plan, spherify
from spherify.errors import ModelError
from spherify.layers.conv import SphereConv2d
from spherify.rewrite.refusals import check_model


def test_a_plain_model_passes():
    model = small_net()
    assert check_model(model) is model


@pytest.mark.parametrize(("thing", "kind"), [(3, "int"), ({}, "dict"), (torch.zeros(2), "Tensor"), (nn.Conv2d, "type")])
def test_what_is_no_module_is_refused(thing, kind):
    with pytest.raises(ModelError, match=rf"^got a {kind}; give a model's name or an nn\.Module\.$"):
        spherify(thing)


def test_data_parallel_is_refused():
    message = r"^DataParallel: convert the model inside \(model\.module\), then wrap the result\.$"
    with pytest.raises(ModelError, match=message):
        spherify(nn.DataParallel(small_net()))


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "FullyShardedDataParallel"])
def test_distributed_wrappers_are_refused(kind):
    wrapper = type(kind, (nn.Sequential,), {})(small_net())  # the real ones need a process group to be made
    with pytest.raises(ModelError, match=rf"^{kind}: convert the model inside \(model\.module\), then wrap"):
        spherify(wrapper)


def test_a_real_distributed_wrapper_is_refused():
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ModelError, match=r"^DistributedDataParallel: convert the model inside"):
        check_model(wrapper)


def test_a_wrapper_inside_is_refused():
    with pytest.raises(ModelError, match=r"^0 is a DataParallel; convert the model before it is wrapped"):
        spherify(nn.Sequential(nn.DataParallel(small_net())))


def compiled_model():
    return torch.compile(small_net(), backend="eager")


def compiled_child():
    model = small_net()
    model[3] = torch.compile(model[3], backend="eager")
    return model


def compiled_in_place():
    model = small_net()
    model.compile(backend="eager")
    return model


def child_compiled_in_place():
    model = small_net()
    model[3].compile(backend="eager")
    return model


COMPILED = [
    (compiled_model, "OptimizedModule"),
    (compiled_child, "3"),
    (compiled_in_place, "Sequential"),
    (child_compiled_in_place, "3"),
]


@pytest.mark.parametrize(("make", "name"), COMPILED, ids=[make.__name__ for make, _ in COMPILED])
def test_compiled_models_are_refused(make, name):
    message = rf"^{name} is compiled; convert the plain model, then call torch\.compile on the result\.$"
    with pytest.raises(ModelError, match=message):
        spherify(make())


def scripted(how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        return torch.jit.script(small_net()) if how == "script" else torch.jit.trace(small_net(), image())


@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_models_are_refused(how):
    with pytest.raises(ModelError, match=r"is scripted; convert the Python model, then script or export the result\.$"):
        spherify(scripted(how))


def test_a_scripted_part_is_refused():
    with pytest.raises(ModelError, match=r"^1 is scripted; convert the Python model"):
        spherify(nn.Sequential(nn.Conv2d(3, 3, 1), scripted("script")), example_input=image())


def test_quantised_models_are_refused():
    quantization = pytest.importorskip("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = quantization.quantize_dynamic(small_net(), {nn.Linear})
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            pytest.skip(f"this build of torch does not quantise: {error}")
    with pytest.raises(ModelError, match=r"^7 \(Linear\) is quantised; convert the floating-point model instead\.$"):
        spherify(model)


def test_lazy_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules are a new feature under heavy development, since 2021
        model, itself = nn.Sequential(nn.LazyConv2d(4, 3)), nn.LazyLinear(4)
    with pytest.raises(ModelError, match=r"^0 is lazy and has no shape yet; run one batch through the model first\.$"):
        spherify(model)
    with pytest.raises(ModelError, match=r"^LazyLinear is lazy and has no shape yet"):
        spherify(itself)


def test_a_lazy_model_that_has_run_is_converted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.LazyConv2d(4, 3))
    model(image())
    assert type(spherify(model)[0]) is SphereConv2d


def test_converted_models_are_refused():
    message = r"^Sequential is already converted: 0 is a SphereConv2d; call unspherify\(model\) first\.$"
    converted = spherify(small_net())
    for route in (spherify, plan):
        with pytest.raises(ModelError, match=message):
            route(converted)


def test_a_converted_layer_itself_is_refused():
    with pytest.raises(ModelError, match=r"^SphereConv2d is already converted: it is a SphereConv2d"):
        spherify(SphereConv2d(3, 4, 3))


def test_a_plan_made_before_is_refused_by_a_converted_model():
    model = small_net()
    report = plan(model)
    report.apply(inplace=True)
    with pytest.raises(ModelError, match=r"^Sequential is already converted"):
        report.apply()
    assert type(model[0]) is SphereConv2d
