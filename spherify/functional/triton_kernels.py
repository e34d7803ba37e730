"""Triton kernels for CUDA: normalise-and-respond forward and backward, each in one pass.

Imported only where triton is there. Any memory format is taken as it lies: a tensor (N, O, ...) is seen as
(N, O, S) with three strides. Sums and angles are in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from spherify.functional.responses import RESPONSES
from spherify.functional.triton_norms import (
    as_rows,
    chunk_of,
    energy,
    images,
    inverse_lengths,
    on_its_device,
    patch_inverse_norm,
    subtract_along_,
    takes,
    tile,
)

__all__ = [
    "energy",
    "inverse_lengths",
    "normalise_and_respond_",
    "patch_inverse_norm",
    "respond_backward",
    "subtract_along_",
    "takes",
    "works",
]

COSINE, LINEAR, SIGMOID = 0, 1, 2
CODES = {"cosine": COSINE, "linear": LINEAR, "sigmoid": SIGMOID, "learnable": SIGMOID}
assert CODES.keys() | {"identity"} == RESPONSES.keys()

HALF_PI: tl.constexpr = tl.constexpr(math.pi / 2)


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
def forward_kernel(  # type: ignore[no-untyped-def]
    product, inverse, length, steep, factor, gain, bias, size, filters, members,
    stride_n, stride_o, stride_s, inverse_n, inverse_g, inverse_s, guard,
    OPERATOR: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GROUPS: tl.constexpr, TILE_S: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    """product = g(product inverse length) factor gain + bias, in place."""
    tiles = tl.cdiv(size, TILE_S)
    n, s = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * TILE_S + tl.arange(0, TILE_S)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    is_one, is_position = o < filters, s < size
    mask = is_one[:, None] & is_position[None, :]
    place = product + n * stride_n + o[:, None] * stride_o + s[None, :] * stride_s
    norms = inverse + n * inverse_n + s[None, :] * inverse_s
    if HAS_GROUPS:
        scale = tl.load(norms + (o // members)[:, None] * inverse_g, mask=mask, other=0.0)
    else:
        scale = tl.load(norms, mask=is_position[None, :], other=0.0)
    c = tl.load(place, mask=mask, other=0.0).to(tl.float32) * scale
    if HAS_LENGTH:
        c = c * tl.load(length + o, mask=is_one, other=0.0)[:, None]
    c = tl.where(c > guard, guard, tl.where(c < -guard, -guard, c))  # a NaN stays
    if OPERATOR != 0:
        c = asin(c)
        if OPERATOR == 2:
            c = tanh(c * tl.load(steep + o, mask=is_one, other=0.0)[:, None])
        c = c * tl.load(factor + o, mask=is_one, other=0.0)[:, None]
    if HAS_GAIN:
        c = c * tl.load(gain + o, mask=is_one, other=0.0)[:, None]
    if HAS_BIAS:
        c = c + tl.load(bias + o, mask=is_one, other=0.0)[:, None]
    tl.store(place, c.to(product.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    gradient, saved, inverse, length, steep, factor, gain, bias, by_product, along, sums,
    size, filters, members, chunk, grad_n, grad_o, grad_s, stride_n, stride_o, stride_s,
    inverse_n, inverse_g, inverse_s, along_chunk, step, largest,
    OPERATOR: tl.constexpr, HAS_LENGTH: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ALONE: tl.constexpr, TILE_S: tl.constexpr, TILE_O: tl.constexpr,
):  # fmt: skip
    """What ``blocks.respond_backward`` computes; ``sums`` holds the sums by filter of each tile of positions.

    A program has a chunk of one group's filters, and writes what they add to ``along``. ``ALONE``: each filter is a
    group of its own, and a program has a chunk of all of them (``members`` counts all).
    """
    tiles = tl.cdiv(size, TILE_S)
    n, s = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles) * TILE_S + tl.arange(0, TILE_S)
    chunks = tl.cdiv(members, chunk)
    group, part_of_group = tl.program_id(1) // chunks, tl.program_id(1) % chunks
    is_position = s < size
    position = n * inverse_n + group * inverse_g + s * inverse_s
    total = tl.zeros((TILE_S,), tl.float32)
    row = sums + tl.program_id(0).to(tl.int64) * (2 + OPERATOR) * filters
    for first in range(part_of_group * chunk, tl.minimum((part_of_group + 1) * chunk, members), TILE_O):
        member = first + tl.arange(0, TILE_O)
        is_one = member < members
        o = group * members + member
        mask = is_one[:, None] & is_position[None, :]
        offset = n * stride_n + o[:, None] * stride_o + s[None, :] * stride_s
        from_grad = n * grad_n + o[:, None] * grad_o + s[None, :] * grad_s
        part = tl.load(gradient + from_grad, mask=mask, other=0.0).to(tl.float32)
        answer = tl.load(saved + offset, mask=mask, other=0.0).to(tl.float32)
        if ALONE:
            places = n * inverse_n + o[:, None] * inverse_g + s[None, :] * inverse_s
            scale = tl.load(inverse + places, mask=mask, other=0.0)
        else:
            scale = tl.load(inverse + position, mask=is_position, other=0.0)[None, :]
        tl.store(row + o, tl.sum(part, 1), mask=is_one)
        if OPERATOR == 0:
            if HAS_BIAS:
                answer = answer - tl.load(bias + o, mask=is_one, other=0.0)[:, None]
            cosine, slope = answer, part
        else:
            tl.store(row + 2 * filters + o, tl.sum(part * answer, 1), mask=is_one)
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
                tl.store(row + 3 * filters + o, tl.sum(rise * y, 1), mask=is_one)
                angle, slope = y / sharp, rise * sharp * end
                angle = tl.where(angle > HALF_PI, HALF_PI, tl.where(angle < -HALF_PI, -HALF_PI, angle))
            cosine = tl.sin(angle)
            square = 1.0 - cosine * cosine
            slope = slope / tl.sqrt(tl.where(square < step, step, square))
        both = tl.where(mask, cosine * slope, 0.0)
        if ALONE:
            tl.store(along + places, both, mask=mask)
        else:
            total += tl.sum(both, 0)
        tl.store(row + filters + o, tl.sum(both, 1), mask=is_one)
        if HAS_LENGTH:
            slope = slope * tl.load(length + o, mask=is_one, other=0.0)[:, None]
        if HAS_GAIN and OPERATOR == 0:  # not in ``part``: the output of the cosine holds it already
            slope = slope * tl.load(gain + o, mask=is_one, other=0.0)[:, None]
        slope = slope * scale
        slope = tl.where(slope > largest, largest, tl.where(slope < -largest, -largest, slope))
        tl.store(by_product + offset, slope.to(by_product.dtype.element_ty), mask=mask)
    if not ALONE:
        tl.store(along + part_of_group * along_chunk + position, total, mask=is_position)


def works(device: str = "cuda") -> bool:
    """Whether one small layer by the kernels, there and back, is what float64 and autograd make of its formula.

    Whatever the compiler raises comes through.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        return answers_agree(device)


