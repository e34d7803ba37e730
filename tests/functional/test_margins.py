"""Margins against the printed formulas in float64, and the laws every psi obeys on [0, pi]."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spherify.errors import OptionError
from spherify.functional.margins import ANGULAR_RESPONSES, MARGINS, angle_of, psi
from spherify.functional.responses import RESPONSES

# name of a margin, amount, operator, k
CASES = {
    "a-softmax 4": ("multiplied", 4.0, "cosine", None),
    "a-softmax 3": ("multiplied", 3.0, "cosine", None),
    "cosine 1.5": ("multiplied", 1.5, "cosine", None),
    "linear 4": ("multiplied", 4.0, "linear", None),
    "linear 2.7": ("multiplied", 2.7, "linear", None),
    "sigmoid 4": ("multiplied", 4.0, "sigmoid", 0.3),
    "sigmoid 4, steep": ("multiplied", 4.0, "sigmoid", 0.1),
    "sigmoid 1.3, soft": ("multiplied", 1.3, "sigmoid", 0.7),
    "cosface": ("response-reduced", 0.35, "cosine", None),
    "arcface": ("angle-added", 0.5, "cosine", None),
    "sphereface-r v1": ("multiplied-to-pi", 1.5, "cosine", None),
    "sphereface-r v2": ("others-divided", 1.5, "cosine", None),
    "none": ("none", 1.0, "sigmoid", 0.3),
}


def angles(count: int = 20001) -> torch.Tensor:
    return torch.linspace(0.0, math.pi, count, dtype=torch.float64)


def response(theta, operator, k):
    """Eq. 2 to 4, the sigmoid as the ratio of exponentials that is printed."""
    if operator == "cosine":
        return np.cos(theta)
    if operator == "linear":
        return 1 - 2 * theta / math.pi
    e = math.exp(-math.pi / (2 * k))
    inner = np.exp(theta / k - math.pi / (2 * k))
    return (1 + e) / (1 - e) * (1 - inner) / (1 + inner)


def printed(theta: np.ndarray, name: str, m: float, operator: str, k: float | None) -> np.ndarray:
    """Each margin as its paper prints it."""
    if name == "multiplied" and operator == "cosine" and m == int(m):  # SphereFace, eq. 7
        kappa = np.clip(np.floor(theta * m / math.pi), 0, m - 1)
        return (-1.0) ** kappa * np.cos(m * theta) - 2 * kappa
    if name == "multiplied" and operator == "linear":  # eq. 11
        return 1 - 2 * m * theta / math.pi
    if name == "multiplied":
        kappa = np.clip(np.floor(theta * m / math.pi), 0, math.ceil(m) - 1)
        return response(m * theta - kappa * math.pi, operator, k) - 2 * kappa
    if name == "response-reduced":
        return np.cos(theta) - m
    if name == "angle-added":
        return np.where(theta <= math.pi - m, np.cos(theta + m), -2 - np.cos(theta + m))
    if name == "multiplied-to-pi":
        return np.cos(np.minimum(m * theta, math.pi))
    return np.cos(theta / m) if name == "others-divided" else response(theta, operator, k)


@pytest.mark.parametrize(("name", "m", "operator", "k"), CASES.values(), ids=CASES)
def test_psi_is_what_the_papers_print(name, m, operator, k):
    theta = angles()
    expected = torch.from_numpy(printed(theta.numpy(), name, m, operator, k))
    assert_close(psi(theta, name, m, operator=operator, k=k), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("name", "m", "operator", "k"), CASES.values(), ids=CASES)
def test_psi_falls_without_a_jump_on_all_angles(name, m, operator, k):
    value = psi(angles(), name, m, operator=operator, k=k)
    steps = value.diff()
    assert (steps <= 1e-12).all()
    steepest = {"cosine": 1.0, "linear": 2 / math.pi, "sigmoid": 1 / (2 * (k or 1)) / math.tanh(math.pi / 4 / (k or 1))}
    slope = steepest[operator] * (m if name.startswith("multiplied") else 1.0)
    assert steps.abs().max() <= 1.001 * slope * math.pi / 20000


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["cosine", "linear", "sigmoid"]), st.floats(1.0, 12.0), st.floats(0.1, 5.0))
def test_a_multiplied_angle_never_gives_more_than_the_angle_and_ends_where_it_should(operator, m, k):
    k = k if operator == "sigmoid" else None
    theta = angles(2001)
    value = psi(theta, "multiplied", m, operator=operator, k=k)
    plain = psi(theta, "none", 1.0, operator=operator, k=k)
    assert (value <= plain + 1e-9).all()
    assert (value.diff() <= 1e-9).all()
    if m == int(m):
        assert value[-1].item() == pytest.approx(1 - 2 * m, abs=1e-9)


@pytest.mark.parametrize("operator", ANGULAR_RESPONSES)
def test_margin_one_is_no_margin(operator):
    k = 0.3 if operator == "sigmoid" else None
    theta = angles(1001)
    plain = RESPONSES[operator].function(torch.cos(theta), k)
    assert_close(psi(theta, "multiplied", 1.0, operator=operator, k=k), plain, atol=1e-7, rtol=0)
    assert_close(psi(theta, "none", 1.0, operator=operator, k=k), plain, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "m", "operator", "k"), CASES.values(), ids=CASES)
def test_value_and_gradient_are_finite_at_both_ends(name, m, operator, k, dtype):
    theta = torch.tensor([0.0, math.pi / 4, math.pi / 2, math.pi], dtype=dtype, requires_grad=True)
    value = psi(theta, name, m, operator=operator, k=k)
    assert value.dtype == dtype
    value.sum().backward()
    assert value.isfinite().all()
    assert theta.grad is not None and theta.grad.isfinite().all()


@pytest.mark.parametrize("operator", ANGULAR_RESPONSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_angle_read_back_is_finite_at_both_ends_with_its_gradient(operator, dtype):
    given_response = torch.tensor([-1.0, 0.0, 1.0, 1.01], dtype=dtype, requires_grad=True)
    theta = angle_of(given_response, operator=operator, k=0.1 if operator == "sigmoid" else None)
    theta.sum().backward()
    assert theta.isfinite().all()
    assert given_response.grad is not None and given_response.grad.isfinite().all()


@pytest.mark.parametrize(
    ("operator", "k", "error"), [("cosine", None, 1e-3), ("linear", None, 1e-6), ("sigmoid", 0.3, 1e-5)]
)
def test_the_angle_is_read_back_from_a_float32_response(operator, k, error):
    theta = angles(1001)
    rounded = psi(theta, "none", 1.0, operator=operator, k=k).float()
    assert_close(angle_of(rounded, operator=operator, k=k).double(), theta, atol=error, rtol=0)


@pytest.mark.parametrize(("name", "m", "operator", "k"), CASES.values(), ids=CASES)
def test_gradients_of_psi_are_those_of_its_values(name, m, operator, k):
    theta = torch.tensor([0.1, 0.6, 1.2, 2.0, 2.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: psi(t, name, m, operator=operator, k=k), (theta,))


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(OptionError, match=rf"^margin 'wide' is unknown; choose one of: {', '.join(MARGINS)}\.$"):
        psi(angles(3), "wide", 1.0)
    with pytest.raises(
        OptionError, match=r"^operator 'identity' is unknown; choose one of: cosine, linear, sigmoid\.$"
    ):
        psi(angles(3), "none", 1.0, operator="identity")
