"""What ``torch.compile`` hands to the kernels in C: the same numbers, no norms kept, and plain operations elsewhere."""

import pytest
import torch
from angular_samples import OPERATORS, normal, options_of
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from spherify.functional import cpu_binding, sphere_conv2d, sphere_linear
from spherify.functional.responses import RESPONSES

is_here = cpu_binding.library() is not None and hasattr(torch.compiler, "is_exporting")
needs_kernels = pytest.mark.skipif(not is_here, reason="no C compiler, or torch cannot tell that it exports")
each_operator = pytest.mark.parametrize(
    "name", ["cosine", "linear", "sigmoid-0.3", "learnable-filter", "learnable-shared"]
)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
OURS = ("depthwise", "depthwise_backward", "respond", "respond_backward")
WINDOWS = {  # weight, options
    "3x3": ((16, 6, 3, 3), dict(padding=1)),
    "1x1": ((16, 6, 1, 1), {}),
    "depthwise": ((6, 1, 3, 3), dict(padding=1, groups=6)),
    "halving": ((6, 1, 3, 3), dict(padding=1, groups=6, stride=2)),
    "wide": ((6, 1, 5, 4), dict(padding=(4, 2), groups=6, stride=(2, 3), dilation=(2, 1))),
    "even": ((6, 1, 4, 4), dict(padding="same", groups=6)),
    "reflected": ((6, 1, 3, 3), dict(padding=1, padding_mode="reflect", groups=6)),
}


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def operators_in(function, *leaves):
    """The names of our operators in both graphs."""
    found = set()

    def look(graph, _):
        found.update(
            name for node in graph.graph.nodes for name in OURS if str(node.target) == f"spherify.{name}.default"
        )
        return make_boxed_func(graph)

    out = compiled(function, backend=aot_autograd(fw_compiler=look, bw_compiler=look))(*leaves)
    if out.requires_grad:
        out.sum().backward()
    return found


def assert_gradients_of_float64(run, leaves, layout=torch.contiguous_format):
    narrow = [
        leaf.float().contiguous(memory_format=layout if leaf.dim() == 4 else torch.contiguous_format).requires_grad_()
        for leaf in leaves
    ]
    wide = [leaf.clone().requires_grad_() for leaf in leaves]
    found, truth = compiled(run)(*narrow), run(*wide)
    assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    along = normal(*truth.shape, seed=9)
    for one, other in zip(
        torch.autograd.grad(found, narrow, along.float()), torch.autograd.grad(truth, wide, along), strict=True
    ):
        assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@each_operator
def test_convolutions_have_the_gradients_of_float64(name, window, layout):
    shape, options = window
    leaves = [normal(3, 6, 9, 8), normal(*shape, seed=1), normal(shape[0], seed=2), normal(shape[0], seed=3)]
    soft = {key: value for key, value in options_of(name, shape[0]).items() if key == "k"}
    if isinstance(soft.get("k"), torch.Tensor):
        leaves.append(soft.pop("k"))

    def run(x, weight, gain, bias, *k):
        own = dict(k=k[0]) if k else soft
        return sphere_conv2d(x.sin(), weight, bias, gain=gain, operator=OPERATORS[name][0], **options, **own)

    assert_gradients_of_float64(run, leaves, layout)


@needs_kernels
@pytest.mark.parametrize("window", ["depthwise", "halving", "wide", "seven"])
@pytest.mark.parametrize("channels", [16, 20, 48])
@pytest.mark.parametrize("name", ["cosine", "sigmoid-0.3"])
def test_depthwise_layers_of_many_channels_have_the_gradients_of_float64(name, channels, window):
    windows = {**WINDOWS, "seven": ((6, 1, 7, 7), dict(padding=3, groups=6))}
    (_, *shape), options = windows[window]
    leaves = [normal(2, channels, 9, 8), normal(channels, *shape, seed=1)]
    options = {**options, **options_of(name, channels), "groups": channels}
    assert_gradients_of_float64(lambda x, w: sphere_conv2d(x.sin(), w, **options), leaves, torch.channels_last)


