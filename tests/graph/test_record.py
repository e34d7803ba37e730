"""Recording one run of a model: what the graph holds, and that the model is left alone."""

import copy
import gc
import operator
import random
import resource
import threading
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, Residual, TakesDict, image, run_of, small_net, timm_model
from torch import fx, nn

from spherify.errors import ModelError
from spherify.graph.flow import Flow
from spherify.graph.record import Inputs, record, record_both


def call_to(recording, function, index=0):
    return [node for node in recording.graph.nodes if node.target is function][index]


def output_depends_on(recording, name):
    """Whether a weight stands among the ancestors of the output."""
    flow = Flow(recording.graph)
    return name in {str(node.target) for node in flow.select(flow.before(flow.nodes[-1])) if node.op == "get_attr"}


def state_bytes(model):
    return {name: (value.device.type, value.clone()) for name, value in model.state_dict().items()}


def test_the_graph_has_a_node_for_each_torch_function_in_order():
    graph = run_of(small_net(), image()).graph
    assert isinstance(graph, fx.Graph)
    graph.lint()
    functions = [node.target for node in graph.nodes if node.op == "call_function"]
    expected = [torch.conv2d, F.batch_norm, F.relu, torch.conv2d, F.relu, F.adaptive_avg_pool2d]
    assert functions[:6] == expected
    assert functions[-1] is F.linear


def test_weights_are_get_attr_nodes_with_qualified_names():
    recording = run_of(Residual(), image())
    found = {node.target for node in recording.graph.nodes if node.op == "get_attr"}
    assert {"one.0.weight", "two.0.weight", "projection.0.weight", "one.1.weight", "one.1.running_mean"} <= found
    conv = call_to(recording, torch.conv2d)
    assert conv.args[1].target == "one.0.weight"
    assert conv.args[1].meta["is_weight"]


def test_a_tensor_that_is_no_weight_is_a_constant():
    recording = run_of(FromFunction(lambda self, x: x + torch.ones(3)), torch.zeros(3))
    assert not any(node.meta.get("is_weight") for node in recording.graph.nodes)


def test_nodes_know_module_shape_and_type():
    recording = run_of(Residual(), image())
    conv = call_to(recording, torch.conv2d, 1)
    assert conv.meta["module"] == "two.0"
    assert conv.meta["shape"] == (2, 8, 16, 16)
    assert conv.meta["dtype"] == torch.float32
    assert call_to(recording, F.relu).meta["module"] == ""  # called by the model itself


def test_calls_are_counted_by_module():
    model = FromFunction(lambda self, x: self.twice(self.twice(x)), twice=nn.Linear(4, 4), never=nn.Linear(4, 4))
    assert run_of(model, torch.zeros(2, 4)).calls == {"": 1, "twice": 2}


def test_a_module_under_two_names_goes_by_the_first():
    layer = nn.Linear(4, 4)
    recording = run_of(FromFunction(lambda self, x: self.b(self.a(x)), a=layer, b=layer), torch.zeros(2, 4))
    assert recording.calls == {"": 1, "a": 2}


def test_train_and_eval_mode_record_what_runs_in_each():
    model = FromFunction(
        lambda self, x: (self.fc(x), self.aux(x)) if self.training else self.fc(x),
        fc=nn.Linear(4, 2),
        aux=nn.Linear(4, 2),
    )
    evaluated, trained = record_both(model, Inputs((torch.zeros(2, 4),)))
    assert (evaluated.training, trained.training) == (False, True)
    assert "aux" not in evaluated.calls
    assert trained.calls["aux"] == 1
    assert evaluated.output_shapes == ((2, 2),)
    assert trained.output_shapes == ((2, 2), (2, 2))


def test_a_model_that_needs_targets_in_train_mode_is_recorded_in_eval_mode_alone():
    def forward(self, x, target=None):
        if self.training and target is None:
            raise ValueError("targets missing")
        return self.fc(x)

    recordings = record_both(FromFunction(forward, fc=nn.Linear(4, 2)), Inputs((torch.zeros(2, 4),)))
    assert [recording.training for recording in recordings] == [False]


