"""The sphere operators: against the slow twins, their gradients, and what they refuse."""

import functools
import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from angular_samples import OPERATORS, PLAIN_CONVS, SPHERE_CONVS, normal, options_of, uniform
from torch import nn

from spherify.functional import sphere_linear

# torch says so itself, for the plain convolution too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}

INPUT_SIZES = {1: (9,), 2: (6, 7), 3: (5, 4, 6)}
CHANNELS = 4
GROUPS_AND_FILTERS = [(1, 3), (2, 6), (4, 4), (4, 8)]  # dense, grouped, depthwise, depthwise with a multiplier
CHOICES = {
    1: dict(
        stride=[1, 2],
        padding=[0, 2, "same", "valid"],
        dilation=[1, 2],
        kernel=[(1,), (3,), (4,)],
    ),
    2: dict(
        stride=[1, 2, (2, 1)],
        padding=[0, 1, (1, 2), "same", "valid"],
        dilation=[1, (1, 2)],
        kernel=[(1, 1), (3, 3), (2, 2), (3, 2)],
    ),
    3: dict(
        stride=[1, 2],
        padding=[0, 1, "same", "valid"],
        dilation=[1, (1, 1, 2)],
        kernel=[(3, 3, 3), (2, 2, 2), (1, 2, 3)],
    ),
}


def every_window():
    """(dims, kernel, groups, filters, stride, padding, dilation), but for what has no meaning."""
    for dims, choices in CHOICES.items():
        product = itertools.product(
            [dims],
            choices["kernel"],
            GROUPS_AND_FILTERS,
            choices["stride"],
            choices["padding"],
            choices["dilation"],
        )
        for _, kernel, (groups, filters), stride, padding, dilation in product:
            has_one_weight_a_filter = groups == CHANNELS and math.prod(kernel) == 1  # see the test of fan-in 1
            if has_one_weight_a_filter or (padding == "same" and stride != 1):
                continue
            yield dims, kernel, groups, filters, stride, padding, dilation


WINDOWS = list(every_window())
PADDING_MODES = ["reflect", "replicate", "circular"]


@functools.cache
def well_conditioned(dims: int, kernel: tuple[int, ...], groups: int, filters: int):
    """x and weight whose cosines all stay away from +-1, also at fan-in 2 and at the border.

    There acos is ill-conditioned (its slope at 0.999 is 22, at 1 infinite), so that rounding the inputs alone
    would exceed the tolerance. All pixels have one sign and the weights of a filter take turns in sign: no
    patch is parallel to a filter.
    """
    fan_in = CHANNELS // groups * math.prod(kernel)
    turns = torch.tensor([(-1.0) ** place for place in range(fan_in)]).reshape(CHANNELS // groups, *kernel)
    sign_of_filter = uniform(-1, 1, filters, *[1] * (dims + 1), seed=2).sign()
    x = uniform(0.5, 1.5, 2, CHANNELS, *INPUT_SIZES[dims])
    weight = uniform(0.5, 1.5, filters, *turns.shape, seed=1) * turns * sign_of_filter
    return x.float(), weight.float()  # every float32 is a float64 too: both tests see the same numbers


@functools.cache
def slow_cosine(dims, kernel, groups, filters, **window):
    cosine = reference.conv_cosine(*well_conditioned(dims, kernel, groups, filters), groups=groups, **window)
    assert cosine.abs().max() < 0.97
    return cosine


def errors_of_every_operator(dtype, dims, kernel, groups, filters, **window) -> dict[str, float]:
    """Relative error against the printed formulas, operator by operator."""
    x, weight = (tensor.to(dtype) for tensor in well_conditioned(dims, kernel, groups, filters))
    gain, bias = uniform(0.5, 1.5, filters).to(dtype), uniform(-0.2, 0.2, filters, seed=1).to(dtype)
    cosine = slow_cosine(dims, kernel, groups, filters, **window)
    errors = {}
    for name in OPERATORS:
        options = options_of(name, filters, dtype)
        fast = SPHERE_CONVS[dims](x, weight, bias, gain=gain, groups=groups, **window, **options)
        if isinstance(options.get("k"), torch.Tensor):
            options["k"] = options["k"].reshape(-1, *[1] * dims)
        truth = reference.scaled_and_shifted(reference.response(cosine, **options), gain, bias, dims)
        errors[name] = reference.relative_error(fast, truth)
        assert fast.dtype == dtype
    return errors


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("dims", "kernel", "groups", "filters", "stride", "padding", "dilation"), WINDOWS)
def test_every_operator_is_the_slow_one(dtype, dims, kernel, groups, filters, stride, padding, dilation):
    window = dict(stride=stride, padding=padding, dilation=dilation)
    errors = errors_of_every_operator(dtype, dims, kernel, groups, filters, **window)
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize(("groups", "filters"), GROUPS_AND_FILTERS)
@pytest.mark.parametrize(
    ("dims", "kernel"), [(dims, kernel) for dims in CHOICES for kernel in CHOICES[dims]["kernel"][1:]]
)
def test_every_padding_mode_is_the_slow_one(dtype, padding_mode, padding, groups, filters, dims, kernel):
    window = dict(padding=padding, stride=1, dilation=1, padding_mode=padding_mode)
    errors = errors_of_every_operator(dtype, dims, kernel, groups, filters, **window)
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_the_fully_connected_operator_is_the_slow_one(dtype, name, shape):
    x, weight = normal(*shape).to(dtype), normal(4, 6, seed=3).to(dtype)
    gain, bias, options = normal(4).to(dtype), normal(4, seed=2).to(dtype), options_of(name, 4, dtype)
    assert reference.linear_cosine(x, weight).abs().max() < 0.97
    truth = reference.sphere_linear(x, weight, bias, gain=gain, **options)
    fast = sphere_linear(x, weight, bias, gain=gain, **options)
    assert reference.relative_error(fast, truth) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", SPHERE_CONVS)
