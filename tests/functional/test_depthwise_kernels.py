"""Depthwise layers of compiled graphs, product included: values and gradients against float64, window by window."""

import pytest
import torch
import torch.nn.functional as F
from angular_samples import normal
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from spherify.functional import cpu_binding, graph_operators, sphere_conv1d, sphere_conv2d
from spherify.functional.responses import RESPONSES

is_here = cpu_binding.library() is not None and hasattr(torch.compiler, "is_exporting")
pytestmark = pytest.mark.skipif(not is_here, reason="no C compiler, or torch cannot tell that it exports")
OURS = graph_operators.ours
EPS = 1e-4
WINDOWS = {  # window, stride, padding, dilation: those with loops of their own, then what goes by the general one
    "3x3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 halving": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 bare": ((3, 3), (1, 1), (0, 0), (1, 1)),
    "5x5": ((5, 5), (1, 1), (2, 2), (1, 1)),
    "5x5 halving": ((5, 5), (2, 2), (2, 2), (1, 1)),
    "7x7": ((7, 7), (1, 1), (3, 3), (1, 1)),
    "2x2 patches": ((2, 2), (2, 2), (0, 0), (1, 1)),
    "more gap than window": ((2, 2), (5, 4), (1, 1), (1, 1)),
    "dilated": ((3, 3), (1, 1), (2, 2), (2, 2)),
    "dilated halving": ((3, 3), (2, 2), (2, 2), (2, 2)),
    "uneven": ((3, 2), (2, 3), (2, 0), (1, 3)),
    "wide border": ((3, 3), (2, 1), (5, 4), (1, 1)),
    "9x9": ((9, 9), (1, 2), (4, 4), (1, 1)),
}
POINTS = {  # whose cosines are all near 1 or -1, where the other responses are steep
    "1x1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 with gaps": ((1, 1), (3, 2), (0, 0), (1, 1)),
}
each_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
OWN = {"all with polynomials": [0.3, 0.31, 0.4, 0.5, 0.7, 1.0, 3.0, 30.0], "some without": [0.5, 0.1, 3.0]}  # learned k
each_k = pytest.mark.parametrize("own", OWN.values(), ids=OWN)
each_response = pytest.mark.parametrize(("operator", "k"), [("cosine", None), ("linear", None), ("sigmoid", 0.3)])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def truth_of(x, weight, operator, k, stride, padding, dilation):
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=x.shape[1])
    product, energy = F.conv2d(x, weight, **window), F.conv2d(x * x, torch.ones_like(weight), **window)
    lengths = weight.square().sum((1, 2, 3)).add(EPS).rsqrt().view(-1, 1, 1)
    return RESPONSES[operator].function(product * lengths * (energy + EPS).rsqrt(), k)


def samples(shape, window):
    """An input with patches of zeros, and filters of unlike lengths."""
    x = normal(*shape)
    x[0, :, : shape[2] // 2] = 0.0
    weight = normal(shape[1], 1, *window, seed=1) * torch.linspace(0.3, 3.0, shape[1]).double().view(-1, 1, 1, 1)
    return x, weight


def assert_equals_float64(shape, operator, k, window, layout=torch.channels_last):
    size, *axes = window
    wide = [leaf.requires_grad_() for leaf in samples(shape, size)]
    x, weight = (leaf.detach().float().contiguous(memory_format=layout) for leaf in wide)
    terms = (None, operator, k or 0.0, *map(list, axes), EPS)
    truth, found = truth_of(*wide, operator, k, *axes), OURS.depthwise(x, weight, *terms)
    assert_close(found.double(), truth, rtol=1e-5, atol=2e-6)
    along = normal(*truth.shape, seed=9)
    gradient = along.float().contiguous(memory_format=layout)
    by_x, by_weight, _ = OURS.depthwise_backward(gradient, found, x, weight, *terms, True)
    for one, other in zip((by_x, by_weight), torch.autograd.grad(truth, wide, along), strict=True):
        scale = other.abs().max().item()
        assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * max(1.0, scale))


def nearly_orthogonal(shape, window):
    """As ``samples``, with filters that add up to 0 and pixels nearly alike, so that most cosines are near 0."""
    x, weight = samples(shape, window)
    return (x + 3.0) * (x != 0), weight - weight.mean((2, 3), keepdim=True) * (window != (1, 1))


