"""Responses of folded layers as polynomials, fitted once for a layer's k: one for small cosines, one for large."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NEAR_TERMS, FAR_TERMS, EDGE = 7, 9, 0.7  # as in cpu_curves.h
LARGEST_ERROR = 2e-7  # relative, of the terms in float32; the rounding of their evaluation comes on top


class Curve(NamedTuple):
    """``tanh(steepness asin(c))``, or asin itself; float32 terms of one curve (W = 1) or of each filter (W = O).

    Attributes:
        near: (7, W): c times these terms of c^2, for \\|c\\| <= 0.7.
        far: (9, W): these terms of sqrt((1 - \\|c\\|) / 2), the sine of half the angle, beyond.
    """

    near: Tensor
    far: Tensor


def curve_of(operator: str, steepness: float | Tensor | None) -> Curve | None:
    """The curve of an operator; None where there is none: no polynomial of so few terms is near enough, or a tensor
    was not prepared by ``prepare``."""
    if operator == "cosine":
        return None
    return LEARNED.get(steepness) if isinstance(steepness, Tensor) else fixed_curve(steepness)


@functools.lru_cache(maxsize=64)
def fixed_curve(steepness: float | None) -> Curve | None:
    return fitted(None if steepness is None else torch.tensor([steepness], dtype=torch.float64, device="cpu"))


LEARNED = WeakTensorKeyDictionary()  # curves by the steepness they were fitted to, as long as that lives


def prepare(steepness: Tensor) -> None:
    """Fit the curves of (O,) numbers of 1 / 2k, for ``curve_of`` to find. They must not be changed in place."""
    if steepness.device.type == "cpu" and steepness.dtype == torch.float32:
        LEARNED[steepness] = fitted(steepness.detach().double().flatten())


def fitted(steepness: Tensor | None) -> Curve | None:
    """The curves through Chebyshev's nodes; None if one of them departs by more than ``LARGEST_ERROR``.

    Args:
        steepness: (W,) in float64, or None for asin.
    """

    def response(angle: Tensor) -> Tensor:
        return angle if steepness is None else torch.tanh(angle * steepness)

    def by_square(square: Tensor) -> Tensor:
        return response(square.sqrt().asin()) / square.sqrt()

    def by_half_sine(half: Tensor) -> Tensor:
        return response(math.pi / 2 - 2 * half.asin())

    near = terms_of(by_square, EDGE**2, NEAR_TERMS)
    far = terms_of(by_half_sine, math.sqrt((1 - EDGE) / 2), FAR_TERMS)
    return None if near is None or far is None else Curve(near, far)


def terms_of(
    function: Callable[[Tensor], Tensor], end: float, count: int, largest: float = LARGEST_ERROR
) -> Tensor | None:
    """Terms (count, W) of a polynomial near ``function``, of (X, 1) numbers in [0, end] to (X, W).

    None if one of them departs by more than ``largest``, relative.
    """
    options = dict(dtype=torch.float64, device="cpu")
    powers = torch.arange(count, **options)  # type: ignore[call-overload]
    nodes = (1 - torch.cos((powers + 0.5) * (math.pi / count)))[:, None] / 2
    terms = torch.linalg.solve(nodes**powers, function(nodes * end)) / end ** powers[:, None]
    terms = terms.float()
    places = torch.linspace(1e-6, 1, 257, **options)[:, None] * end  # type: ignore[call-overload]
    truth = function(places)
    error = ((places**powers) @ terms.double() - truth).abs() / truth.abs()
    return terms.contiguous() if bool((error <= largest).all()) else None
