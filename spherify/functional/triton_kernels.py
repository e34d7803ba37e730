"""Triton kernels for CUDA: the patch norm, and normalise-and-respond forward and backward, each in one pass.

Imported only where triton is there. Any memory format is taken as it lies: a tensor (N, O, ...) is seen as
(N, O, S) with three strides. Sums and angles are in float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from spherify.functional.responses import RESPONSES

TYPES = (torch.float32, torch.bfloat16, torch.float16)
COSINE, LINEAR, SIGMOID = 0, 1, 2
CODES = {"cosine": COSINE, "linear": LINEAR, "sigmoid": SIGMOID, "learnable": SIGMOID}
assert CODES.keys() | {"identity"} == RESPONSES.keys()

HALF_PI: tl.constexpr = tl.constexpr(math.pi / 2)
POSITIONS, FILTERS = 64, 32  # a tile


@triton.jit
def asin(x):  # type: ignore[no-untyped-def]
    """By the polynomial of Cephes; relative error 2e-7."""
    size = tl.abs(x)
    is_large = size > 0.5
    z = tl.where(is_large, 0.5 * (1.0 - size), size * size)
    root = tl.where(is_large, tl.sqrt(z), size)
    p = (((4.2163199048e-2 * z + 2.4181311049e-2) * z + 4.5470025998e-2) * z + 7.4953002686e-2) * z + 1.6666752422e-1
    found = root + root * z * p
    found = tl.where(is_large, HALF_PI - 2.0 * found, found)
    return tl.where(x < 0.0, -found, found)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """By the polynomial of Cephes near zero, else by the exponential, which cannot overflow here."""
    size = tl.abs(x)
    z = size * size
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = size + size * z * (p - 3.33332819422e-1)
    e = tl.exp(-2.0 * size)
    found = tl.where(size < 0.625, near, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -found, found)


@triton.jit
def energy_kernel(  # type: ignore[no-untyped-def]
    x, energy, channels, size, groups, stride_n, stride_c, stride_s, TILE_S: tl.constexpr, TILE_C: tl.constexpr
):
    """energy[n, g, s] = sum over the channels of g of x[n, c, s]^2."""
    tiles = tl.cdiv(size, TILE_S)
    n, s = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * TILE_S + tl.arange(0, TILE_S)
    group = tl.program_id(1)
    start = x + n.to(tl.int64) * stride_n + group * channels * stride_c
    total = tl.zeros((TILE_S,), tl.float32)
    for first in range(0, channels, TILE_C):
        c = first + tl.arange(0, TILE_C)
        mask = (c[:, None] < channels) & (s[None, :] < size)
        part = tl.load(start + c[:, None] * stride_c + s[None, :] * stride_s, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(part * part, 0)
    tl.store(energy + (n.to(tl.int64) * groups + group) * size + s, total, mask=s < size)


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    product, inverse, length, steep, factor, gain, bias, size, filters, groups, stride_n, stride_o, stride_s,
    guard, OPERATOR: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_S: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    """product = g(product inverse length) factor gain + bias, in place."""
    tiles = tl.cdiv(size, TILE_S)
    n, s = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * TILE_S + tl.arange(0, TILE_S)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    mask = (o[:, None] < filters) & (s[None, :] < size)
    group = o // (filters // groups)
    place = product + n.to(tl.int64) * stride_n + o[:, None] * stride_o + s[None, :] * stride_s
    scale = tl.load(inverse + (n.to(tl.int64) * groups + group[:, None]) * size + s[None, :], mask=mask, other=0.0)
    c = tl.load(place, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_LENGTH:
        c = c * tl.load(length + o, mask=o < filters, other=0.0)[:, None]
    c = tl.where(c > guard, guard, tl.where(c < -guard, -guard, c))  # a NaN stays
    if OPERATOR != 0:
        c = asin(c)
        if OPERATOR == 2:
            c = tanh(c * tl.load(steep + o, mask=o < filters, other=0.0)[:, None])
        c = c * tl.load(factor + o, mask=o < filters, other=0.0)[:, None]
    if HAS_GAIN:
        c = c * tl.load(gain + o, mask=o < filters, other=0.0)[:, None]
    if HAS_BIAS:
        c = c + tl.load(bias + o, mask=o < filters, other=0.0)[:, None]
    tl.store(place, c.to(product.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    gradient, saved, inverse, length, steep, factor, gain, bias, by_product, along, sums,
    size, filters, groups, grad_n, grad_o, grad_s, stride_n, stride_o, stride_s, step, largest,
    OPERATOR: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_S: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    """What ``blocks.respond_backward`` computes; ``sums`` holds the four sums by filter of each tile of positions."""
    tiles = tl.cdiv(size, TILE_S)
    n, s = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * TILE_S + tl.arange(0, TILE_S)
    group, members = tl.program_id(1), filters // groups
    position = (n.to(tl.int64) * groups + group) * size + s
    scale = tl.load(inverse + position, mask=s < size, other=0.0)
    total = tl.zeros((TILE_S,), tl.float32)
    row = sums + tl.program_id(0).to(tl.int64) * 4 * filters
    for first in range(0, members, TILE_O):
        member = first + tl.arange(0, TILE_O)
        is_one = member < members
        o = group * members + member
        mask = is_one[:, None] & (s[None, :] < size)
        offset = n.to(tl.int64) * stride_n + o[:, None] * stride_o + s[None, :] * stride_s
        from_grad = n.to(tl.int64) * grad_n + o[:, None] * grad_o + s[None, :] * grad_s
        part = tl.load(gradient + from_grad, mask=mask, other=0.0).to(tl.float32)
        answer = tl.load(saved + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(row + o, tl.sum(part, 1), mask=is_one)
        if OPERATOR == 0:
            if HAS_BIAS:
                answer = answer - tl.load(bias + o, mask=is_one, other=0.0)[:, None]
            cosine, slope = answer, part
        else:
            tl.store(row + filters + o, tl.sum(part * answer, 1), mask=is_one)
            if HAS_GAIN:
                part = part * tl.load(gain + o, mask=is_one, other=0.0)[:, None]
            end = tl.load(factor + o, mask=is_one, other=1.0)[:, None]
            if OPERATOR == 1:
                angle, slope = answer * HALF_PI, part * end
            else:
                sharp = tl.load(steep + o, mask=is_one, other=1.0)[:, None]
                t = answer / end
                rise = (1.0 - t * t) * part
                t = tl.where(t > 0.99999988, 0.99999988, tl.where(t < -0.99999988, -0.99999988, t))
                y = 0.5 * tl.log((1.0 + t) / (1.0 - t))
                tl.store(row + 2 * filters + o, tl.sum(rise * y, 1), mask=is_one)
                angle, slope = y / sharp, rise * sharp * end
                angle = tl.where(angle > HALF_PI, HALF_PI, tl.where(angle < -HALF_PI, -HALF_PI, angle))
            cosine = tl.sin(angle)
            square = 1.0 - cosine * cosine
            slope = slope / tl.sqrt(tl.where(square < step, step, square))
        both = tl.where(mask, cosine * slope, 0.0)
        total += tl.sum(both, 0)
        tl.store(row + 3 * filters + o, tl.sum(both, 1), mask=is_one)
        if HAS_LENGTH:
            slope = slope * tl.load(length + o, mask=is_one, other=0.0)[:, None]
        if HAS_GAIN and OPERATOR == 0:  # not in ``part``: the output of the cosine holds it already
            slope = slope * tl.load(gain + o, mask=is_one, other=0.0)[:, None]
        slope = slope * scale[None, :]
        slope = tl.where(slope > largest, largest, tl.where(slope < -largest, -largest, slope))
        tl.store(by_product + offset, slope.to(by_product.dtype.element_ty), mask=mask)
    tl.store(along + position, total, mask=s < size)


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
    return x.dtype in TYPES and x.numel() > 0 and x.numel() < 2**31 and is_flat(x)


def energy(x: Tensor, groups: int) -> Tensor:
    """(N, C, ...) to (N, G, ...), float32."""
    flat, size, strides = as_rows(x)
    out = torch.empty((x.shape[0], groups, *x.shape[2:]), dtype=torch.float32, device=x.device)
    grid = (images(x) * triton.cdiv(size, POSITIONS), groups)
    energy_kernel[grid](flat, out, x.shape[1] // groups, size, groups, *strides, TILE_S=POSITIONS, TILE_C=FILTERS)
    return out


def works() -> bool:
    """Whether a kernel compiles and runs on this GPU; whatever the compiler raises comes through."""
    product = torch.ones(2, 8, device="cuda")
    normalise_and_respond_(product, torch.full((2, 1), 0.5, device="cuda"), None, "sigmoid", 0.3, None, None)
    return bool(product.isfinite().all())


def by_filter(value: float | Tensor | None, filters: int, like: Tensor) -> Tensor:
    """(O,) float32; an empty stand-in where there is none."""
    if value is None:
        return like
    if isinstance(value, Tensor):
        return value.to(torch.float32).flatten().expand(filters).contiguous()
    return torch.full((filters,), value, dtype=torch.float32, device=like.device)


def constants(operator: str, k: float | Tensor | None, filters: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """1 / 2k, and what the response is multiplied by at the end, filter by filter."""
    if operator == "cosine":
        return like, like
    if k is None:
        return like, by_filter(2.0 / math.pi, filters, like)
    softness = by_filter(k, filters, like)
    return 0.5 / softness, 1.0 / torch.tanh(math.pi / (4.0 * softness))


def normalise_and_respond_(
    product: Tensor,
    inverse: Tensor,
    length: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """As ``blocks.normalise_and_respond_``."""
    flat, size, strides = as_rows(product)
    filters, inverse = product.shape[1], inverse.contiguous()
    steep, factor = constants(operator, k, filters, inverse)
    guard = 1.0 if operator == "cosine" else 1.0 - torch.finfo(torch.float32).eps
    grid = (images(product) * triton.cdiv(size, POSITIONS), triton.cdiv(filters, FILTERS))
    forward_kernel[grid](
        flat, inverse, by_filter(length, filters, inverse), steep, factor, by_filter(gain, filters, inverse),
        by_filter(bias, filters, inverse), size, filters, inverse.shape[1], *strides, guard,
        OPERATOR=CODES[operator], HAS_LENGTH=length is not None, HAS_GAIN=gain is not None,
        HAS_BIAS=bias is not None, TILE_S=POSITIONS, TILE_O=FILTERS,
    )  # fmt: skip
    return product


def respond_backward(
    gradient: Tensor,
    saved: Tensor,
    inverse: Tensor,
    length: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by the product, the sum along each patch (N, G, ...), and the four sums by filter, (4, O)."""
    flat, size, strides = as_rows(saved)
    from_flat, _, grad_strides = as_rows(gradient)
    filters, inverse = saved.shape[1], inverse.contiguous()
    steep, factor = constants(operator, k, filters, inverse)
    by_product, along = torch.empty_like(saved), torch.empty_like(inverse)
    out_flat, _, out_strides = as_rows(by_product)
    assert out_strides == strides
    tiles, groups = images(saved) * triton.cdiv(size, POSITIONS), inverse.shape[1]
    sums = torch.zeros((tiles, 4, filters), dtype=torch.float32, device=saved.device)
    backward_kernel[(tiles, groups)](
        from_flat, flat, inverse, by_filter(length, filters, inverse), steep, factor,
        by_filter(gain, filters, inverse), by_filter(bias, filters, inverse), out_flat, along, sums,
        size, filters, groups, *grad_strides, *strides, torch.finfo(saved.dtype).eps, torch.finfo(saved.dtype).max,
        OPERATOR=CODES[operator], HAS_LENGTH=length is not None, HAS_GAIN=gain is not None,
        HAS_BIAS=bias is not None, TILE_S=POSITIONS, TILE_O=FILTERS,
    )  # fmt: skip
    return by_product, along, sums.sum(0)
