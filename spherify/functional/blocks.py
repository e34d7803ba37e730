"""The elementwise part of SphereConv block by block in place: forward, and backward from its output alone.

Everything is written for tensors (N, O, ...) with any number of trailing dimensions, none for linear layers. A block
is a few images, small enough to stay in a core's cache from the first pass over it to the last.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 16  # numbers; with the backward pass's half dozen of temporaries, a core's second-level cache


def blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension; on accelerators one, since each pass there is a launch."""
    images = x.shape[0]
    step = images if x.device.type != "cpu" else max(1, BLOCK * torch.get_num_threads() // max(1, x[:1].numel()))
    for start in range(0, images, max(1, step)):
        yield slice(start, start + step)


def wide_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The kernels for CUDA, if triton is there, can serve this GPU, and SPHERIFY_TRITON is not 0."""
    if os.environ.get("SPHERIFY_TRITON") == "0":
        return None
    try:
        kernels = importlib.import_module("spherify.functional.triton_kernels")
        if kernels.works():
            return kernels
        reason = "they compute other numbers than they should"
    except ImportError:
        return None
    except Exception as error:  # the compiler's own, of many kinds
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"spherify's Triton kernels do not run here and plain operations stand in ({reason}).", stacklevel=2)
    return None


def kernels_for(*tensors: Tensor) -> Any:
    """The module of kernels, where all of these can be given to it, else None."""
    if not tensors[0].is_cuda:
        return None
    kernels = triton_kernels()
    return kernels if kernels is not None and all(map(kernels.takes, tensors)) else None


def energy_of(x: Tensor, groups: int) -> Tensor:
    """Sum of squares over the channels of each group: (N, C, ...) to (N, G, ...), in float32 or wider."""
    channels = x.shape[1]
    if groups < channels and (kernels := kernels_for(x)) is not None:
        return kernels.energy(x, groups)
    if groups == channels:
        wide = x.to(wide_type(x.dtype))
        return wide * wide
    energy = x.new_empty((x.shape[0], groups, *x.shape[2:]), dtype=wide_type(x.dtype))
    for block in blocks(x):
        part = x[block]
        squares = part * part if part.dtype == energy.dtype else part.to(energy.dtype).square_()
        grouped = squares.unflatten(1, (groups, channels // groups))
        torch.sum(grouped, 2, out=energy[block])
    return energy


@dataclass(frozen=True)
class Softness:
    """k of the sigmoid, and the number that brings its ends to +-1; numbers, or tensors (O, 1, ...)."""

    k: float | Tensor
    end: float | Tensor

    @classmethod
    def of(cls, k: float | Tensor | None) -> Softness | None:
        if k is None:
            return None
        return cls(k, torch.tanh(math.pi / (4.0 * k)) if isinstance(k, Tensor) else math.tanh(math.pi / (4.0 * k)))


def respond_(
    cosine: Tensor, operator: str, softness: Softness | None, gain: Tensor | None, bias: Tensor | None
) -> Tensor:
    """g(cosine) gain + bias, in place."""
    if operator == "cosine":
        cosine.clamp_(-1.0, 1.0)
    else:
        guard = 1.0 - torch.finfo(cosine.dtype).eps
        cosine.clamp_(-guard, guard).asin_()
        if softness is None:
            cosine.mul_(2.0 / math.pi)
        else:
            cosine.mul_(0.5 / softness.k).tanh_().mul_(1.0 / softness.end)
    if gain is not None:
        cosine.mul_(gain)
    return cosine if bias is None else cosine.add_(bias)


def grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, x.shape[1] // groups))


def normalise_and_respond_(
    product: Tensor,
    inverse_norm: Tensor,
    inverse_length: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The response to ``product * inverse_norm``, written into ``product``.

    Args:
        product: (N, O, ...) of any floating type.
        inverse_norm: (N, G, ...) in float32 or wider.
        inverse_length: of the filters, where ``product`` is not by unit filters.
        k, gain, bias: numbers, or tensors that broadcast as (O, 1, ...).
    """
    if (kernels := kernels_for(product)) is not None:
        return kernels.normalise_and_respond_(product, inverse_norm, inverse_length, operator, k, gain, bias)
    softness, groups = Softness.of(k), inverse_norm.shape[1]
    for block in blocks(product):
        part, inverse = product[block], inverse_norm[block].unsqueeze(2)
        if part.dtype == inverse_norm.dtype:
            grouped(part, groups).mul_(inverse)
            if inverse_length is not None:
                part.mul_(inverse_length)
            respond_(part, operator, softness, gain, bias)
        else:
            wide = (grouped(part, groups) * inverse).flatten(1, 2)
            wide = wide if inverse_length is None else wide.mul_(inverse_length)
            part.copy_(respond_(wide, operator, softness, gain, bias))
    return product


@dataclass
class Gradients:
    """What the backward pass of the elementwise part finds.

    Attributes:
        product: (N, O, ...) in the type of the output.
        along: (N, G, ...): sum over the filters of the gradient by the cosine times the cosine.
        along_filter: (O,): the same summed over the patches.
        bias, gain, k: (O,), in float32 or wider; gain and k are None for the cosine.
    """

    product: Tensor
    along: Tensor
    along_filter: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None
    k: Tensor | None = None


def respond_backward(
    gradient: Tensor,
    saved: Tensor,
    inverse_norm: Tensor,
    inverse_length: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients from what the forward pass left.

    Args:
        saved: for the cosine the output, gain and bias included; else the response before gain and bias.
        needs: whether the gradients by input, weight, bias, gain and k are wanted.
    """
    _, _, needs_bias, _, needs_k = needs
    softness = Softness.of(k)
    if (kernels := kernels_for(saved, gradient)) is not None:
        product, along, by_filter = kernels.respond_backward(
            gradient, saved, inverse_norm, inverse_length, operator, k, gain, bias
        )
        found = Gradients(product, along, by_filter[1])
    else:
        found, by_filter = backward_by_blocks(
            gradient, saved, inverse_norm, inverse_length, operator, softness, gain, bias, needs
        )
    found.bias = by_filter[0] if needs_bias else None
    if operator != "cosine":
        found.gain = by_filter[2]
        if needs_k and softness is not None:
            factor = by_filter[2] if gain is None else by_filter[2] * gain.flatten()
            found.k = by_k(by_filter[3], factor, softness)
    return found


def backward_by_blocks(
    gradient: Tensor,
    saved: Tensor,
    inverse_norm: Tensor,
    inverse_length: Tensor | None,
    operator: str,
    softness: Softness | None,
    gain: Tensor | None,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Gradients, Tensor]:
    """By plain operations; and sums by filter, (4, O): of the gradient, along the filter, with the response, for k."""
    _, _, needs_bias, needs_gain, needs_k = needs
    groups, filters = inverse_norm.shape[1], saved.shape[1]
    wide = inverse_norm.dtype
    by_filter = inverse_norm.new_zeros(4, filters)
    found = Gradients(torch.empty_like(saved), torch.empty_like(inverse_norm), by_filter[1])
    factor = inverse_length
    if operator == "cosine" and gain is not None:
        factor = gain if factor is None else factor * gain
    others = [0, *range(2, saved.dim())]
    largest = torch.finfo(saved.dtype).max
    for block in blocks(saved):
        inverse, part, answer = inverse_norm[block].unsqueeze(2), gradient[block].to(wide), saved[block].to(wide)
        if needs_bias:
            by_filter[0] += part.sum(others)
        if operator == "cosine":
            answer = answer if bias is None else answer - bias
            cosine, slope = answer, part
        else:
            if needs_gain or needs_k:
                by_filter[2] += (part * answer).sum(others)
            part = part if gain is None else part * gain
            cosine, slope = slope_at(answer, part, softness, saved.dtype, by_filter[3] if needs_k else None)
        if any(needs):
            along = cosine * slope
            torch.sum(grouped(along, groups), 2, out=found.along[block])
            by_filter[1] += along.sum(others)
        slope = slope if factor is None else slope * factor
        if found.product.dtype == wide:
            torch.mul(grouped(slope, groups), inverse, out=grouped(found.product[block], groups))
        else:  # float16 ends at 65504, and the slope may be steep at a patch of zeros
            narrow = (grouped(slope, groups) * inverse).clamp_(-largest, largest)
            found.product[block] = narrow.flatten(1, 2)
    return found, by_filter


def slope_at(
    answer: Tensor, gradient: Tensor, softness: Softness | None, stored: torch.dtype, sum_for_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cosine whose response is ``answer``, and ``gradient`` times the response's slope there.

    A response that rounded to +-1 has no slope that its number would tell; it counts as one rounding step away.
    """
    step = torch.finfo(stored).eps
    if softness is None:
        angle = answer.mul(math.pi / 2)
        slope = gradient * (2.0 / math.pi)
    else:
        tanh = answer * softness.end
        rise = torch.addcmul(torch.ones((), dtype=tanh.dtype, device=tanh.device), tanh, tanh, value=-1).mul_(gradient)
        guard = 1.0 - torch.finfo(tanh.dtype).eps
        angle = tanh.clamp_(-guard, guard).atanh_()
        if sum_for_k is not None:
            sum_for_k += (rise * angle).sum([0, *range(2, rise.dim())])
        angle = angle.mul_(2.0 * softness.k).clamp_(-math.pi / 2, math.pi / 2)
        slope = rise.mul_(0.5 / (softness.k * softness.end))
    cosine = angle.sin_()
    square = torch.addcmul(torch.ones((), dtype=cosine.dtype, device=cosine.device), cosine, cosine, value=-1)
    return cosine, slope.mul_(square.clamp_min_(step).rsqrt_())


def by_k(rise_times_angle: Tensor, answer: Tensor, softness: Softness) -> Tensor:
    """(O,) from the two sums that the derivative of tanh(a / 2k) / tanh(pi / 4k) by k is made of."""
    assert isinstance(softness.k, Tensor)
    assert isinstance(softness.end, Tensor)
    k, end = softness.k.flatten(), softness.end.flatten()
    return -rise_times_angle / (k * end) + answer * (1.0 - end * end) * (math.pi / 4.0) / (k * k * end)
