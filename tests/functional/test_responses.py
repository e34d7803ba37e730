"""The responses: their formulas, slopes and limits, as functions of the cosine alone."""

import math

import pytest
import reference
import torch
from torch.testing import assert_close

from spherify.errors import OptionError
from spherify.functional.responses import (
    K_MAX,
    K_MIN,
    RESPONSES,
    checked_k,
    cosine_response,
    linear_response,
    response_named,
    sigmoid_response,
)

COSINES = torch.linspace(-0.999, 0.999, 201, dtype=torch.float64)
SOFTNESS = [1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 1.0, 10.0, 1e3]
PRINTED_K = [0.03, 0.1, 0.3, 0.5, 0.7, 1.0, 10.0]  # below, the printed exponentials lose digits, then overflow
OPERATORS_AND_K = [("cosine", None), ("linear", None)] + [
    (name, k) for name in ("sigmoid", "learnable") for k in SOFTNESS
]


def test_the_cosine_response_is_cos_theta():
    assert reference.relative_error(cosine_response(COSINES), reference.response(COSINES, "cosine")) < 1e-12


def test_the_linear_response_is_the_printed_one():
    assert reference.relative_error(linear_response(COSINES), reference.response(COSINES, "linear")) < 1e-12


@pytest.mark.parametrize("k", PRINTED_K)
def test_the_sigmoid_response_is_the_printed_one(k):
    truth = reference.response(COSINES, "sigmoid", k)
    assert reference.relative_error(sigmoid_response(COSINES, k), truth) < 1e-12


@pytest.mark.parametrize("k", SOFTNESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_k_answers_as_the_same_number(k, dtype):
    cosines = COSINES.to(dtype)
    assert_close(sigmoid_response(cosines, torch.tensor(k, dtype=dtype)), sigmoid_response(cosines, k))


@pytest.mark.parametrize(("name", "k"), OPERATORS_AND_K)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_every_response_are_plus_and_minus_one(name, k, dtype):
    ends = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)
    # 3.2e-4 is the angle, in units of pi/2, that float32's guard before asin keeps from the pole.
    assert_close(RESPONSES[name].function(ends, k), ends, atol=3.2e-4, rtol=0)


@pytest.mark.parametrize(("name", "k"), OPERATORS_AND_K)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_no_cosine_not_even_one_beyond_one_leaves_the_range(name, k, dtype, as_tensor):
    if as_tensor and k is not None:
        k = torch.tensor(k, dtype=dtype)
    near_the_pole = 1 - torch.logspace(-16, 0, 400, dtype=torch.float64)
    cosines = torch.cat([near_the_pole, -near_the_pole, torch.tensor([1.0, 1.02, -1.02])]).to(dtype)
    assert RESPONSES[name].function(cosines, k).abs().max() <= 1


@pytest.mark.parametrize(("name", "k"), OPERATORS_AND_K)
def test_the_slope_is_the_derivative(name, k):
    cosines = COSINES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(RESPONSES[name].function(cosines, k).sum(), cosines)
    assert_close(RESPONSES[name].slope(COSINES, k), derivative, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "k"), OPERATORS_AND_K)
def test_the_slope_is_never_negative_and_never_infinite(name, k):
    ends = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    slope = RESPONSES[name].slope(ends, k)
    assert slope.isfinite().all()
    assert (slope >= 0).all()


@pytest.mark.parametrize(
    ("name", "k", "slope"),
    [  # minus the derivatives of the printed formulas by theta at pi/2
        ("cosine", None, 1.0),
        ("linear", None, 0.637),
        ("sigmoid", 0.1, 5.0),
        ("sigmoid", 0.3, 1.68),
        ("sigmoid", 0.5, 1.09),
        ("sigmoid", 0.7, 0.88),
        ("learnable", 1.0, 0.76),
    ],
)
def test_the_slope_at_the_equator_is_the_one_in_the_notes(name, k, slope):
    assert RESPONSES[name].slope_at_equator(k) == pytest.approx(slope, abs=6e-3)


@pytest.mark.parametrize("k", [10.0, 100.0, 1e3])
def test_the_sigmoid_of_a_large_k_is_linear(k):
    difference = (sigmoid_response(COSINES, k) - linear_response(COSINES)).abs().max()
    assert difference < 0.1 / k**2  # tanh z = z - z^3/3, with z = pi/4k


def test_the_sigmoid_of_a_small_k_is_a_step():
    cosines = torch.tensor([-1.0, -0.5, -0.03, 0.0, 0.03, 0.5, 1.0], dtype=torch.float64)
    assert_close(sigmoid_response(cosines, K_MIN), cosines.sign(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["linear", "sigmoid", "learnable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_at_the_poles_is_finite_and_bounded(name, dtype):
    just_inside = 1 - 2 * torch.finfo(dtype).eps
    poles = torch.tensor([-1.0, -just_inside, just_inside, 1.0], dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(RESPONSES[name].function(poles, RESPONSES[name].default_k).sum(), poles)
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1 / math.sqrt(2 * torch.finfo(dtype).eps)
    assert (gradient[1:3] > 0).all()


def test_an_unknown_operator_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match="operator 'relu' is unknown; choose one of: cosine, linear, sigmoid, "):
        response_named("relu")


def test_the_hidden_operator_is_not_offered():
    with pytest.raises(OptionError) as refusal:
        response_named("relu")
    assert "identity" not in str(refusal.value)
    assert str(refusal.value).endswith("sigmoid, learnable.")


@pytest.mark.parametrize("k", [0.0, 9e-4, 1.001e3, -0.3, math.inf, math.nan])
def test_a_k_out_of_range_is_refused_with_the_range(k):
    with pytest.raises(OptionError, match=r"k=.* is out of range; choose a number in \[0.001, 1000\]"):
        checked_k("sigmoid", k)


@pytest.mark.parametrize("k", [K_MIN, 1, K_MAX])
def test_both_ends_of_the_range_of_k_are_allowed(k):
    assert checked_k("learnable", k) == k


@pytest.mark.parametrize("operator", ["cosine", "linear"])
def test_a_k_for_an_operator_without_one_is_refused(operator):
    with pytest.raises(OptionError, match=f"operator '{operator}' has no k; leave k out, or choose sigmoid"):
        checked_k(operator, 0.3)


def test_the_sigmoid_response_without_k_is_refused():
    with pytest.raises(OptionError, match="sigmoid_response: k is missing; give a number or a tensor"):
        sigmoid_response(COSINES, None)


@pytest.mark.parametrize(("operator", "k"), [("cosine", None), ("linear", None), ("sigmoid", 0.3), ("learnable", 0.5)])
def test_the_default_k_is_the_papers(operator, k):
    assert checked_k(operator, None) == k


@pytest.mark.parametrize("fan_in", [2, 3, 9, 576])
@pytest.mark.parametrize(("name", "k"), [("cosine", None), ("linear", None), ("sigmoid", 0.1), ("sigmoid", 0.3)])
def test_the_spread_is_the_standard_deviation_over_random_directions(name, k, fan_in):
    directions = torch.randn(200_000, fan_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cosine = directions[:, 0] / directions.norm(dim=1)
    drawn = RESPONSES[name].function(cosine, k).square().mean().sqrt()
    assert RESPONSES[name].spread(k, fan_in) == pytest.approx(drawn.item(), rel=0.01)
