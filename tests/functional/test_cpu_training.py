"""Layers trained by the CPU's kernels in few calls: what is remembered for a shape must not depend on its numbers."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from angular_samples import normal
from torch.testing import assert_close

from spherify.export.fold import fold
from spherify.functional import cpu_binding, cpu_training, sphere_conv1d, sphere_conv2d, sphere_linear
from spherify.layers import SphereConv1d, SphereConv2d

pytestmark = pytest.mark.skipif(cpu_binding.library() is None, reason="there is no C compiler")
OPERATORS = ["cosine", "linear", "sigmoid", "learnable"]


def gradients(layer, x):
    """Of a weighted sum of the outputs: by input and parameters, and the outputs."""
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    slope = normal(*out.shape, seed=3, dtype=x.dtype)
    return [*torch.autograd.grad((out * slope).sum(), [x, *layer.parameters()]), out.detach()]


def close(found, truth):
    for one, other in zip(found, truth, strict=True):
        assert_close(one.double(), other.double(), rtol=1e-4, atol=2e-6 * max(1.0, float(other.detach().abs().max())))


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(cpu_training, "WAYS", {})


def layer_of(operator, groups=1, gain=True, bias=True):
    torch.manual_seed(0)
    layer = SphereConv2d(8, 8, 3, padding=1, groups=groups, bias=bias, operator=operator, gain=gain)
    if bias:
        torch.nn.init.uniform_(layer.bias, -0.2, 0.2)
    return layer


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_many_images_in_blocks_are_as_in_float64(operator, groups):
    x = normal(24, 8, 29, 31, dtype=torch.float32)
    layer = layer_of(operator, groups)
    found = gradients(layer, x)
    assert [way.blocks for way in cpu_training.WAYS.values()] == [[(first, 6) for first in range(0, 24, 6)]]
    close(found, gradients(layer.double(), x.double()))


def test_blocks_that_do_not_divide_the_images():
    x = normal(23, 8, 29, 31, dtype=torch.float32)
    layer = layer_of("learnable")
    found = gradients(layer, x)
    (way,) = cpu_training.WAYS.values()
    assert way.blocks == [(0, 6), (6, 6), (12, 6), (18, 5)]
    close(found, gradients(layer.double(), x.double()))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_shape_with_other_numbers_and_other_parameters(operator):
    first, second = layer_of(operator), layer_of(operator)
    torch.nn.init.normal_(second.weight)
    torch.nn.init.uniform_(second.gain, -2.0, 2.0)
    for seed, layer in enumerate((first, second, first)):
        x = normal(2, 8, 9, 7, seed=seed, dtype=torch.float32)
        close(gradients(layer, x), gradients(layer_as_float64(layer), x.double()))
    assert len(cpu_training.WAYS) == 1


def layer_as_float64(layer):
    return copy.deepcopy(layer).double()


def test_either_layout_of_the_same_shape():
    layer, x = layer_of("sigmoid"), normal(2, 8, 9, 7, dtype=torch.float32)
    planes = gradients(layer, x)
    rows = gradients(layer, x.to(memory_format=torch.channels_last))
    close(planes, rows)
    assert len(cpu_training.WAYS) == 2


@pytest.mark.parametrize("groups", [1, 8])
def test_threads_of_one_process_do_not_disturb_each_other(groups):
    layer = layer_of("learnable", groups)
    inputs = [normal(4, 8, 17, 15, seed=seed, dtype=torch.float32) for seed in range(8)]
    alone = [gradients(layer, x) for x in inputs]
    # A graph that is alive keeps the accumulators of the parameters. torch 2.15 makes one under a mutex of its leaf and
    # asks for the GIL there, while an autograd function asks for that mutex with the GIL: they may wait for each other.
    alive = layer(inputs[0])
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: gradients(layer, x), inputs * 4))
    for place, found in enumerate(together):
        for one, other in zip(found, alone[place % 8], strict=True):
            assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert alive.grad_fn is not None


def test_images_of_many_sizes_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(cpu_training, "MOST_WAYS", 4)
    layer = layer_of("cosine")
    for size in range(3, 16):
        x = normal(1, 8, size, size, dtype=torch.float32)
        assert_close(layer(x).double(), layer_as_float64(layer)(x.double()), rtol=1e-4, atol=1e-5)
        assert len(cpu_training.WAYS) <= 4


def test_threads_that_fill_and_empty_what_is_remembered(monkeypatch):
    monkeypatch.setattr(cpu_training, "MOST_WAYS", 1)
    layer = layer_of("cosine")
    inputs = [normal(1, 8, size, size, dtype=torch.float32) for size in (3, 4, 5, 6)]
    truth = [layer(x).detach() for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for place, found in enumerate(pool.map(layer, inputs * 100)):
            assert_close(found.detach(), truth[place % 4], rtol=1e-6, atol=1e-6)


def test_numbers_for_all_filters_and_lists_for_the_window():
    x, weight = normal(2, 4, 6, 6, dtype=torch.float32), normal(5, 4, 3, 3, seed=1, dtype=torch.float32)
    leaves = [torch.tensor(2.0, requires_grad=True), torch.tensor([0.4], requires_grad=True)]

    def output(x, weight, gain, k):
        window = dict(stride=[2, 1], padding=[1, 0], dilation=[1, 1])
        return sphere_conv2d(x, weight, operator="learnable", gain=gain, k=k, **window)

    found = torch.autograd.grad(output(x, weight, *leaves).square().sum(), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = torch.autograd.grad(output(x.double(), weight.double(), *wide).square().sum(), wide)
    for one, other in zip(found, truth, strict=True):
        assert one.shape == other.shape
        assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("filters", [1, 2, 3, 4])
def test_layers_of_few_filters_compute_their_norms_again(operator, filters):
    k = 0.5 if operator in ("sigmoid", "learnable") else None
    for shape, sizes, function in (((5, 6), (), sphere_linear), ((3, 6, 5, 4), (1, 1), sphere_conv2d)):

        def slopes(dtype):
            x = normal(*shape, dtype=dtype).requires_grad_()  # noqa: B023
            weight = normal(filters, 6, *sizes, seed=1, dtype=dtype).requires_grad_()  # noqa: B023
            out = function(x, weight, operator=operator, k=k)  # noqa: B023
            return torch.autograd.grad((out * normal(*out.shape, seed=2, dtype=dtype)).sum(), (x, weight))

        close(slopes(torch.float32), slopes(torch.float64))


def folded(function, x, weight, k, operator):
    kind = SphereConv1d if function is sphere_conv1d else SphereConv2d
    filters, groups = weight.shape[0], x.shape[1]
    layer = kind(groups, filters, 1, padding=1, groups=groups, bias=False, operator=operator, k=k)
    layer.weight = torch.nn.Parameter(weight)
    model = fold(torch.nn.Sequential(layer).eval())
    with torch.inference_mode():
        return [model(x) for _ in range(3)][-1]  # the third time by what the first two have shown


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("times", [1, 3])
def test_depthwise_layers_that_make_several_positions_of_one(operator, times):
    k = 0.5 if operator in ("sigmoid", "learnable") else None
    for sizes, function in (((1,), sphere_conv1d), ((1, 1), sphere_conv2d)):
        x, weight = normal(2, 6, *sizes, dtype=torch.float32), normal(6 * times, 1, *sizes, seed=1, dtype=torch.float32)
        found = function(x, weight, operator=operator, k=k, groups=6, padding=1)
        truth = function(x.double(), weight.double(), operator=operator, k=k, groups=6, padding=1)
        assert_close(found.double(), truth, rtol=1e-3, atol=1e-3)  # an angle of 0 or pi has half the digits
        assert_close(folded(function, x, weight, k, operator), truth.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gain", [0.0, 1e-30, float("nan")])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gain_that_nothing_may_be_divided_by(operator, gain):
    x, weight = normal(3, 6, dtype=torch.float32), normal(4, 6, seed=1, dtype=torch.float32)
    gains = torch.tensor([1.0, gain, -2.0, 0.5])
    k = 0.5 if operator in ("sigmoid", "learnable") else None

    def slopes(dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, gains)]
        out = sphere_linear(leaves[0], leaves[1], gain=leaves[2], operator=operator, k=k)
        return torch.autograd.grad((out * normal(3, 4, seed=2, dtype=dtype)).sum(), leaves)

    for found, truth in zip(slopes(torch.float32), slopes(torch.float64), strict=True):
        assert_close(found.double(), truth, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_another_default_type_changes_nothing():
    layer, x = layer_of("learnable"), normal(2, 8, 5, 5, dtype=torch.float32)
    truth = gradients(layer, x)
    torch.set_default_dtype(torch.float64)
    try:
        cpu_training.WAYS.clear()
        found = gradients(layer, x)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, truth, strict=True):
        assert_close(one, other, rtol=0.0, atol=0.0)