def assert_learned_equals_float64(shape, window, own, make=nearly_orthogonal, layout=torch.channels_last):
    """The same where each channel has a k of its own, and what the gradient for k is made of."""
    size, *axes = window
    wide = [leaf.requires_grad_() for leaf in make(shape, size)]
    x, weight = (leaf.detach().float().contiguous(memory_format=layout) for leaf in wide)
    k = torch.tensor(own).repeat(shape[1] // len(own) + 1)[: shape[1]]
    terms, each = (k, "learnable", 0.0, *map(list, axes), EPS), k.double().view(-1, 1, 1)
    truth, found = truth_of(*wide, "learnable", each, *axes), OURS.depthwise(x, weight, *terms)
    assert_close(found.double(), truth, rtol=1e-5, atol=2e-6)
    along = normal(*truth.shape, seed=9)
    # What tells the slope from the response in float32 is the response's distance from 1, so that one is given in full.
    gradient, response = (one.detach().float().contiguous(memory_format=layout) for one in (along, truth))
    by_x, by_weight, sums = OURS.depthwise_backward(gradient, response, x, weight, *terms, True)
    assert by_x.isfinite().all()
    near = (k >= 0.3).nonzero().flatten()
    for axis, *pair in zip((1, 0), (by_x, by_weight), torch.autograd.grad(truth, wide, along), strict=True):
        one, other = (gradient.double().index_select(axis, near) for gradient in pair)
        assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1.0, other.abs().max().item()))
    t = truth * (torch.pi / 4 / each).tanh()
    assert_close(sums[0].double(), (along * truth).sum((0, 2, 3)), rtol=1e-5, atol=1e-4)
    for_k = (along * (1 - t * t) * t.atanh()).sum((0, 2, 3))
    assert_close(sums[1].double(), for_k, rtol=1e-4, atol=1e-6 * truth[:, 0].numel())


@each_window
@pytest.mark.parametrize("channels", [2, 20, 48])
@each_response
def test_windows_have_the_values_and_gradients_of_float64(operator, k, channels, window):
    assert_equals_float64((2, channels, 9, 8), operator, k, window)


@pytest.mark.parametrize("window", POINTS.values(), ids=POINTS)
def test_windows_of_one_pixel_have_the_values_and_gradients_of_float64(window):
    assert_equals_float64((2, 20, 9, 8), "cosine", None, window)


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 31, 32, 33, 40])
@pytest.mark.parametrize("name", ["3x3", "3x3 halving", "7x7", "dilated"])
def test_any_number_of_channels_has_the_values_and_gradients_of_float64(name, channels):
    assert_equals_float64((2, channels, 7, 6), "cosine", None, WINDOWS[name])


@each_window
@pytest.mark.parametrize("channels", [8, 40])
@pytest.mark.parametrize("make", [samples, nearly_orthogonal])
@each_k
def test_a_k_of_each_channel_has_the_values_and_gradients_of_float64(own, make, channels, window):
    assert_learned_equals_float64((2, channels, 9, 8), window, own, make)


@pytest.mark.parametrize("channels", [2, 15, 17, 31, 33])
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (13, 21)])
@pytest.mark.parametrize("name", ["3x3", "3x3 halving"])
@each_k
def test_a_k_of_each_channel_on_maps_of_any_size(own, name, size, channels):
    assert_learned_equals_float64((3, channels, *size), WINDOWS[name], own)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (3, 1), (4, 4), (13, 21)])
@pytest.mark.parametrize("name", ["3x3", "3x3 halving", "5x5", "5x5 halving", "7x7", "wide border"])
def test_maps_of_any_size_have_the_values_and_gradients_of_float64(name, size):
    assert_equals_float64((3, 20, *size), "cosine", None, WINDOWS[name])


@each_window
def test_two_threads_have_the_values_and_gradients_of_float64(two_threads, window):
    shape = (5, 40, 21, 20)
    assert cpu_binding.threads_for(5 * 40 * 21 * 20) == 2
    assert_equals_float64(shape, "sigmoid", 0.3, window)


def test_two_threads_give_the_same_bits_each_time(two_threads):
    x, weight = (
        leaf.float().contiguous(memory_format=torch.channels_last) for leaf in samples((5, 40, 21, 20), (3, 3))
    )
    terms = (None, "cosine", 0.0, [1, 1], [1, 1], [1, 1], EPS)
    first, again = (
        OURS.depthwise_backward(x, OURS.depthwise(x, weight, *terms), x, weight, *terms, True) for _ in "ab"
    )
    for one, other in zip(first, again, strict=True):
        assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["3x3", "uneven"])
