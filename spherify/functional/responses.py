"""The responses g(theta): odd functions of the cosine, one entry each in one table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spherify.errors import OptionError

K_MIN, K_MAX = 1e-3, 1e3  # below, the sigmoid is a step in any float; above, it is the linear response

QUADRATURE_POINTS = 1000

K = float | Tensor | None
KShared = Literal["filter", "layer", "network"]
K_SHARED: tuple[KShared, ...] = ("filter", "layer", "network")


def angle_from_equator(cosine: Tensor) -> Tensor:
    """asin(cosine) = pi/2 - theta, in [-pi/2, pi/2], with a finite slope everywhere.

    asin has an infinite slope at +-1. One rounding step before it, the slope is 1 / sqrt(2 eps): about 2,000 in
    float32. Beyond that step the gradient is zero, which costs nothing: the cosine itself is flat there.
    """
    guard = 1.0 - torch.finfo(cosine.dtype).eps
    return torch.asin(cosine.clamp(-guard, guard))


def cosine_response(cosine: Tensor, k: K = None) -> Tensor:
    """cos(theta), in [-1, 1]. The clamp takes off what rounding (TF32, bfloat16) adds.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, eq. 3.
    """
    return cosine.clamp(-1.0, 1.0)


def linear_response(cosine: Tensor, k: K = None) -> Tensor:
    """1 - 2 theta / pi, in [-1, 1].

    Source: Liu et al. 2017, Deep Hyperspherical Learning, eq. 2, with a = -2/pi and b = 1.
    """
    return angle_from_equator(cosine) * (2.0 / math.pi)


def sigmoid_response(cosine: Tensor, k: K) -> Tensor:
    """tanh((pi/2 - theta) / 2k) / tanh(pi / 4k), in [-1, 1]: a step for small k, linear for large k.

    Equal to the paper's ratio of exponentials, whose exponentials overflow at small k; this form is finite for
    every k in [1e-3, 1e3].

    Args:
        cosine: (N, O, ...) in [-1, 1].
        k: softness, a number or a tensor that broadcasts against ``cosine``.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, eq. 4.
    """
    if k is None:
        raise OptionError("sigmoid_response: k is missing; give a number or a tensor in [1e-3, 1e3].")
    angle = angle_from_equator(cosine)
    if isinstance(k, Tensor):
        k = k.to(cosine.dtype)
        return torch.tanh(angle / (2.0 * k)) / torch.tanh(math.pi / (4.0 * k))
    return torch.tanh(angle / (2.0 * k)) * (1.0 / math.tanh(math.pi / (4.0 * k)))


def cosine_slope(cosine: Tensor, k: K = None) -> Tensor:
    return torch.ones_like(cosine)


def linear_slope(cosine: Tensor, k: K = None) -> Tensor:
    return (2.0 / math.pi) * torch.rsqrt((1.0 - cosine.square()).clamp_min(torch.finfo(cosine.dtype).eps))


def sigmoid_slope(cosine: Tensor, k: K) -> Tensor:
    assert k is not None
    k = torch.as_tensor(k, dtype=cosine.dtype, device=cosine.device)
    tanh = torch.tanh(angle_from_equator(cosine) / (2.0 * k))
    slope = (1.0 - tanh.square()) / (2.0 * k * torch.tanh(math.pi / (4.0 * k)))
    return slope * torch.rsqrt((1.0 - cosine.square()).clamp_min(torch.finfo(cosine.dtype).eps))


@dataclass(frozen=True, kw_only=True)
class Response:
    """One operator: its function of the cosine, that function's derivative, and its parameter.

    Attributes:
        function: (cosine, k) -> response, elementwise, in [-1, 1].
        slope: (cosine, k) -> derivative of ``function`` by the cosine.
        default_k: None where the operator has no k.
        learns_k: k is a parameter of the layer.
        is_hidden: a testing aid, not shown to users.
    """

    name: str
    summary: str
    function: Callable[[Tensor, K], Tensor]
    slope: Callable[[Tensor, K], Tensor]
    default_k: float | None = None
    learns_k: bool = False
    is_hidden: bool = False

    def slope_at_equator(self, k: float | None) -> float:
        """Derivative by the cosine at theta = pi/2, where the cosines of a random patch lie."""
        return float(self.slope(torch.zeros((), dtype=torch.float64), k))

    def spread(self, k: float | None, fan_in: int) -> float:
        """Standard deviation of the response to a patch of random direction.

        The angle between a fixed and a random direction in D dimensions has a density proportional to
        ``sin(theta) ** (D - 2)``; this is its quadrature.
        """
        return spread_of(self.name, k, max(fan_in, 2))


RESPONSES: dict[str, Response] = {
    entry.name: entry
    for entry in (
        Response(
            name="cosine",
            summary="cos(theta)",
            function=cosine_response,
            slope=cosine_slope,
        ),
        Response(
            name="linear",
            summary="1 - 2 theta / pi",
            function=linear_response,
            slope=linear_slope,
        ),
        Response(
            name="sigmoid",
            summary="tanh((pi/2 - theta) / 2k) / tanh(pi / 4k), k fixed",
            function=sigmoid_response,
            slope=sigmoid_slope,
            default_k=0.3,
        ),
        Response(
            name="learnable",
            summary="the sigmoid with k learned per filter, layer or network",
            function=sigmoid_response,
            slope=sigmoid_slope,
            default_k=0.5,
            learns_k=True,
        ),
        Response(
            name="identity",
            summary="the plain inner product through the same machinery",
            function=cosine_response,
            slope=cosine_slope,
            is_hidden=True,
        ),
    )
}


@functools.lru_cache(maxsize=4096)
def spread_of(operator: str, k: float | None, fan_in: int) -> float:
    reach = min(math.pi / 2, 12.0 / math.sqrt(fan_in))  # beyond twelve standard deviations there is nothing
    step = reach / QUADRATURE_POINTS
    latitude = (torch.arange(QUADRATURE_POINTS, dtype=torch.float64) + 0.5) * step  # pi/2 - theta
    density = torch.exp((fan_in - 2) * torch.log(torch.cos(latitude)))
    response = RESPONSES[operator].function(torch.sin(latitude), k)
    return float(((density * response.square()).sum() / density.sum()).sqrt())


def response_named(operator: str) -> Response:
    """The table's entry. Raises OptionError with the known names."""
    if operator not in RESPONSES:
        known = ", ".join(name for name, entry in RESPONSES.items() if not entry.is_hidden)
        raise OptionError(f"operator {operator!r} is unknown; choose one of: {known}.")
    return RESPONSES[operator]


def checked_k(operator: str, k: float | None) -> float | None:
    """The k an operator will use. Raises OptionError for a k out of range or one the operator does not have."""
    response = response_named(operator)
    if k is None:
        return response.default_k
    if response.default_k is None:
        raise OptionError(f"operator {operator!r} has no k; leave k out, or choose sigmoid or learnable.")
    if not K_MIN <= k <= K_MAX:
        raise OptionError(f"k={k!r} is out of range; choose a number in [{K_MIN:g}, {K_MAX:g}].")
    return float(k)