@pytest.mark.parametrize("training", [False, True])
def test_the_model_itself_is_untouched(training):
    model = timm_model("test_resnet").train()
    model.layer1.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    before, ids = state_bytes(model), {name: id(value) for name, value in model.named_parameters()}
    fired = []
    model.conv1[0].register_forward_hook(lambda *args: fired.append("forward"))
    model.conv1[0].register_forward_pre_hook(lambda *args: fired.append("before"))
    model.register_full_backward_hook(lambda *args: fired.append("backward"))
    record(model, Inputs((torch.empty(2, 3, 64, 64, device="meta"),)), training=training)
    record(model, Inputs((image(2, 3, 64, 64),)), training=training, devices=("cpu",))
    assert fired == []
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: id(value) for name, value in model.named_parameters()} == ids
    for name, (device, value) in before.items():
        assert device == "cpu"
        assert torch.equal(model.state_dict()[name], value), name


def test_no_meta_tensor_and_no_grad_is_left_behind():
    model = small_net()
    record_both(model, Inputs((image(),)))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_random_state_of_torch_python_and_numpy_is_untouched():
    def forward(self, x):
        return self.fc(F.dropout(x * random.random() * np.random.rand()))

    model = FromFunction(forward, fc=nn.Linear(4, 2))
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    record(model, Inputs((torch.empty(2, 4, device="meta"),)), training=True, devices=("cpu",))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.random.get_state()[2] == numpy_state[2]  # the position in the sequence


def test_the_input_given_is_not_written_into():
    x = torch.ones(2, 4)
    record(FromFunction(lambda self, x: x.add_(1)), Inputs((x,)), training=False, devices=("meta",))
    assert torch.equal(x, torch.ones(2, 4))


def test_no_global_hook_is_left_behind_when_the_model_raises():
    def forward(self, x):
        raise RuntimeError("no")

    with pytest.raises(ModelError):
        run_of(FromFunction(forward), torch.zeros(2))
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


DATA_DEPENDENT = {
    "nonzero": lambda self, x: self.fc(x)[x.sum(1).nonzero().flatten()],
    "item": lambda self, x: self.fc(x) * x.sum().item(),
    "mask": lambda self, x: self.fc(x[x.sum(1) > 0]),
    "branch": lambda self, x: self.fc(x) if x.sum() > 0 else x,
}


@pytest.mark.parametrize("forward", DATA_DEPENDENT.values(), ids=DATA_DEPENDENT)
def test_a_model_that_reads_its_data_is_recorded_on_the_cpu(forward):
    recording = run_of(FromFunction(forward, fc=nn.Linear(4, 2)), torch.rand(2, 4))
    assert recording.device == "cpu"
    assert recording.calls["fc"] == 1


def test_a_model_that_does_not_read_its_data_is_recorded_on_meta():
    assert run_of(small_net(), image()).device == "meta"


def written_by_fc(self, x):
    out = torch.zeros(2, 6)
    out[:, :3] = self.fc(x)
    return out


def added_in_place(self, x):
    out = torch.zeros(2, 3)
    out += self.fc(x)
    return out


def written_into_a_view(self, x):
    out = torch.zeros(2, 6)
    out[:, 3:].add_(self.fc(x))
    return out


def copied_into_a_view(self, x):
    out = torch.zeros(2, 6)
    out.narrow(1, 0, 3).copy_(self.fc(x))
    return out


def written_into_a_chunk(self, x):
    out = torch.zeros(2, 6)
    left, _ = out.chunk(2, dim=1)
    left.copy_(self.fc(x))
    return out


def taken_out_of_chunks(self, x):
    left, right = self.fc(x).chunk(2, dim=1)
    return left + right[:, :1]


def taken_out_of_a_named_tuple(self, x):
    return self.fc(x).max(dim=1).values


def relu_in_place(self, x):
    out = self.fc(x)
    F.relu(out, inplace=True)
    return out


KEEPING_DEPENDENCE = [
    written_by_fc,
    added_in_place,
    written_into_a_view,
    copied_into_a_view,
    written_into_a_chunk,
    taken_out_of_chunks,
    taken_out_of_a_named_tuple,
    relu_in_place,
]


