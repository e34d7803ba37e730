"""Margins: what becomes of the angle to the right class, one entry each in one table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spherify.errors import OptionError
from spherify.functional.responses import angle_from_equator

K_MIN_WITH_MARGIN = 0.1  # a softer sigmoid is 1 up to float32 rounding, and no angle can be read back from it


@dataclass(frozen=True, kw_only=True)
class AngularResponse:
    """A response as a function of the angle, and back.

    Attributes:
        of_angle: (theta, k) -> g(theta), on every real angle.
        angle_of: (g, k) -> theta in [0, pi], with a finite slope everywhere.
    """

    of_angle: Callable[[Tensor, float | None], Tensor]
    angle_of: Callable[[Tensor, float | None], Tensor]


def cosine_of_angle(angle: Tensor, k: float | None = None) -> Tensor:
    return torch.cos(angle)


def angle_of_cosine(cosine: Tensor, k: float | None = None) -> Tensor:
    return math.pi / 2 - angle_from_equator(cosine)


def linear_of_angle(angle: Tensor, k: float | None = None) -> Tensor:
    return 1.0 - angle * (2.0 / math.pi)


def angle_of_linear(response: Tensor, k: float | None = None) -> Tensor:
    return (1.0 - response.clamp(-1.0, 1.0)) * (math.pi / 2)


def sigmoid_of_angle(angle: Tensor, k: float | None) -> Tensor:
    assert k is not None
    return torch.tanh((math.pi / 2 - angle) / (2.0 * k)) / math.tanh(math.pi / (4.0 * k))


def angle_of_sigmoid(response: Tensor, k: float | None) -> Tensor:
    """atanh has an infinite slope at +-1, but ``tanh(pi / 4k)``, the largest that comes here, stays below."""
    assert k is not None
    return math.pi / 2 - 2.0 * k * torch.atanh(response.clamp(-1.0, 1.0) * math.tanh(math.pi / (4.0 * k)))


ANGULAR_RESPONSES: dict[str, AngularResponse] = {
    "cosine": AngularResponse(of_angle=cosine_of_angle, angle_of=angle_of_cosine),
    "linear": AngularResponse(of_angle=linear_of_angle, angle_of=angle_of_linear),
    "sigmoid": AngularResponse(of_angle=sigmoid_of_angle, angle_of=angle_of_sigmoid),
}

Amount = float | Tensor


def extended(angle: Tensor, operator: str, k: float | None, turns_at_pi: int) -> Tensor:
    """``g(angle - kappa pi) - 2 kappa``, kappa = floor(angle / pi): falls on and on beyond pi, without a jump."""
    with torch.no_grad():
        kappa = torch.floor(angle / math.pi).clamp(0, turns_at_pi)
    return ANGULAR_RESPONSES[operator].of_angle(angle - kappa * math.pi, k) - 2.0 * kappa


def without_margin(angle: Tensor, amount: Amount, operator: str, k: float | None) -> Tensor:
    return ANGULAR_RESPONSES[operator].of_angle(angle, k)


def multiplied(angle: Tensor, amount: Amount, operator: str, k: float | None) -> Tensor:
    assert not isinstance(amount, Tensor)
    return extended(angle * amount, operator, k, math.ceil(amount) - 1)


def added_to_angle(angle: Tensor, amount: Amount, operator: str, k: float | None) -> Tensor:
    return extended(angle + amount, operator, k, 1)


def taken_from_response(angle: Tensor, amount: Amount, operator: str, k: float | None) -> Tensor:
    return ANGULAR_RESPONSES[operator].of_angle(angle, k) - amount


def multiplied_up_to_pi(angle: Tensor, amount: Amount, operator: str, k: float | None) -> Tensor:
    return ANGULAR_RESPONSES[operator].of_angle((angle * amount).clamp_max(math.pi), k)


def divided(angle: Tensor, amount: Amount, operator: str, k: float | None) -> Tensor:
    return ANGULAR_RESPONSES[operator].of_angle(angle / amount, k)


@dataclass(frozen=True, kw_only=True)
class Margin:
    """One margin.

    Attributes:
        function: (theta, amount, operator, k) -> psi(theta), in float32 or wider.
        low, high: the amounts it makes sense for; at ``neutral`` it changes nothing.
        is_additive: its amount itself grows during a warm-up; of the others psi is blended in.
        is_on_others: it acts on the angles to the wrong classes, not on that to the right one.
    """

    name: str
    summary: str
    function: Callable[[Tensor, Amount, str, float | None], Tensor]
    neutral: float
    low: float
    high: float
    is_additive: bool = False
    is_on_others: bool = False


MARGINS: dict[str, Margin] = {
    entry.name: entry
    for entry in (
        Margin(name="none", summary="g(theta)", function=without_margin, neutral=1.0, low=1.0, high=1.0),
        Margin(
            name="multiplied",
            summary="g(m theta - kappa pi) - 2 kappa, kappa = floor(m theta / pi)",
            function=multiplied,
            neutral=1.0,
            low=1.0,
            high=64.0,
        ),
        Margin(
            name="angle-added",
            summary="g(theta + m), beyond pi - m g(theta + m - pi) - 2",
            function=added_to_angle,
            neutral=0.0,
            low=0.0,
            high=math.pi,
            is_additive=True,
        ),
        Margin(
            name="response-reduced",
            summary="g(theta) - m",
            function=taken_from_response,
            neutral=0.0,
            low=0.0,
            high=2.0,
            is_additive=True,
        ),
        Margin(
            name="multiplied-to-pi",
            summary="g(min(m theta, pi))",
            function=multiplied_up_to_pi,
            neutral=1.0,
            low=1.0,
            high=64.0,
        ),
        Margin(
            name="others-divided",
            summary="g(theta / m) for the wrong classes",
            function=divided,
            neutral=1.0,
            low=1.0,
            high=64.0,
            is_on_others=True,
        ),
    )
}


def margin_named(name: str) -> Margin:
    """The table's entry. Raises OptionError with the known names."""
    if name not in MARGINS:
        raise OptionError(f"margin {name!r} is unknown; choose one of: {', '.join(MARGINS)}.")
    return MARGINS[name]


