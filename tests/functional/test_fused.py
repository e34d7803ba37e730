"""The operator of torch.library: when it serves, what it keeps, and that nothing changes when others look or write."""

import pytest
import torch
import torch.nn.functional as F
from angular_samples import OPERATORS, normal, options_of
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from spherify.bench.memory import peak_bytes
from spherify.functional import blocks, fused, sphere_conv2d, sphere_linear
from spherify.functional.plain import plain_sphere

each_operator = pytest.mark.parametrize("name", OPERATORS)
WINDOWS = [
    dict(stride=1, padding=1, dilation=1, groups=1),
    dict(stride=2, padding=1, dilation=2, groups=2),
    dict(stride=(2, 1), padding=(0, 2), dilation=1, groups=4),
]


def leaves(groups: int = 1, dtype: torch.dtype = torch.float64, size: int = 7) -> list[torch.Tensor]:
    shapes = [(3, 4, size, size), (8, 4 // groups, 3, 3), (8,), (8,)]
    return [normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def with_k(name: str, dtype: torch.dtype = torch.float64) -> tuple[dict, list[torch.Tensor]]:
    options = options_of(name, 8, dtype)
    k = options.get("k")
    return options, [k.requires_grad_()] if isinstance(k, torch.Tensor) else []


def gradients_of(function, inputs, **options):
    x, weight, bias, gain = inputs
    out = function(x, weight, bias, gain=gain, **options)
    k = options.get("k")
    wanted = [leaf for leaf in (*inputs, k) if isinstance(leaf, torch.Tensor)]
    cotangent = normal(*out.shape, seed=9).to(out.dtype)
    return out, torch.autograd.grad(out, wanted, cotangent)


def plainly(x, weight, bias, *, gain, operator, k=None, padding_mode="zeros", **window):
    return plain_sphere(x, weight, bias, operator, k, 1e-4, gain, dict(window, padding_mode=padding_mode))


@pytest.fixture
def calls(monkeypatch):
    """How often the fused operator ran; in float64 it is not replaced by the CPU's kernels."""
    made = []
    real = fused.product_and_rest

    def counted(*args):
        made.append(args)
        return real(*args)

    monkeypatch.setattr("spherify.functional.eager.product_and_rest", counted)
    return made


@each_operator
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_operator_and_its_gradients_are_those_of_plain_operations(name, window, calls):
    options, _ = with_k(name)
    inputs = leaves(window["groups"])
    out, found = gradients_of(sphere_conv2d, inputs, **options, **window)
    assert len(calls) == 1
    truth, expected = gradients_of(plainly, inputs, **options, **window)
    assert_close(out, truth)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@each_operator
def test_blocks_of_any_size_give_the_same(name, monkeypatch):
    options, _ = with_k(name)
    whole = gradients_of(sphere_conv2d, leaves(), **options, padding=1)
    monkeypatch.setattr(blocks, "BLOCK", 1)  # image by image
    parts = gradients_of(sphere_conv2d, leaves(), **options, padding=1)
    for one, other in zip(whole[1], parts[1], strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each_operator
def test_gradients_in_half_precision_are_nearly_those_in_double(name, half):
    options, _ = with_k(name, torch.float32)
    doubles = leaves(size=9)
    halves = [leaf.detach().to(half).requires_grad_() for leaf in doubles]
    if isinstance(options.get("k"), torch.Tensor):
        options["k"] = options["k"].detach().requires_grad_()
    found = gradients_of(sphere_conv2d, halves, **options)[1]
    truth = gradients_of(plainly, doubles, **options, stride=1, padding=0, dilation=1, groups=1)[1]
    for one, other in zip(found, truth, strict=True):
        close = torch.cosine_similarity(one.double().flatten(), other.double().flatten(), 0) if one.numel() > 1 else 1
        assert close > 0.99


@each_operator
def test_a_relu_in_place_right_behind_changes_no_gradient(name):
    options, _ = with_k(name)
    inputs = leaves()
    out = F.relu_(sphere_conv2d(*inputs[:3], gain=inputs[3], **options))
    truth = F.relu(sphere_conv2d(*inputs[:3], gain=inputs[3], **options))
    found, expected = (torch.autograd.grad(y.square().sum(), inputs) for y in (out, truth))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_gradients_of_gradients_are_the_numerical_ones():
    x, weight = normal(1, 2, 3, 3).requires_grad_(), normal(2, 2, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, weight: sphere_conv2d(x, weight, operator="linear"), (x, weight))
    x, weight = normal(2, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, weight: sphere_linear(x, weight, operator="cosine"), (x, weight))


@pytest.mark.parametrize("leaf", range(4), ids=["x", "weight", "bias", "gain"])
@pytest.mark.parametrize("operator", ["cosine", "linear"])
def test_one_leaf_alone_may_want_its_gradient(operator, leaf):
    inputs = [tensor.requires_grad_(place == leaf) for place, tensor in enumerate(leaves())]
    x, weight, bias, gain = inputs
    (found,) = torch.autograd.grad(sphere_conv2d(x, weight, bias, gain=gain, operator=operator).sum(), inputs[leaf])
    window = dict(stride=1, padding=0, dilation=1, groups=1)
    truth = plainly(x, weight, bias, gain=gain, operator=operator, **window)
    assert_close(found, torch.autograd.grad(truth.sum(), inputs[leaf])[0])


@pytest.mark.parametrize("operator", ["cosine", "linear"])
def test_checkpointed_layers_give_the_same_gradients(operator):
    inputs = leaves()

    def run(x, weight, bias, gain):
        return F.relu(sphere_conv2d(x, weight, bias, gain=gain, operator=operator), inplace=True)

    found = torch.autograd.grad(checkpoint(run, *inputs, use_reentrant=False).sum(), inputs)
    for one, other in zip(found, torch.autograd.grad(run(*inputs).sum(), inputs), strict=True):
        assert_close(one, other)


class Subclass(torch.Tensor):
    pass


def test_plain_operations_stand_in_where_somebody_looks_inside(calls):
    x, weight = (leaf.detach() for leaf in leaves()[:2])
    sphere_conv2d(x, weight)
    assert len(calls) == 1
    with FlopCounterMode(display=False) as counter:
        sphere_conv2d(x, weight)
    assert counter.get_total_flops() == 2 * 3 * 8 * 4 * 9 * 25
    torch.func.vmap(lambda image: sphere_conv2d(image, weight))(x)
    sphere_conv2d(x.to("meta"), weight.to("meta"))
    sphere_conv2d(x.as_subclass(Subclass), weight)
    torch.compile(lambda x: sphere_conv2d(x, weight), backend="eager", fullgraph=True)(x)
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):  # torch 2.6 cannot be asked
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            sphere_conv2d(x, weight)
    assert len(calls) == 1
    with torch.device("cpu"):  # a default device is nobody who looks
        sphere_conv2d(x, weight)
    assert len(calls) == 2


def test_unlike_types_fail_as_in_the_plain_convolution():
    x, weight = (leaf.detach() for leaf in leaves()[:2])
    with pytest.raises(RuntimeError):
        F.conv2d(x, weight.float())
    with pytest.raises(RuntimeError):
        sphere_conv2d(x, weight.float())


def test_the_operator_passes_torchs_own_checks():
    x, weight = (leaf.detach() for leaf in leaves(dtype=torch.float32)[:2])
    window = [1, 1], [1, 1], [1, 1], 1
    arguments = (x, weight, None, None, None, *window, "linear", 0.0, 1e-4, torch.float32)
    torch.library.opcheck(fused.sphere_product, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("operator", ["cosine", "linear", "sigmoid"])
def test_training_keeps_little_more_than_the_plain_convolution_and_its_norm(operator):
    x = normal(8, 16, 24, 24, dtype=torch.float32)
    weights = [normal(16, 16, 3, 3, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(6)]
    options = dict(operator=operator, k=0.3 if operator == "sigmoid" else None)

    def step(layer):
        y = x
        for weight in weights:
            y = F.relu(F.batch_norm(layer(y, weight), None, None, training=True))
        torch.autograd.grad(y.sum(), weights)

    plain = peak_bytes(lambda: step(lambda y, weight: F.conv2d(y, weight, padding=1)))
    angular = peak_bytes(lambda: step(lambda y, weight: sphere_conv2d(y, weight, padding=1, **options)))
    # One gradient of the output's size stands beside the plain step's, and blocks; nothing is kept for each layer.
    assert angular < plain + 3 * x.numel() * 4