@each_operator
def test_linear_layers_on_permuted_maps_have_the_gradients_of_float64(name):
    leaves = [normal(2, 5, 3, 4), normal(7, 5, seed=1), normal(7, seed=2)]

    def run(x, weight, gain):
        return sphere_linear(x.sin().permute(0, 2, 3, 1), weight, gain=gain, **options_of(name, 7, x.dtype))

    assert_gradients_of_float64(run, leaves)


@needs_kernels
def test_depthwise_layers_and_responses_with_asin_go_to_the_kernels():
    x, dense, depthwise = (
        normal(*shape, dtype=torch.float32).requires_grad_() for shape in [(2, 6, 5, 5), (4, 6, 3, 3), (6, 1, 3, 3)]
    )
    assert operators_in(lambda x, w: sphere_conv2d(x, w, groups=6), x, depthwise) == set(OURS[:2])
    assert operators_in(lambda x, w: sphere_conv2d(x, w, operator="linear"), x, dense) == set(OURS[2:])
    assert operators_in(sphere_conv2d, x, dense) == set()


def test_wide_or_unlearned_layers_and_missing_kernels_get_plain_operations(monkeypatch):
    x, weight = (normal(*shape, dtype=torch.float32).requires_grad_() for shape in [(2, 6, 5, 5), (6, 1, 3, 3)])

    def run(x, weight):
        return sphere_conv2d(x, weight, groups=6, operator="linear")

    assert operators_in(run, *(leaf.detach().double().requires_grad_() for leaf in (x, weight))) == set()
    with torch.no_grad():
        assert operators_in(run, x, weight) == set()
    with torch.autocast("cpu", torch.bfloat16):
        assert operators_in(run, x, weight) == set()
    monkeypatch.setattr(cpu_binding, "library", lambda: None)
    assert operators_in(run, x, weight) == set()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_standard_operators(strict):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(normal(6, 1, 3, 3, dtype=torch.float32))

        def forward(self, x):
            return sphere_conv2d(x, self.weight, groups=6, operator="linear")

    program = torch.export.export(Layer(), (normal(2, 6, 5, 5, dtype=torch.float32),), strict=strict)
    assert not [node for node in program.graph.nodes if "spherify" in str(node.target)]


@needs_kernels
def test_norms_of_depthwise_layers_are_not_kept():
    kept = []

    def forward(graph, _):
        kept.extend(tuple(out.meta["val"].shape) for out in graph.graph.output_node().args[0] if out is not None)
        return make_boxed_func(graph)

    x, weight = (normal(*shape, dtype=torch.float32).requires_grad_() for shape in [(2, 6, 5, 5), (6, 1, 3, 3)])
    backend = aot_autograd(fw_compiler=forward, bw_compiler=lambda graph, _: make_boxed_func(graph))
    compiled(lambda x, w: sphere_conv2d(x, w, groups=6).sin(), backend=backend)(x, weight)
    assert kept.count((2, 6, 3, 3)) == 2  # the output, and the response for the gradient