def test_planes_have_the_values_and_gradients_of_float64(name):
    assert_equals_float64((2, 20, 9, 8), "sigmoid", 0.3, WINDOWS[name], layout=torch.contiguous_format)


def test_planes_are_answered_by_planes():
    x, weight = (leaf.float() for leaf in samples((2, 20, 9, 8), (3, 3)))
    terms = (None, "cosine", 0.0, [1, 1], [1, 1], [1, 1], EPS)
    found = OURS.depthwise(x, weight, *terms)
    by_x, by_weight, _ = OURS.depthwise_backward(x, found, x, weight, *terms, True)
    assert found.is_contiguous()
    assert by_x.is_contiguous()
    assert by_weight.is_contiguous()


def test_the_gradient_by_the_input_is_not_computed_where_nobody_wants_it():
    x, weight = (leaf.float().contiguous(memory_format=torch.channels_last) for leaf in samples((2, 20, 9, 8), (3, 3)))
    terms = (None, "cosine", 0.0, [1, 1], [1, 1], [1, 1], EPS)
    found = OURS.depthwise(x, weight, *terms)
    by_x, by_weight, _ = OURS.depthwise_backward(x, found, x, weight, *terms, False)
    assert by_x.numel() == 0
    assert_close(by_weight, OURS.depthwise_backward(x, found, x, weight, *terms, True)[1], rtol=0, atol=0)


def test_a_first_layer_does_not_ask_for_the_gradient_by_the_input():
    asked = []

    def look(graph, _):
        nodes = [node for node in graph.graph.nodes if str(node.target) == "spherify.depthwise_backward.default"]
        asked.extend(node.args[-1] for node in nodes)
        return make_boxed_func(graph)

    x, weight = (leaf.float() for leaf in samples((2, 6, 5, 5), (3, 3)))
    for needs in (False, True):
        torch.compiler.reset()
        backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=look)
        run = torch.compile(lambda x, w: sphere_conv2d(x, w, groups=6), backend=backend, fullgraph=True)
        run(x.clone().requires_grad_(needs), weight.clone().requires_grad_()).sum().backward()
    assert asked == [False, True]


def test_layers_of_one_dimension_are_alike_compiled_and_eager():
    x, weight = normal(2, 20, 30, dtype=torch.float32), normal(20, 1, 5, seed=1, dtype=torch.float32)
    leaves = x.requires_grad_(), weight.requires_grad_()

    def run(x, weight):
        return sphere_conv1d(x, weight, groups=20, stride=2, padding=3, operator="linear")

    torch.compiler.reset()
    found, truth = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves), run(*leaves)
    assert_close(found, truth)
    along = normal(*truth.shape, seed=2, dtype=torch.float32)
    for one, other in zip(
        torch.autograd.grad(found, leaves, along), torch.autograd.grad(truth, leaves, along), strict=True
    ):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_learned_k_between_other_layers_has_the_gradients_of_eager_mode_under_inductor(layout):
    """As in a network: convolutions around it, whose layout the compiler chooses."""
    leaves = [
        normal(*shape, seed=seed, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
        for seed, shape in enumerate([(2, 3, 12, 10), (20, 3, 3, 3), (20, 1, 3, 3), (5, 20, 1, 1)])
    ]
    k = torch.linspace(0.2, 0.6, 20).requires_grad_()

    def run(x, first, depthwise, last, k):
        x = F.relu(F.conv2d(x, first))
        x = sphere_conv2d(x, depthwise, groups=20, stride=2, padding=1, operator="learnable", k=k)
        return F.conv2d(x.relu(), last)

    torch.compiler.reset()
    found, truth = torch.compile(run, fullgraph=True)(*leaves, k), run(*leaves, k)
    assert_close(found, truth, rtol=1e-4, atol=1e-5)
    along = normal(*truth.shape, seed=9, dtype=torch.float32)
    for one, other in zip(
        torch.autograd.grad(found, [*leaves, k], along), torch.autograd.grad(truth, [*leaves, k], along), strict=True
    ):
        assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_window_larger_than_the_input_is_refused():
    x, weight = (leaf.float() for leaf in samples((2, 4, 3, 3), (5, 5)))
    with pytest.raises(RuntimeError, match=r"Kernel size \(5, 5\) can't be greater than the padded input"):
        OURS.depthwise(x, weight, None, "cosine", 0.0, [1, 1], [0, 0], [1, 1], EPS)