@pytest.mark.parametrize("forward", KEEPING_DEPENDENCE, ids=lambda function: function.__name__)
def test_the_output_depends_on_what_was_written_in_place(forward):
    assert output_depends_on(run_of(FromFunction(forward, fc=nn.Linear(4, 3)), torch.rand(2, 4)), "fc.weight")


def test_a_function_that_does_nothing_has_no_node():
    def forward(self, x):
        weight = self.fc.weight.to(torch.float32).contiguous()  # the very same tensor
        return F.linear(F.dropout(x, training=False).flatten(1), weight)

    recording = run_of(FromFunction(forward, fc=nn.Linear(4, 3)), torch.rand(2, 4))
    functions = [node.target for node in recording.graph.nodes if node.op == "call_function"]
    assert functions[-1] is F.linear
    assert call_to(recording, F.linear).args[1].target == "fc.weight"
    assert torch.Tensor.to not in functions


def test_in_place_functions_are_recorded_in_inference_mode_too():
    with torch.inference_mode():
        recording = run_of(FromFunction(relu_in_place, fc=nn.Linear(4, 3)), torch.rand(2, 4))
    assert output_depends_on(recording, "fc.weight")
    assert call_to(recording, F.relu).meta["shape"] == (2, 3)


def test_a_discarded_layer_is_not_among_what_the_output_depends_on():
    def forward(self, x):
        self.lost(x)
        return self.fc(x)

    recording = run_of(FromFunction(forward, fc=nn.Linear(4, 3), lost=nn.Linear(4, 3)), torch.rand(2, 4))
    assert recording.calls["lost"] == 1
    assert not output_depends_on(recording, "lost.weight")


def test_several_outputs_of_one_function_are_items_of_its_node():
    recording = run_of(FromFunction(taken_out_of_chunks, fc=nn.Linear(4, 4)), torch.rand(2, 4))
    items = [node for node in recording.graph.nodes if node.target is operator.getitem]
    assert [item.args[1] for item in items] == [0, 1]
    assert all(item.meta["shape"] == (2, 2) for item in items)


def test_keyword_inputs_become_placeholders():
    recording = run_of(TakesDict(), pixels=image(), words=torch.rand(2, 5))
    placeholders = [node.meta["shape"] for node in recording.graph.nodes if node.op == "placeholder"]
    assert placeholders == [(2, 3, 16, 16), (2, 5)]
    assert recording.output_shapes == ((2, 4, 14, 14),)


def test_nested_inputs_become_placeholders():
    model = FromFunction(lambda self, pair, extra: self.fc(pair[0] + pair[1]["x"]) * extra, fc=nn.Linear(4, 2))
    recording = run_of(model, (torch.rand(2, 4), {"x": torch.rand(2, 4)}), 3)
    assert len([node for node in recording.graph.nodes if node.op == "placeholder"]) == 2


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_a_named_tuple_stays_one():
    model = FromFunction(lambda self, pair: self.fc(pair.left + pair.right), fc=nn.Linear(4, 2))
    recording = run_of(model, Pair(torch.rand(2, 4), torch.rand(2, 4)))
    assert recording.output_shapes == ((2, 2),)


def test_a_model_without_data_that_reads_it_is_recorded_on_zeros():
    model = FromFunction(DATA_DEPENDENT["item"], fc=nn.Linear(4, 2, device="meta"))
    assert run_of(model, torch.rand(2, 4)).device == "cpu"
    assert model.fc.weight.is_meta


def test_an_integer_input_without_data_becomes_zeros_on_the_cpu():
    inputs = Inputs((torch.empty(2, 3, dtype=torch.long, device="meta"),)).on("cpu")
    assert torch.equal(inputs.args[0], torch.zeros(2, 3, dtype=torch.long))


def test_an_input_with_data_keeps_it_on_the_cpu():
    x = torch.rand(2, 3)
    assert torch.equal(Inputs((x,)).on("cpu").args[0], x)