def test_one_graph_serves_every_batch():
    counter = CompileCounter()
    run = compiled(lambda x, w: sphere_conv2d(x, w, groups=6), backend=counter, dynamic=True)
    weight = normal(6, 1, 3, 3, dtype=torch.float32).requires_grad_()
    for images in (2, 3, 7):
        x = normal(images, 6, 5, 5, dtype=torch.float32)
        assert_close(run(x, weight), sphere_conv2d(x, weight, groups=6))
    assert counter.frame_count == 1


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("k", [None, 0.4])
def test_operators_say_what_they_give(k, layout):
    def images(*shape, seed=0):
        return normal(*shape, seed=seed, dtype=torch.float32).contiguous(memory_format=layout)

    product, gradient, x, length = (
        images(2, 6, 5, 5),
        images(2, 6, 5, 5, seed=1),
        images(2, 6, 5, 5, seed=2),
        torch.ones(6),
    )
    terms = (length, None if k is None else torch.full((6,), k), "linear" if k is None else "learnable", 0.0)
    window, weight = ([1, 1], [1, 1], [1, 1], 1e-4), images(6, 1, 3, 3, seed=4)
    inverse = images(2, 1, 5, 5, seed=3).abs() * 0.05
    ours = torch.ops.spherify
    torch.library.opcheck(ours.respond.default, (product, inverse, *terms))
    torch.library.opcheck(ours.respond_backward.default, (gradient, product.tanh() * 0.9, inverse, *terms))
    torch.library.opcheck(ours.depthwise.default, (x, weight, *terms[1:], *window))
    for needs_x in (True, False):
        given = (gradient, product.tanh() * 0.9, x, weight, *terms[1:], *window, needs_x)
        torch.library.opcheck(ours.depthwise_backward.default, given)


SHARP_AND_SOFT = [("linear", None), ("sigmoid", 0.1), ("sigmoid", 0.3), ("sigmoid", 2.0)]


@needs_kernels
@pytest.mark.parametrize("largest", [0.05, 0.45, 0.95], ids=["near", "between", "far"])
@pytest.mark.parametrize(("operator", "k"), SHARP_AND_SOFT)
def test_gradients_by_responses_are_those_of_float64_near_the_equator_and_far_from_it(operator, k, largest):
    cosine = torch.linspace(-largest, largest, 1280, dtype=torch.float64).view(8, 160)
    entry = RESPONSES[operator]
    response, slope, ones = entry.function(cosine, k).float(), entry.slope(cosine, k), torch.ones(8, 160)
    by_product, along, _ = torch.ops.spherify.respond_backward(
        ones, response, torch.ones(8, 1), torch.ones(160), None, operator, k or 0.0
    )
    step = 1e-5 * entry.slope_at_equator(k)
    assert_close(by_product.double(), slope, rtol=1e-5, atol=step)
    assert_close(along.double(), (slope * cosine).sum(1, keepdim=True), rtol=1e-5, atol=160 * step)


@needs_kernels
@pytest.mark.parametrize(("operator", "k"), SHARP_AND_SOFT)
def test_a_nan_stays_where_it_is(operator, k):
    product = torch.full((2, 160), 0.1)
    product[0, 3] = float("nan")
    terms = (torch.ones(2, 1), torch.ones(160), None, operator, k or 0.0)
    response = torch.ops.spherify.respond(product, *terms)
    assert response.isnan().nonzero().tolist() == [[0, 3]]
    by_product, along, _ = torch.ops.spherify.respond_backward(torch.ones(2, 160), response, *terms)
    assert by_product.isnan().nonzero().tolist() == [[0, 3]]
    assert along.isnan().flatten().tolist() == [True, False]


@needs_kernels
@each_operator
def test_maps_that_the_kernels_do_not_read_are_answered_alike(name):
    product, inverse = (
        normal(2, 6, 5, 4, dtype=torch.float32),
        normal(2, 1, 5, 4, seed=1, dtype=torch.float32).abs() * 0.05,
    )
    k = None if name in ("cosine", "linear") else torch.full((6,), 0.4)
    terms = (torch.ones(6), k, OPERATORS[name][0], 0.0)
    turned = product.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    gradient = normal(2, 6, 5, 4, seed=2, dtype=torch.float32)
    ours = torch.ops.spherify
    response = ours.respond(product, inverse, *terms)
    assert_close(ours.respond(turned, inverse, *terms), response)
    again = response.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    for one, other in zip(
        ours.respond_backward(gradient, again, inverse, *terms),
        ours.respond_backward(gradient, response, inverse, *terms),
        strict=True,
    ):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
