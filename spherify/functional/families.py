"""Responses of rows with a learned k and their gradients as short polynomials, whose terms are polynomials in k."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from ctypes import c_float

import torch
from torch import Tensor

LEAST_K = 0.3  # below, so few terms are not near enough
EDGE, REACH = 0.65, 0.55  # cosines up to which the polynomials serve, forward and backward
TERMS, OF_U = 7, 9  # as in cpu_learned_rows.h
BEYOND_TERMS, BEYOND_OF_U = 9, 13  # likewise, of the polynomials beyond EDGE
MOST = (0.5 / LEAST_K) ** 2  # of u


class Family(ctypes.Structure):
    """As in cpu_learned_rows.h: terms by powers of v, which goes from -1 at k = infinity to 1 at ``LEAST_K``."""

    _fields_ = (
        *((name, c_float) for name in ("most", "edge")),
        ("near", c_float * (TERMS * OF_U)),
        ("far", c_float * (BEYOND_TERMS * BEYOND_OF_U)),
        ("limit", c_float * OF_U),
        *((name, c_float * (TERMS * OF_U)) for name in ("slope", "along", "angle")),
    )


@functools.cache  # descriptions of calls point at it
def family() -> Family:
    """The polynomials of ``rise tanh(s asin(c))`` for s = 1 / 2k, in powers of u = s^2: all of them are even in s."""
    places, s = steepness(OF_U)
    u, rise = s * s, 1 / torch.tanh(s * (math.pi / 2))
    limit = (torch.tanh(s * math.asin(REACH)) / s) ** 2

    def angle(square: Tensor) -> Tensor:
        return torch.atanh(square.sqrt() * s) / s

    def near(square: Tensor) -> Tensor:
        return rise * torch.tanh(square.sqrt().asin() * s) / square.sqrt()

    def slope(square: Tensor) -> Tensor:
        return s * rise * (1 - square * u) / angle(square).cos()

    def along(square: Tensor) -> Tensor:
        return slope(square) * angle(square).sin() / square.sqrt()

    def angle_and_rise(square: Tensor) -> Tensor:
        return (1 - square * u) * angle(square) / square.sqrt()

    found = Family(most=MOST, edge=EDGE**2)
    functions: dict[str, tuple[Callable[[Tensor], Tensor], float | Tensor]] = dict(
        near=(near, EDGE**2), slope=(slope, limit), along=(along, limit), angle=(angle_and_rise, limit)
    )
    for name, (function, end) in functions.items():
        getattr(found, name)[:] = by_powers(interpolated(function, end), places)
    found.far[:] = far_terms()
    found.limit[:] = by_powers(limit[None], places)
    return found


def far_terms() -> list[float]:
    """Of the response less 1, over h, in powers of h: 1 - |c| = 2 h^2, and h goes up to where |c| = ``EDGE``."""
    places, s = steepness(BEYOND_OF_U)

    def far(half: Tensor) -> Tensor:
        return (torch.tanh(s * (math.pi / 2 - 2 * half.asin())) / torch.tanh(s * (math.pi / 2)) - 1) / half

    return by_powers(interpolated(far, math.sqrt((1 - EDGE) / 2), BEYOND_TERMS), places)


def steepness(count: int) -> tuple[Tensor, Tensor]:
    """Chebyshev's nodes for v, (``count``,), and s there."""
    places = torch.cos((torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / count))
    return places, ((places + 1) * (MOST / 2)).sqrt()


def by_powers(terms: Tensor, places: Tensor) -> list[float]:
    """Terms at the places, (T, P), as polynomials in v, (T, powers), in one line."""
    powers = torch.arange(len(places), dtype=torch.float64, device="cpu")
    return torch.linalg.solve(places[:, None] ** powers, terms.T).T.flatten().tolist()


def interpolated(function: Callable[[Tensor], Tensor], end: float | Tensor, count: int = TERMS) -> Tensor:
    """Terms (``count``, W) of the polynomials through Chebyshev's nodes of [0, end] of a function of (X, W) numbers.

    Args:
        end: a number, or (W,) of them.
    """
    powers = torch.arange(count, dtype=torch.float64, device="cpu")
    nodes = (1 - torch.cos((powers + 0.5) * (math.pi / count)))[:, None] / 2
    ends = torch.as_tensor(end, dtype=torch.float64)
    return torch.linalg.solve(nodes**powers, function(nodes * ends)) / ends ** powers[:, None]