def psi(angle: Tensor, name: str, amount: Amount, *, operator: str = "cosine", k: float | None = None) -> Tensor:
    """The response that a margin leaves of an angle; never above g(theta) for the right class.

    Continuous and falling on all of [0, pi], with a finite gradient at both ends: computed in float32 or wider and
    cast back.

    Args:
        angle: (...) in [0, pi], radians, of any floating type.
        name: an entry of ``MARGINS``.
        amount: m; a tensor is allowed for additive margins.
        operator: cosine, linear, sigmoid.
        k: softness of the sigmoid.

    Returns:
        (...), in the type of ``angle``; for ``multiplied`` in [1 - 2m, 1].

    Raises:
        OptionError: unknown margin or operator.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, eq. 11 (linear, cosine); the sigmoid,
    which the paper leaves open, by the same formula.
    """
    entry = margin_named(name)
    if operator not in ANGULAR_RESPONSES:
        raise OptionError(f"operator {operator!r} is unknown; choose one of: {', '.join(ANGULAR_RESPONSES)}.")
    wide = angle.to(torch.promote_types(angle.dtype, torch.float32))
    return entry.function(wide, amount, operator, k).to(angle.dtype)


def angle_of(response: Tensor, *, operator: str = "cosine", k: float | None = None) -> Tensor:
    """The angle in [0, pi] whose response is given: the inverse of g, with a finite slope everywhere.

    Args:
        response: (...) in [-1, 1]; what rounding adds is taken off.

    Returns:
        (...), in float32 or wider.
    """
    wide = response.to(torch.promote_types(response.dtype, torch.float32))
    return ANGULAR_RESPONSES[operator].angle_of(wide, k)