def test_the_cosine_of_fan_in_one_is_the_slow_one(dtype, dims):
    x, weight = normal(2, 4, *INPUT_SIZES[dims]).to(dtype), normal(4, 1, *[1] * dims, seed=1).to(dtype)
    truth = reference.sphere_conv(x, weight, groups=4)
    assert reference.relative_error(SPHERE_CONVS[dims](x, weight, groups=4), truth) <= TOLERANCE[dtype]


@pytest.mark.parametrize("eps", [1e-8, 1e-4, 0.1])
def test_eps_stands_inside_both_roots(eps):
    x, weight = 0.1 * normal(2, 3, 5, 5), 0.1 * normal(4, 3, 3, 3, seed=1)
    truth = reference.sphere_conv(x, weight, operator="linear", eps=eps)
    fast = SPHERE_CONVS[2](x, weight, operator="linear", eps=eps)
    assert reference.relative_error(fast, truth) < 1e-12


GRADCHECK_WINDOWS = [
    dict(),
    dict(stride=2, padding=1),
    dict(padding="same", dilation=2),
    dict(groups=2),
    dict(groups=4),
    dict(padding=1, padding_mode="circular"),
]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("window", GRADCHECK_WINDOWS, ids=str)
@pytest.mark.parametrize("dims", SPHERE_CONVS)
def test_the_gradients_of_a_convolution_are_the_numerical_ones(name, window, dims):
    groups = window.get("groups", 1)
    options = options_of(name, 4)
    x, weight = normal(1, 4, *(4, 3, 2)[:dims]), normal(4, 4 // groups, *(2, 2, 1)[:dims], seed=1)
    parameters = [x, weight, normal(4, seed=2), normal(4, seed=3)]
    parameters += [options["k"]] if isinstance(options.get("k"), torch.Tensor) else []

    def run(x, weight, bias, gain, *k):
        given = dict(options, k=k[0]) if k else options
        return SPHERE_CONVS[dims](x, weight, bias, gain=gain, **window, **given)

    assert torch.autograd.gradcheck(run, [tensor.clone().requires_grad_() for tensor in parameters])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 2, 5)])
def test_the_gradients_of_the_fully_connected_operator_are_the_numerical_ones(name, shape):
    options = options_of(name, 3)
    parameters = [normal(*shape), normal(3, 5, seed=1), normal(3, seed=2), normal(3, seed=3)]
    parameters += [options["k"]] if isinstance(options.get("k"), torch.Tensor) else []

    def run(x, weight, bias, gain, *k):
        return sphere_linear(x, weight, bias, gain=gain, **(dict(options, k=k[0]) if k else options))

    assert torch.autograd.gradcheck(run, [tensor.clone().requires_grad_() for tensor in parameters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("dims", "kernel", "groups", "filters", "stride", "padding", "dilation"), WINDOWS[::7])
def test_the_hidden_operator_is_the_plain_convolution_bit_for_bit(
    dtype, dims, kernel, groups, filters, stride, padding, dilation
):
    x, weight = (tensor.to(dtype) for tensor in well_conditioned(dims, kernel, groups, filters))
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    bias = normal(filters).to(dtype)
    hidden = SPHERE_CONVS[dims](x, weight, bias, operator="identity", **window)
    assert torch.equal(hidden, PLAIN_CONVS[dims](x, weight, bias, **window))


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize(("dims", "twin"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_the_hidden_operator_is_the_plain_layer_bit_for_bit_in_every_padding_mode(padding_mode, padding, dims, twin):
    conv = twin(4, 4, 2, padding=padding, padding_mode=padding_mode)
    x = normal(2, 4, *INPUT_SIZES[dims], dtype=torch.float32)
    window = dict(padding=padding, padding_mode=padding_mode)
    hidden = SPHERE_CONVS[dims](x, conv.weight, conv.bias, operator="identity", **window)
    assert torch.equal(hidden, conv(x))


def test_the_hidden_operator_is_the_plain_fully_connected_layer_bit_for_bit():
    x, weight, bias = normal(3, 5), normal(4, 5, seed=1), normal(4)
    assert torch.equal(sphere_linear(x, weight, bias, operator="identity"), F.linear(x, weight, bias))
