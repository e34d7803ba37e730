"""1x1 convolutions on channels-last maps by one call each way, as compiled graphs make it.

Products of matrices are torch's own BLAS's. Response and gradients are computed while some rows are in the cache: but
for the response, which the gradient reads, nothing goes through memory that would not in the plain layer.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spherify.functional import cpu_binding
from spherify.functional.cpu_binding import CODES, empty_at_once
from spherify.functional.cpu_kernels import by_filter, checked, guard_of
from spherify.functional.cpu_rows import describe_fit, hold, places_of

NUMBERS = 1 << 17  # of products that are computed before they become responses: half of a core's second-level cache
LEAST_ROWS = 512  # with fewer, reading the filters again would cost more than is saved


class Pointwise(ctypes.Structure):
    """As in cpu_pointwise.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("sgemm", "x", "weight", "gradient", "saved", "k", "norms", "lengths")),
        *((name, c_void_p) for name in ("out", "by_weight", "sums")),
        *((name, c_long) for name in ("rows", "channels", "filters", "some")),
        *((name, c_float) for name in ("eps", "fixed_k", "guard", "step")),
        *((name, c_int) for name in ("operator", "threads")),
        ("fit", c_void_p),
        ("family", c_void_p),
    )


class Held(NamedTuple):
    """What serves all calls of a shape: where its description is, and how tensors lie."""

    place: int
    rows: int
    response: tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides
    by_x: tuple[tuple[int, ...], tuple[int, ...]]
    described: Pointwise


HELD: dict[tuple[object, ...], Held] = {}


@functools.cache
def library() -> ctypes.CDLL:
    kernels = cpu_binding.library()
    assert kernels is not None
    for name, places in (("respond_at", 7), ("backward_at", 11), ("check", 1)):
        getattr(kernels, f"pointwise_{name}").argtypes = (c_void_p,) * places
    return kernels


@functools.cache
def sgemm() -> int | None:
    """The address of the product of matrices in torch's library, or None where it shows none or another."""
    if cpu_binding.library() is None:
        return None
    for path in Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"):
        try:
            address = ctypes.cast(ctypes.CDLL(str(path)).sgemm_, c_void_p).value
        except (OSError, AttributeError):
            continue
        if address is not None and library().pointwise_check(address) == 0:
            return address
    return None


def in_rows(x: Tensor) -> Tensor:
    """(N, C, H, W) with what belongs to a position side by side; a copy where it does not lie so."""
    return x.contiguous(memory_format=torch.channels_last)


def like_rows(x: Tensor, channels: int) -> Tensor:
    """Empty, with as many images and positions as ``x``, and so laid out that ``in_rows`` copies nothing."""
    return x.new_empty_strided(*lying_in_rows(x, channels))


def lying_in_rows(x: Tensor, channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides."""
    images, _, height, width = x.shape
    return (images, channels, height, width), (height * width * channels, 1, width * channels, channels)


def described(x: Tensor, weight: Tensor, k: Tensor | None, operator: str, fixed_k: float, eps: float) -> Held:
    """What serves all calls of a shape, found once."""
    key = (x.shape, weight.shape, k is None, operator, fixed_k, eps, torch.get_num_threads())
    if (held := HELD.get(key)) is not None:
        return held
    filters, channels = weight.shape[:2]
    rows, multiply = x.numel() // channels, sgemm()
    if multiply is None:  # a graph that was compiled elsewhere
        raise RuntimeError(
            "spherify::pointwise: torch's library shows no product of matrices (sgemm_) here; compile again."
        )
    layer = Pointwise(
        sgemm=multiply,
        rows=rows,
        channels=channels,
        filters=filters,
        some=min(rows, max(LEAST_ROWS, NUMBERS // filters)),
        eps=eps,
        fixed_k=fixed_k,
        guard=guard_of(operator),
        step=torch.finfo(torch.float32).eps,
        operator=CODES[operator],
        threads=cpu_binding.threads_for(rows * max(filters, channels)),
    )
    describe_fit(layer, operator, fixed_k or None if k is None else k)
    place, lying = ctypes.addressof(layer), (lying_in_rows(x, filters), lying_in_rows(x, channels))
    return hold(HELD, key, Held(place, rows, *lying, layer))


def respond(
    x: Tensor, weight: Tensor, k: Tensor | None, operator: str, fixed_k: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The response, 1 / |row| at each position, (R,), and 1 / |filter|, (O,).

    Args:
        x: (N, C, H, W).
        weight: (O, C, 1, 1).
    """
    held, filters = described(x, weight, k, operator, fixed_k, eps), weight.shape[0]
    x, weight, k = in_rows(x), in_rows(weight), by_filter(k, filters)
    out, norms = empty_at_once(*held.response), empty_at_once((held.rows,), (1,))
    lengths = empty_at_once((filters,), (1,))
    checked(library().pointwise_respond_at(held.place, *places_of(x, weight, k, norms, lengths, out)))
    return out, norms, lengths


def respond_backward(
    gradient: Tensor,
    response: Tensor,
    x: Tensor,
    weight: Tensor,
    norms: Tensor,
    lengths: Tensor,
    k: Tensor | None,
    operator: str,
    fixed_k: float,
    by: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by input and weight, and (2, O): with the response, and for k.

    Args:
        by: which of the three are wanted; the others are empty.
    """
    held = described(x, weight, k, operator, fixed_k, 0.0)
    gradient, response, x, rows = in_rows(gradient), in_rows(response), in_rows(x), in_rows(weight)
    (filters, channels), (needs_x, needs_weight, needs_k) = rows.shape[:2], by
    by_x = empty_at_once(*held.by_x) if needs_x else None
    by_weight = empty_at_once(weight.shape, (channels, 1, 1, 1)) if needs_weight else None
    sums = empty_at_once((2, filters), (filters, 1)) if needs_k else None
    soft = by_filter(k, filters)
    places = places_of(gradient, response, x, rows, soft, norms, lengths, by_x, by_weight, sums)
    checked(library().pointwise_backward_at(held.place, *places))
    return tuple(empty_at_once((0,), (1,)) if one is None else one for one in (by_x, by_weight, sums))  # type: ignore[return-value]


def shapes_of_gradients(x: Tensor, weight: Tensor, by: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    filters, channels = weight.shape[:2]
    return (
        like_rows(x, channels) if by[0] else x.new_empty(0),
        x.new_empty(weight.shape if by[1] else 0),
        x.new_empty((2, filters) if by[2] else 0),
    )
