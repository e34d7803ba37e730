"""What ``torch.compile`` is given: the same values and gradients, and no unit filters to write or to keep."""

import pytest
import torch
from angular_samples import OPERATORS, normal, options_of
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.testing import assert_close

from spherify.functional import across as across_filters
from spherify.functional import sphere_conv2d, sphere_linear
from spherify.functional.across import across

each_operator = pytest.mark.parametrize("name", OPERATORS)
WINDOWS = [dict(padding=1), dict(stride=2, groups=2), dict(groups=4, dilation=2, padding="same")]


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def with_gradients(run, leaves):
    out = run(*leaves)
    return out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out.dtype))


def leaves_of(*shapes, dtype=torch.float64):
    return [normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@each_operator
def test_convolutions_and_their_gradients_are_those_of_eager_mode(name, window):
    leaves = leaves_of((2, 4, 7, 6), (8, 4 // window.get("groups", 1), 3, 3), (8,), (8,))
    options = {**window, **options_of(name, 8)}

    def run(x, weight, bias, gain):
        return sphere_conv2d(x, weight, bias, gain=gain, **options)

    for one, other in zip(with_gradients(compiled(run), leaves), with_gradients(run, leaves), strict=True):
        assert_close(one, other)


@each_operator
def test_fully_connected_layers_and_their_gradients_are_those_of_eager_mode(name):
    leaves, options = leaves_of((2, 3, 5), (4, 5)), options_of(name, 4)

    def run(x, weight):
        return sphere_linear(x, weight, **options)

    for one, other in zip(with_gradients(compiled(run), leaves), with_gradients(run, leaves), strict=True):
        assert_close(one, other)


def test_a_short_filter_has_the_gradient_that_eps_leaves_it():
    x, weight = leaves_of((2, 4, 5, 5), (3, 4, 3, 3))
    leaves = [x, (weight.detach() * 1e-3).requires_grad_()]  # its square is less than eps
    for one, other in zip(
        with_gradients(compiled(sphere_conv2d), leaves), with_gradients(sphere_conv2d, leaves), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_nothing_is_kept_for_the_gradient_that_has_the_weights_size(is_trained):
    kept = []

    def split(joint, *args, **options):
        forward, backward = min_cut_rematerialization_partition(joint, *args, **options)
        *_, output = forward.graph.nodes
        kept.extend(node for node in output.args[0][1:] if isinstance(node, torch.fx.Node))
        return forward, backward

    def pass_through(graph, _):
        return graph

    backend = aot_autograd(fw_compiler=pass_through, bw_compiler=pass_through, partition_fn=split)
    x, weight = leaves_of((2, 4, 5, 6), (8, 4, 3, 3))
    weight.requires_grad_(is_trained)
    compiled(lambda x, weight: sphere_conv2d(x, weight, padding=1).relu(), backend=backend)(x, weight)
    shapes = [tuple(node.meta["val"].shape) for node in kept if node.op != "placeholder"]
    assert (2, 8, 5, 6) in shapes  # the product is seen
    assert (8, 4, 3, 3) not in shapes


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each_operator
def test_autocast_is_obeyed_and_float16_does_not_overflow(name, half):
    x, weight = 300 * normal(2, 64, 6, 6, dtype=torch.float32), normal(6, 64, 3, 3, seed=1, dtype=torch.float32)
    options = options_of(name, 6, torch.float32)
    weight = (1000 * weight.sign()).requires_grad_()  # a patch times such a filter is beyond float16

    def run(weight):
        with torch.autocast("cpu", dtype=half):
            return sphere_conv2d(x.sign() * 300, weight, **options)

    found, truth = compiled(run)(weight), run(weight)
    assert found.dtype == half
    assert found.isfinite().all()
    assert_close(found.float(), truth.float(), rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(found.float().square().sum(), weight)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def test_gradients_of_torch_func_compile():
    x, weight = normal(2, 4, 5, 5), normal(6, 4, 3, 3, seed=1)

    def by_image(weight, x):
        gradient = torch.func.grad(lambda weight, image: sphere_conv2d(image[None], weight).square().sum())
        return torch.func.vmap(gradient, in_dims=(None, 0))(weight, x)

    assert_close(compiled(by_image)(weight, x), by_image(weight, x))


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("by_layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 70, 1, 1), (600, 2, 1, 3), (3, 4, 5), (0, 4, 3, 3)], ids=str)
def test_the_step_in_place_is_the_formula_whatever_the_layout(shape, layout, by_layout):
    by_weight, weight = normal(*shape), normal(*shape, seed=1)
    length = (weight * weight).flatten(1).sum(1).add(1e-4).rsqrt()
    truth = across(by_weight, weight, length)

    def laid_out(tensor, layout):
        return tensor.float().clone(memory_format=layout if tensor.dim() == 4 else torch.contiguous_format)

    found, by_x = laid_out(by_weight, by_layout), torch.ones(2)
    torch.ops.spherify.take_off_along_(found, by_x, laid_out(weight, layout), length.float())
    assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    assert_close(by_x, torch.ones(2))


def test_the_step_in_place_keeps_a_nan_in_its_filter():
    by_weight, weight = torch.ones(3, 2, 3, 3), torch.ones(3, 2, 3, 3)
    by_weight[1, 0, 1, 1] = float("nan")
    torch.ops.spherify.take_off_along_(by_weight, torch.ones(1), weight, torch.full((3,), 18**-0.5))
    assert by_weight[1].isnan().all()
    assert_close(by_weight[[0, 2]], torch.zeros(2, 2, 3, 3))  # a gradient along its filter


def test_the_step_in_place_says_what_it_changes():
    arguments = (torch.ones(3, 2, 3, 3), torch.ones(1), torch.ones(3, 2, 3, 3), torch.ones(3))
    torch.library.opcheck(torch.ops.spherify.take_off_along_.default, arguments)


@pytest.mark.parametrize("early_from", [0, across_filters.EARLY_FROM])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_float32_gradients_are_those_of_float64(window, layout, early_from, monkeypatch):
    monkeypatch.setattr(across_filters, "EARLY_FROM", early_from)
    leaves = leaves_of((2, 4, 7, 6), (8, 4 // window.get("groups", 1), 3, 3))
    narrow = [leaf.detach().float().contiguous(memory_format=layout).requires_grad_() for leaf in leaves]

    def run(x, weight):
        return sphere_conv2d(x.sin(), weight, **window)

    for one, other in zip(with_gradients(compiled(run), narrow), with_gradients(run, leaves), strict=True):
        assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def backward_graph(run, leaves):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=keep)
    with_gradients(compiled(run, backend=backend), leaves)
    (graph,) = graphs
    return graph.graph


def steps_in_place(graph):
    return [node for node in graph.nodes if "take_off_along_" in f"{node.target} {node.args}"]


def test_what_goes_on_to_the_input_waits_for_the_weights_gradient(monkeypatch):
    monkeypatch.setattr(across_filters, "EARLY_FROM", 8 * 4 * 3 * 3)
    leaves = leaves_of((2, 4, 5, 6), (8, 4, 3, 3), dtype=torch.float32)
    (step,) = steps_in_place(backward_graph(lambda x, weight: sphere_conv2d(x.sin(), weight), leaves))
    assert len([user for user in step.users if user.users]) == 2  # what comes of both gradients is read


def test_a_small_weights_gradient_costs_no_call_of_its_own():
    leaves = leaves_of((2, 4, 5, 6), (8, 4, 3, 3), dtype=torch.float32)
    assert not steps_in_place(backward_graph(lambda x, weight: sphere_conv2d(x.sin(), weight), leaves))