def answers_agree(device: str) -> bool:
    generator, k, eps, window = torch.Generator().manual_seed(0), 0.4, 1e-6, ([1, 1], [1, 1], [1, 1])
    x, weight, gradient = (torch.randn(*n, generator=generator) for n in ((2, 3, 6, 5), (4, 3, 3, 3), (2, 4, 6, 5)))
    exact = x.double().requires_grad_()
    energy_there = F.conv2d(exact.square(), torch.ones(1, 3, 3, 3, dtype=torch.float64), padding=1)
    length_there = (weight.double().square().sum((1, 2, 3)) + eps).sqrt().reshape(-1, 1, 1)
    cosine = F.conv2d(exact, weight.double(), padding=1) / ((energy_there + eps).sqrt() * length_there)
    truth = torch.tanh(torch.asin(cosine) / (2.0 * k)) / math.tanh(math.pi / (4.0 * k))
    (by_hand,) = torch.autograd.grad(truth, exact, gradient.double())

    x, weight, gradient = (part.to(device) for part in (x, weight, gradient))
    inverse, length = patch_inverse_norm(x, (3, 3), *window, 1, eps), inverse_lengths(weight, eps)
    product = F.conv2d(x, weight, padding=1)
    answer = normalise_and_respond_(product, inverse, length, "sigmoid", k, None, None)
    by_product, along, _ = respond_backward(gradient, answer, inverse, length, "sigmoid", k, None, None)
    by_x = F.conv_transpose2d(by_product, weight, padding=1)
    subtract_along_(by_x, x, along, inverse, (3, 3), *window)
    pairs = ((answer, truth), (by_x, by_hand))
    return all(torch.allclose(one.double().cpu(), other.detach(), rtol=2e-2, atol=2e-2) for one, other in pairs)


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


