"""1x1 convolutions of compiled graphs: one operator each way, products of matrices and all."""

import ctypes

import pytest
import torch
from angular_samples import OPERATORS, normal, options_of
from graph_samples import calls_of_ours
from torch.testing import assert_close

from spherify.functional import cpu_binding, cpu_pointwise, sphere_conv2d, sphere_linear

pytestmark = pytest.mark.skipif(
    cpu_pointwise.sgemm() is None or not hasattr(torch.compiler, "is_exporting"),
    reason="no C compiler, no product of matrices in torch's library, or torch cannot tell that it exports",
)
each_operator = pytest.mark.parametrize(
    "name", ["cosine", "linear", "sigmoid-0.3", "learnable-filter", "learnable-shared"]
)
ours = torch.ops.spherify


def names_of(calls):
    return [name for name, _ in calls]


def gradients(run, leaves, along):
    return torch.autograd.grad(run(*leaves), leaves, along)


def terms_of(name, filters):
    given = options_of(name, filters, torch.float32)
    k = given.get("k")
    return (k, given["operator"], 0.0) if isinstance(k, torch.Tensor) else (None, given["operator"], k or 0.0)


@pytest.fixture
def few_rows(monkeypatch):
    """Several parts of a layer's rows, the last one smaller."""
    monkeypatch.setattr(cpu_pointwise, "HELD", {})  # what was described before with more of them
    monkeypatch.setattr(cpu_pointwise, "NUMBERS", 1)
    monkeypatch.setattr(cpu_pointwise, "LEAST_ROWS", 70)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "channels", "filters"), [(1, 1, 1), (3, 5, 2), (150, 17, 33), (210, 40, 16)])
@each_operator
def test_a_layer_in_parts_has_the_numbers_of_float64(
    name, rows, channels, filters, threads, few_rows, monkeypatch, request
):
    monkeypatch.setattr(cpu_binding, "NUMBERS_A_THREAD", 1)
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(threads)
    x, weight = normal(rows, channels, 1, 1), normal(filters, channels, 1, 1, seed=1)
    along = normal(rows, filters, 1, 1, seed=2)
    k, operator, fixed = terms_of(name, filters)
    leaves = [x.requires_grad_(), weight.requires_grad_(), *([] if k is None else [k.double().requires_grad_()])]

    def plain(x, weight, *k):
        return sphere_conv2d(x, weight, operator=operator, k=k[0] if k else fixed or None)

    narrow = [tensor.detach().float() for tensor in (along, x, weight)]
    response, norms, lengths = ours.pointwise(*narrow[1:], k, operator, fixed, 1e-4)
    assert_close(response.double(), plain(*leaves), rtol=1e-5, atol=1e-5)
    truth = gradients(plain, leaves, along)
    by = (narrow[0], response, *narrow[1:], norms, lengths, k, operator, fixed)
    by_x, by_weight, sums = ours.pointwise_backward(*by, [True, True, k is not None])
    assert_close(by_x.double(), truth[0], rtol=1e-4, atol=1e-5)
    assert_close(by_weight.double(), truth[1], rtol=1e-4, atol=1e-4)
    if k is not None:
        expected = (along * response).sum((0, 2, 3))
        assert_close(sums[0].double(), expected, rtol=1e-4, atol=1e-4)
    again, none, _ = ours.pointwise_backward(*by, [True, False, False])
    assert_close(again, by_x)
    assert none.numel() == 0


@pytest.mark.parametrize("stride", [1, 2, (1, 3)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@each_operator
def test_1x1_convolutions_have_the_gradients_of_float64(name, layout, stride):
    options = dict(stride=stride, **options_of(name, 7))
    leaves = [normal(2, 6, 5, 4).requires_grad_(), normal(7, 6, 1, 1, seed=1).requires_grad_()]
    narrow = [leaf.detach().float().contiguous(memory_format=layout).requires_grad_() for leaf in leaves]
    torch.compiler.reset()
    run = torch.compile(lambda x, w: sphere_conv2d(x.sin(), w, **options), fullgraph=True, backend="aot_eager")
    truth = sphere_conv2d(leaves[0].sin(), leaves[1], **options)
    along = normal(*truth.shape, seed=2)
    found = run(*narrow)
    assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, narrow, along.float()), torch.autograd.grad(truth, leaves, along), strict=True
    ):
        assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((7, 6, 1, 1), dict(padding=1)), ((7, 6, 1, 1), dict(dilation=2)), ((6, 3, 1, 1), dict(groups=2))],
    ids=["padded", "dilated", "grouped"],
)
def test_layers_that_look_like_it_have_the_gradients_of_float64(shape, options):
    leaves = [normal(2, 6, 5, 4).requires_grad_(), normal(*shape, seed=1).requires_grad_()]
    narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
    calls = calls_of_ours(lambda x, w: sphere_conv2d(x, w, **options), *narrow)
    assert names_of(calls) == ([] if "dilation" not in options else ["pointwise", "pointwise_backward"])
    sphere_conv2d(*leaves, **options).sum().backward()
    for one, other in zip(narrow, leaves, strict=True):
        assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1], ids=["input", "weight"])
