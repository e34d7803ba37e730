"""Triton kernels for CUDA around the product: patch norms, filters' lengths, and the gradient along the patches.

Imported only where triton is there. A tensor (N, O, ...) is seen as (N, O, S) with three strides, so that any memory
format is taken as it lies; sums are in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

T = TypeVar("T")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = 2048  # of a tile: 16 for each of the 128 threads
MOST_LANES = 64  # of a tile along the dimension that is not contiguous
ENOUGH_PROGRAMS = 512  # some for each of a GPU's processors


@triton.jit
def energy_kernel(  # type: ignore[no-untyped-def]
    x, energy, channels, size, groups, stride_n, stride_c, stride_s, TILE_S: tl.constexpr, TILE_C: tl.constexpr
):
    """energy[n, g, s] = sum over the channels of g of x[n, c, s]^2."""
    tiles = tl.cdiv(size, TILE_S)
    n, s = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * TILE_S + tl.arange(0, TILE_S)
    group = tl.program_id(1)
    start = x + n * stride_n + group * channels * stride_c
    total = tl.zeros((TILE_S,), tl.float32)
    for first in range(0, channels, TILE_C):
        c = first + tl.arange(0, TILE_C)
        mask = (c[:, None] < channels) & (s[None, :] < size)
        part = tl.load(start + c[:, None] * stride_c + s[None, :] * stride_s, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(part * part, 0)
    tl.store(energy + (n * groups + group) * size + s, total, mask=s < size)


@triton.jit
def window_kernel(  # type: ignore[no-untyped-def]
    x, inverse, maps, size, columns, height, width,
    stride_n, stride_m, stride_h, stride_w, out_n, out_m, out_s,
    step_h, step_w, pad_h, pad_w, gap_h, gap_w, eps,
    ROWS: tl.constexpr, WIDE: tl.constexpr, SQUARED: tl.constexpr, TILE_S: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """inverse[n, m, p, q] = 1 / sqrt(sum over the window of x[n, m, ...], or of its squares, + eps)."""
    tiles = tl.cdiv(size, TILE_S)
    n, s = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * TILE_S + tl.arange(0, TILE_S)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    top, left = (s // columns) * step_h - pad_h, (s % columns) * step_w - pad_w
    is_there = (m[:, None] < maps) & (s[None, :] < size)
    start = x + n * stride_n + m[:, None] * stride_m
    total = tl.zeros((TILE_M, TILE_S), tl.float32)
    for row in range(ROWS):
        for column in range(WIDE):
            h, w = top + row * gap_h, left + column * gap_w
            is_inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            place = start + h[None, :] * stride_h + w[None, :] * stride_w
            part = tl.load(place, mask=is_there & is_inside[None, :], other=0.0).to(tl.float32)
            total += part * part if SQUARED else part
    out = inverse + n * out_n + m[:, None] * out_m + s[None, :] * out_s
    tl.store(out, 1.0 / tl.sqrt(total + eps), mask=is_there)


@triton.jit
def length_kernel(weight, length, numbers, eps, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """length[o] = 1 / sqrt(sum of the squares of row o + eps)."""
    start = weight + tl.program_id(0).to(tl.int64) * numbers
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, numbers, TILE):
        place = first + tl.arange(0, TILE)
        part = tl.load(start + place, mask=place < numbers, other=0.0).to(tl.float32)
        total += part * part
    tl.store(length + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(total, 0) + eps))


@triton.jit
def met_by_pixels(  # type: ignore[no-untyped-def]
    along, inverse, base, is_there, h, w, rows, columns, stride, step_h, step_w, pad_h, pad_w, gap_h, gap_w,
    ROWS: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr, TILE_S: tl.constexpr,
):  # fmt: skip
    """(TILE_M, TILE_S): the sum of along / |patch|^2 over the patches that hold each pixel."""
    total = tl.zeros((TILE_M, TILE_S), tl.float32)
    for row in range(ROWS):
        for column in range(WIDE):
            down, right = h + pad_h - row * gap_h, w + pad_w - column * gap_w
            p, q = down // step_h, right // step_w
            is_met = (down >= 0) & (down % step_h == 0) & (p < rows) & (right >= 0) & (right % step_w == 0)
            mask = is_there & (is_met & (q < columns))[None, :]
            place = base + (p * columns + q)[None, :] * stride
            scale = tl.load(inverse + place, mask=mask, other=0.0)
            total += tl.load(along + place, mask=mask, other=0.0) * scale * scale
    return total


@triton.jit
def along_kernel(  # type: ignore[no-untyped-def]
    by_x, x, along, inverse, size, width, members, chunk, rows, columns,
    by_n, by_c, by_s, stride_n, stride_c, stride_s, inverse_n, inverse_g, inverse_s,
    step_h, step_w, pad_h, pad_w, gap_h, gap_w,
    ROWS: tl.constexpr, WIDE: tl.constexpr, ALONE: tl.constexpr, TILE_S: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """by_x -= x times what ``met_by_pixels`` sums; a program has a chunk of one group's channels.

    ``ALONE``: each channel is a group of its own, and a program has a chunk of all of them (``members`` counts all).
    """
    tiles = tl.cdiv(size, TILE_S)
    n, s = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * TILE_S + tl.arange(0, TILE_S)
    h, w = s // width, s % width
    chunks = tl.cdiv(members, chunk)
    group, start = tl.program_id(1) // chunks, (tl.program_id(1) % chunks) * chunk
    is_pixel = (s < size)[None, :]
    if not ALONE:
        base = n * inverse_n + group * inverse_g + tl.zeros((1, 1), tl.int64)
        total = met_by_pixels(
            along, inverse, base, is_pixel, h, w, rows, columns, inverse_s, step_h, step_w, pad_h, pad_w, gap_h, gap_w,
            ROWS, WIDE, 1, TILE_S,
        )  # fmt: skip
    for first in range(start, tl.minimum(start + chunk, members), TILE_C):
        c = first + tl.arange(0, TILE_C)
        mask = (c < members)[:, None] & is_pixel
        if ALONE:
            base = n * inverse_n + c[:, None] * inverse_g
            total = met_by_pixels(
                along, inverse, base, mask, h, w, rows, columns, inverse_s, step_h, step_w, pad_h, pad_w, gap_h, gap_w,
                ROWS, WIDE, TILE_C, TILE_S,
            )  # fmt: skip
        c += group * members
        place = by_x + n * by_n + c[:, None] * by_c + s[None, :] * by_s
        pixel = tl.load(x + n * stride_n + c[:, None] * stride_c + s[None, :] * stride_s, mask=mask, other=0.0)
        found = tl.load(place, mask=mask, other=0.0).to(tl.float32) - pixel.to(tl.float32) * total
        tl.store(place, found.to(by_x.dtype.element_ty), mask=mask)


def as_rows(x: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    """A tensor whose trailing dimensions lie one behind the other, their size, and the strides by N, O and position.

    The vectors of a linear layer count as the positions of one image, so that a tile is full.
    """
    if x.dim() == 2:
        return x, x.shape[0], (0, x.stride(1), x.stride(0))
    flat = x.flatten(2)  # a view, or a copy where the trailing dimensions are strewn
    return flat, flat.shape[2], (flat.stride(0), flat.stride(1), flat.stride(2))


def images(x: Tensor) -> int:
    return 1 if x.dim() == 2 else x.shape[0]


def is_flat(x: Tensor) -> bool:
    """Whether ``as_rows`` of a tensor is the very same memory."""
    return x.dim() == 2 or x.numel() == 0 or x.flatten(2).data_ptr() == x.data_ptr()


def takes(x: Tensor) -> bool:
    return x.dtype in TYPES and 0 < x.numel() < 2**31 and is_flat(x)


def tile(size: int, lanes: int, stride: int, numbers: int = NUMBERS) -> tuple[int, int]:
    """How many of ``size`` positions and ``lanes`` (channels, filters) a tile has; more where they are contiguous."""
    most = MOST_LANES if stride == 1 else MOST_LANES // 2
    across = min(triton.next_power_of_2(lanes), most)
    return min(numbers // across, max(16, triton.next_power_of_2(size))), across


def chunk_of(lanes: int, step: int, programs: int) -> int:
    """How many of ``lanes`` each program works through, in steps, so that there are enough programs."""
    parts = max(1, min(triton.cdiv(lanes, step), ENOUGH_PROGRAMS // max(1, programs)))
    return triton.cdiv(triton.cdiv(lanes, parts), step) * step


def on_its_device(function: Callable[..., T]) -> Callable[..., T]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(function)
    def launch(first: Tensor, *arguments: Any) -> T:
        with torch.cuda.device_of(first):
            return function(first, *arguments)

    return launch


@on_its_device
def energy(x: Tensor, groups: int) -> Tensor:
    """(N, C, ...) to (N, G, ...), float32."""
    flat, size, strides = as_rows(x)
    out = torch.empty((x.shape[0], groups, *x.shape[2:]), dtype=torch.float32, device=x.device)
    channels = x.shape[1] // groups
    positions, across = tile(size, channels, strides[1], 2 * NUMBERS)
    grid = (images(x) * triton.cdiv(size, positions), groups)
    energy_kernel[grid](flat, out, channels, size, groups, *strides, TILE_S=positions, TILE_C=across)
    return out


def axes(numbers: Sequence[int], default: int) -> list[int]:
    """Of two trailing dimensions, those that a linear layer or a sequence lacks put in front."""
    return [default] * (2 - len(numbers)) + list(numbers)


@on_its_device
def patch_inverse_norm(
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    """1 / |patch|, (N, G, P, Q) float32; at most two trailing dimensions."""
    is_depthwise = groups == x.shape[1] and x.dim() > 2
    if not is_depthwise and max((*window, *stride), default=1) == 1 and not any(padding):
        return energy(x, groups).add_(eps).rsqrt_()
    maps = x if is_depthwise else energy(x, groups)
    size, step, pad, gap = axes(window, 1), axes(stride, 1), axes(padding, 0), axes(dilation, 1)
    height, width = axes(maps.shape[2:], 1)
    rows = (height + 2 * pad[0] - gap[0] * (size[0] - 1) - 1) // step[0] + 1
    columns = (width + 2 * pad[1] - gap[1] * (size[1] - 1) - 1) // step[1] + 1
    shape = (maps.shape[0], groups, *(rows, columns)[2 - len(window) :])
    is_last = is_depthwise and maps.dim() == 4 and maps.stride(1) == 1
    where = torch.channels_last if is_last else torch.contiguous_format
    out = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=where)
    if out.numel() == 0:
        return out
    strides = (maps.stride(0), maps.stride(1), *axes(maps.stride()[2:], 0))
    _, _, out_strides = as_rows(out)
    positions, across = tile(rows * columns, groups, strides[1], NUMBERS // 2)
    grid = (maps.shape[0] * triton.cdiv(rows * columns, positions), triton.cdiv(groups, across))
    window_kernel[grid](
        maps, out, groups, rows * columns, columns, height, width, *strides, *out_strides, *step, *pad, *gap, eps,
        ROWS=size[0], WIDE=size[1], SQUARED=is_depthwise, TILE_S=positions, TILE_M=across,
    )  # fmt: skip
    return out


@on_its_device
def inverse_lengths(weight: Tensor, eps: float) -> Tensor:
    """(O,): 1 / |w| of each filter, float32."""
    filters, numbers = weight.shape[0], weight.numel() // weight.shape[0]
    out = torch.empty(filters, dtype=torch.float32, device=weight.device)
    rows = weight if lies_in_rows(weight) else weight.contiguous()
    length_kernel[(filters,)](rows, out, numbers, eps, TILE=min(1024, triton.next_power_of_2(numbers)))
    return out


def lies_in_rows(weight: Tensor) -> bool:
    is_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return (weight.is_contiguous() or is_last) and weight.stride(0) == math.prod(weight.shape[1:])


@on_its_device
def subtract_along_(
    by_x: Tensor,
    x: Tensor,
    along: Tensor,
    inverse: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``by_x`` less x times the sum of ``along / |patch|^2`` over the patches that hold each number, in place.

    Args:
        along, inverse: (N, G, P, Q).
    """
    if along.stride() != inverse.stride():
        along = torch.empty_like(inverse).copy_(along)
    groups, channels = along.shape[1], x.shape[1]
    is_alone = groups == channels
    members = channels if is_alone else channels // groups
    into, size, by_strides = as_rows(by_x)
    flat, _, strides = as_rows(x)
    _, _, inverse_strides = as_rows(inverse)
    width = size if x.dim() == 2 else x.shape[-1]
    rows, columns = (1, size) if x.dim() == 2 else axes(along.shape[2:], 1)
    positions, across = tile(size, members, strides[1])
    tiles, parts = images(x) * triton.cdiv(size, positions), 1 if is_alone else groups
    chunk = across if is_alone else chunk_of(members, across, tiles * parts)
    at = *axes(stride, 1), *axes(padding, 0), *axes(dilation, 1)
    sides = axes(window, 1)
    along_kernel[(tiles, parts * triton.cdiv(members, chunk))](
        into, flat, along, inverse, size, width, members, chunk, rows, columns,
        *by_strides, *strides, *inverse_strides, *at,
        ROWS=sides[0], WIDE=sides[1], ALONE=is_alone, TILE_S=positions, TILE_C=across,
    )  # fmt: skip
    return by_x