def test_a_weight_left_over_by_a_hook_does_not_break_the_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old weight_norm is deprecated, and still in use
        torch.nn.utils.weight_norm(model[0])
    model(torch.rand(2, 4)).sum().backward()  # leaves a non-leaf tensor in model[0].weight
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly"):
        copy.deepcopy(model)
    recording = run_of(model, torch.rand(2, 4))
    assert recording.device == "meta"
    assert {"0.weight_g", "0.weight_v"} <= {node.target for node in recording.graph.nodes if node.op == "get_attr"}


def test_a_tied_weight_is_one_node():
    model = FromFunction(lambda self, x: self.b(self.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    recording = run_of(model, torch.rand(2, 4))
    assert [node.target for node in recording.graph.nodes if node.op == "get_attr"].count("a.weight") == 1


class Tells(nn.Module):
    devices: list[str] = []  # noqa: RUF012 (shared with the copy that is recorded)

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.utils.skip_init(nn.Linear, 20000, 5000)

    def forward(self, x):
        self.devices.append(self.big.weight.device.type)
        return self.big(x)


def test_a_large_model_is_recorded_without_another_copy_of_its_weights():
    model = Tells()  # 400 MB, which nobody has written to yet
    model.devices.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run_of(model, torch.empty(1, 20000, device="meta"))
    assert model.devices == ["meta"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_a_model_that_runs_nowhere_is_refused_with_its_own_words():
    message = (
        r"^FromFunction does not run in eval mode on an input of shape \(2, 4\) \(ValueError: the cat is out\); "
        r"pass example_input=\.\.\. with what it is called with\.$"
    )

    def forward(self, x):
        raise ValueError("the  cat\nis out")

    with pytest.raises(ModelError, match=message):
        run_of(FromFunction(forward), torch.rand(2, 4))


def test_a_long_failure_is_cut_and_an_empty_one_goes_by_its_class():
    def fails(error):
        def forward(self, x):
            raise error

        return FromFunction(forward)

    with pytest.raises(ModelError, match=r"\(ValueError: x{157}\.\.\.\)"):
        run_of(fails(ValueError("x" * 500)), torch.rand(2, 4))
    with pytest.raises(ModelError, match=r"train mode .*\(KeyboardError\)"):
        run_of(fails(type("KeyboardError", (Exception,), {})()), torch.rand(2, 4), training=True)


def test_a_model_that_cannot_be_copied_is_refused():
    model = small_net()
    model.lock = threading.Lock()
    message = (
        r"^Sequential cannot be copied for a trial run \(TypeError: .*pickle.*\); keep what cannot be copied out of"
    )
    with pytest.raises(ModelError, match=message):
        run_of(model, image())


def test_calls_on_another_thread_do_not_disturb_the_stack():
    helper = nn.Linear(4, 4)

    def forward(self, x):
        thread = threading.Thread(target=lambda: self.helper(x))
        thread.start()
        thread.join()
        return self.fc(x)

    recording = run_of(FromFunction(forward, fc=nn.Linear(4, 2), helper=helper), torch.rand(2, 4))
    assert recording.calls == {"": 1, "fc": 1}


def test_settings_hold_for_the_copy_alone():
    def forward(self, x):
        for _ in range(self.count):
            x = self.fc(x)
        return x

    model = FromFunction(forward, fc=nn.Linear(4, 4))
    model.count = 50
    inputs = Inputs((torch.zeros(2, 4),), settings=(("", "count", 3),))
    assert record(model, inputs, training=False).calls["fc"] == 3
    assert record(model, inputs, training=False, devices=("cpu",)).calls["fc"] == 3
    assert model.count == 50


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_rests_on_meta_and_is_then_as_before(is_on):
    seen = {}

    def forward(self, x):
        seen[x.device.type] = gc.isenabled()
        return self.fc(x)

    model, inputs = FromFunction(forward, fc=nn.Linear(4, 4)), Inputs((torch.zeros(2, 4),))
    was_on = gc.isenabled()
    try:
        gc.enable() if is_on else gc.disable()
        for device in ("meta", "cpu"):
            record(model, inputs, training=False, devices=(device,))
            assert gc.isenabled() is is_on
    finally:
        gc.enable() if was_on else gc.disable()
    assert seen == {"meta": False, "cpu": is_on}
