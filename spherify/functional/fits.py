"""Responses of rows and their gradients as short polynomials, fitted once for an operator and a k that is a number."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterable
from ctypes import c_float

import torch
from torch import Tensor

from spherify.functional.curves import terms_of

TERMS = dict(near=7, far=9, slope=7, along=7, cosine=11)  # as in cpu_row_lanes.h
EDGES = (*(edge / 100 for edge in range(99, 50, -1)), 0.5, 0.45, 0.4)  # cosines up to which a polynomial may serve
LARGEST_ERROR = 1.2e-7  # relative, of the terms in float32; the rounding of their evaluation comes on top


class Fit(ctypes.Structure):
    """As in cpu_row_lanes.h."""

    _fields_ = (
        *((name, c_float) for name in ("edge", "limit", "reach")),
        *((name, c_float * count) for name, count in TERMS.items()),
    )


@functools.cache  # descriptions of calls point at what it gives: none is ever dropped
def fit_of(steep: float | None, rise: float) -> Fit | None:
    """The polynomials of ``rise asin(c)``, or of ``rise tanh(steep asin(c))``; None where k is too small for them."""

    def response(angle: Tensor) -> Tensor:
        return rise * (angle if steep is None else torch.tanh(angle * steep))

    def angle_of(answer: Tensor) -> Tensor:
        return answer / rise if steep is None else torch.atanh(answer / rise) / steep

    def near(square: Tensor) -> Tensor:
        return response(square.sqrt().asin()) / square.sqrt()

    def far(half: Tensor) -> Tensor:
        return response(math.pi / 2 - 2 * half.asin())

    def slope(square: Tensor) -> Tensor:
        rate = rise if steep is None else steep * (rise - square / rise)
        return rate / angle_of(square.sqrt()).cos()

    def cosine(square: Tensor) -> Tensor:
        return angle_of(square.sqrt()).sin() / square.sqrt()

    def along(square: Tensor) -> Tensor:
        return slope(square) * cosine(square)

    def answer_at(edge: float) -> float:
        return float(response(torch.tensor(edge, dtype=torch.float64, device="cpu").asin()))

    fit = Fit()
    is_found = (
        fill(fit, "edge", lambda edge: edge**2, dict(near=near))
        and fill_far(fit, far)
        and fill(fit, "limit", lambda edge: answer_at(edge) ** 2, dict(slope=slope, along=along))
        and fill(fit, "reach", lambda edge: answer_at(edge) ** 2, dict(cosine=cosine))
    )
    return fit if is_found else None


def fill(
    fit: Fit, name: str, end_of: Callable[[float], float], functions: dict[str, Callable[[Tensor], Tensor]]
) -> bool:
    """Fit polynomials as far as all of them are near enough, and note how far; False if they are nowhere."""
    for edge in EDGES:
        end = end_of(edge)
        found = [terms_of(function, end, TERMS[key], LARGEST_ERROR) for key, function in functions.items()]
        if is_filled(fit, functions, found):
            setattr(fit, name, end)
            return True
    return False


def fill_far(fit: Fit, far: Callable[[Tensor], Tensor]) -> bool:
    """From the edge of what is near on."""
    end = math.sqrt((1 - math.sqrt(fit.edge)) / 2)
    return is_filled(fit, ["far"], [terms_of(far, end, TERMS["far"], LARGEST_ERROR)])


def is_filled(fit: Fit, names: Iterable[str], found: list[Tensor | None]) -> bool:
    if any(terms is None for terms in found):
        return False
    for name, terms in zip(names, found, strict=True):
        assert terms is not None
        getattr(fit, name)[:] = terms.flatten().tolist()
    return True