def test_only_gradients_that_are_asked_for_are_computed(frozen):
    leaves = [normal(2, 6, 5, 4, dtype=torch.float32), normal(7, 6, 1, 1, seed=1, dtype=torch.float32)]
    leaves[1 - frozen].requires_grad_()
    _, (name, arguments) = calls_of_ours(lambda x, w: sphere_conv2d(x, w, operator="linear"), *leaves)
    assert (name, list(arguments[-1])) == ("pointwise_backward", [frozen == 1, frozen == 0, False])
    assert leaves[frozen].grad is None


def test_linear_layers_leave_their_products_to_the_compiler():
    """Which may put the gradient by a large weight off; it has passes to put a cosine into, too."""
    leaves = [normal(*shape, dtype=torch.float32).requires_grad_() for shape in [(40, 6), (7, 6)]]
    calls = calls_of_ours(lambda x, w: sphere_linear(x, w, operator="linear"), *leaves)
    assert names_of(calls) == ["respond", "respond_backward"]
    assert not calls_of_ours(sphere_linear, *leaves)


@pytest.mark.parametrize(("filters", "groups"), [((7, 6, 1, 1), 1), ((6, 1, 3, 3), 6)], ids=["1x1", "depthwise"])
def test_what_is_kept_of_planes_lies_channels_last_in_the_graph(filters, groups):
    """Inductor lays what the backward graph reads out as the graph has it."""
    leaves = [normal(2, 6, 5, 4, dtype=torch.float32), normal(*filters, seed=1, dtype=torch.float32)]
    calls = calls_of_ours(lambda x, w: sphere_conv2d(x.sin(), w, groups=groups), *(x.requires_grad_() for x in leaves))
    for (_, arguments), place in zip(calls, (0, 2), strict=True):
        assert arguments[place].meta["val"].is_contiguous(memory_format=torch.channels_last)


def test_another_product_of_matrices_is_not_called():
    """Of the wrong order, or of the wrong type: the address is tried on six numbers first."""
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)
    does_nothing = ctypes.cast(signature(lambda *_: None), ctypes.c_void_p).value
    assert cpu_pointwise.library().pointwise_check(does_nothing) != 0
    assert cpu_pointwise.library().pointwise_check(cpu_pointwise.sgemm()) == 0


def test_without_a_product_of_matrices_the_compiler_gets_it(monkeypatch):
    monkeypatch.setattr(cpu_pointwise, "sgemm", lambda: None)
    for name in OPERATORS:
        leaves = [
            normal(*shape, seed=9, dtype=torch.float32).requires_grad_() for shape in [(2, 6, 5, 4), (7, 6, 1, 1)]
        ]
        options = options_of(name, 7, torch.float32)
        calls = calls_of_ours(lambda x, w, options=options: sphere_conv2d(x, w, **options), *leaves)
        assert names_of(calls) == ([] if name == "cosine" else ["respond", "respond_backward"])


def test_a_graph_from_elsewhere_is_refused_without_a_product_of_matrices(monkeypatch):
    monkeypatch.setattr(cpu_pointwise, "sgemm", lambda: None)
    monkeypatch.setattr(cpu_pointwise, "HELD", {})
    with pytest.raises(RuntimeError, match=r"shows no product of matrices \(sgemm_\) here; compile again"):
        ours.pointwise(torch.ones(3, 6, 1, 1), torch.ones(7, 6, 1, 1), None, "cosine", 0.0, 1e-4)


@pytest.mark.parametrize("shape", [(5, 6, 1, 1), (2, 6, 3, 4), (2, 6, 1, 1), (1, 6, 3, 1)], ids=str)
@pytest.mark.parametrize("k", [None, 0.4])
def test_operators_of_matrices_say_what_they_give(k, shape):
    x, weight = normal(*shape, dtype=torch.float32), normal(7, 6, 1, 1, dtype=torch.float32)
    terms = (None if k is None else torch.full((7,), k), "linear" if k is None else "learnable", 0.0)
    torch.library.opcheck(ours.pointwise.default, (x, weight, *terms, 1e-4))
    response, norms, lengths = ours.pointwise(x, weight, *terms, 1e-4)
    saved = (torch.randn_like(response), response, x, weight, norms, lengths, *terms)
    for by in ([True, True, k is not None], [True, False, False], [False, True, False]):
        torch.library.opcheck(ours.pointwise_backward.default, (*saved, by))


def test_a_row_of_zeros_answers_with_zero_and_has_a_gradient():
    x, weight = torch.zeros(3, 6, 1, 1), normal(7, 6, 1, 1, dtype=torch.float32)
    response, norms, lengths = ours.pointwise(x, weight, None, "cosine", 0.0, 1e-4)
    assert torch.equal(response, torch.zeros(3, 7, 1, 1))
    ones = torch.ones(3, 7, 1, 1)
    by_x, *_ = ours.pointwise_backward(
        ones, response, x, weight, norms, lengths, None, "cosine", 0.0, [True, False, False]
    )
    unit = weight / (weight.square().sum(1, keepdim=True) + 1e-4).sqrt()
    assert_close(by_x, unit.sum(0, keepdim=True).expand(3, 6, 1, 1) * 100.0)