@on_its_device
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
    norms, _, inverse_strides = as_rows(inverse)
    filters, groups = product.shape[1], inverse.shape[1]
    steep, factor = constants(operator, k, filters, inverse)
    guard = 1.0 if operator == "cosine" else 1.0 - torch.finfo(torch.float32).eps
    positions, across = tile(size, filters, strides[1])
    grid = (images(product) * triton.cdiv(size, positions), triton.cdiv(filters, across))
    forward_kernel[grid](
        flat, norms, by_filter(length, filters, inverse), steep, factor, by_filter(gain, filters, inverse),
        by_filter(bias, filters, inverse), size, filters, filters // groups, *strides, *inverse_strides, guard,
        OPERATOR=CODES[operator], HAS_LENGTH=length is not None, HAS_GAIN=gain is not None,
        HAS_BIAS=bias is not None, HAS_GROUPS=groups > 1, TILE_S=positions, TILE_O=across,
    )  # fmt: skip
    return product


@on_its_device
def respond_backward(
    gradient: Tensor,
    saved: Tensor,
    inverse: Tensor,
    length: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradient by the product, the sum along each patch (N, G, ...), and sums by filter, (O,) each.

    Those are of the gradient, along the filter, and but for the cosine with the response and for k.
    """
    flat, size, strides = as_rows(saved)
    from_flat, _, grad_strides = as_rows(gradient)
    inverse = inverse if is_dense(inverse) else inverse.contiguous()
    norms, _, inverse_strides = as_rows(inverse)
    filters, groups, code = saved.shape[1], inverse.shape[1], CODES[operator]
    steep, factor = constants(operator, k, filters, inverse)
    by_product = torch.empty_like(saved)
    out_flat, _, out_strides = as_rows(by_product)
    assert out_strides == strides
    is_alone = groups == filters > 1
    members = filters if is_alone else filters // groups
    positions, across = tile(size, members, strides[1])
    tiles, parts = images(saved) * triton.cdiv(size, positions), 1 if is_alone else groups
    chunk = across if is_alone else chunk_of(members, across, tiles * parts)
    chunks = triton.cdiv(members, chunk)
    copies = 1 if is_alone else chunks
    along = torch.empty_strided(
        (copies, *inverse.shape), (inverse.numel(), *inverse.stride()), dtype=torch.float32, device=saved.device
    )
    sums = torch.empty((tiles, 2 + code, filters), dtype=torch.float32, device=saved.device)
    backward_kernel[(tiles, parts * chunks)](
        from_flat, flat, norms, by_filter(length, filters, inverse), steep, factor,
        by_filter(gain, filters, inverse), by_filter(bias, filters, inverse), out_flat, along, sums,
        size, filters, members, chunk, *grad_strides, *strides, *inverse_strides, inverse.numel(),
        torch.finfo(saved.dtype).eps, torch.finfo(saved.dtype).max,
        OPERATOR=code, HAS_LENGTH=length is not None, HAS_GAIN=gain is not None,
        HAS_BIAS=bias is not None, ALONE=is_alone, TILE_S=positions, TILE_O=across,
    )  # fmt: skip
    return by_product, along[0] if copies == 1 else along.sum(0), list(sums.sum(0).unbind(0))


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
