"""The cosine between patches and filters, by one convolution and one small box sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.errors import OptionError
from spherify.functional.across import Written, input_and_filters, sum_by_filter
from spherify.functional.precision import type_of_product, widened

DEFAULT_EPS = 1e-4  # added to squared norms, inside the root, as in the authors' code

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Widen(torch.autograd.Function):
    """A cast to a wider type whose gradient comes back at the largest number of the narrow type, not as infinity.

    The gradient by the product of a patch of zeros is up to ``slope sqrt(fan_in / eps)``, which float16 cannot hold
    for a steep response; what it becomes one step further, by the input, float16 can.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, wide: torch.dtype) -> Tensor:
        return x.to(wide)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.dtype], output: Tensor) -> None:
        ctx.narrow = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = torch.finfo(ctx.narrow).max
        return gradient.clamp(-largest, largest).to(ctx.narrow), None


def widen(product: Tensor, wide: torch.dtype) -> Tensor:
    """``product`` in a type of at least ``wide``; only float16 has a range so narrow that it needs care."""
    return Widen.apply(product, wide) if product.dtype == torch.float16 else product.to(wide)


def unit_filters(weight: Tensor, *, eps: float = DEFAULT_EPS) -> tuple[Tensor, float]:
    """Filters of length one divided by a power of two near sqrt(fan-in), and that power.

    The power of two keeps the product of a float16 patch and a filter below the largest float16 for every patch
    (|<x, w>| <= |x| <= sqrt(fan-in) max|x|) and is exact, so it changes no bit elsewhere.

    Args:
        weight: (O, C/G, U, V), (O, D) or alike, of any floating type.

    Returns:
        The filters in the type of ``weight``, and the number by which their product is to be multiplied.
    """
    fan_in = math.prod(weight.shape[1:])
    power = 2.0 ** math.ceil(math.log2(math.sqrt(max(fan_in, 1))))
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    filters = wide.flatten(1)
    inverse_length = torch.rsqrt((filters * filters).sum(1) + eps) * (1.0 / power)
    unit = wide * inverse_length.view(-1, *[1] * (weight.dim() - 1))
    return unit.to(weight.dtype), power


def is_seen_through() -> bool:
    """Whether ``torch.compile`` is looking, and nobody else."""
    return torch.compiler.is_dynamo_compiling() and not torch._C._are_functorch_transforms_active()


def factors_and_lengths(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """What is multiplied with what, and by what the product is to be multiplied: filter by filter, and as a whole.

    Under ``torch.compile`` it is the product that is divided by the filters' lengths, in a pass that is made anyhow;
    unit filters would be written, kept for the gradient and differentiated. Not in float16, whose range asks for them.
    """
    if not is_seen_through() or type_of_product(x, weight) == torch.float16:
        unit, power = unit_filters(weight, eps=eps)
        return x, unit, None, power
    rows = widened(weight.detach())
    length = torch.rsqrt(sum_by_filter(rows * rows) + eps)
    needs_gradient = weight.requires_grad and torch.is_grad_enabled()
    factors = input_and_filters(x, weight, length) if needs_gradient else (x, weight)
    return *factors, length, 1.0


def box_sum(x: Tensor, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Sum over a sliding window in the last ``len(window)`` dimensions, one dimension after the other.

    Sums of shifted slices: exact in the type of ``x`` (a convolution with ones would fall to TF32 on CUDA), and the
    work per output is U + V, not U V. Nothing that is not in a window reaches its sum.

    Args:
        x: (N, G, H, W), already padded.

    Returns:
        (N, G, P, Q).
    """
    for axis, (size, step, gap) in enumerate(zip(window, stride, dilation, strict=True)):
        dim = x.dim() - len(window) + axis
        span = x.shape[dim] - gap * (size - 1)
        if size == 1 and step == 1:
            continue
        total = None
        for offset in range(0, gap * size, gap):
            shifted = x.narrow(dim, offset, span)
            if step > 1:
                shifted = shifted[(slice(None),) * dim + (slice(None, None, step),)]
            total = shifted if total is None else total + shifted
        assert total is not None
        x = total
    return x


def patch_energy(x: Tensor, groups: int) -> Tensor:
    """Sum of squares over the channels of each group, in float32 or wider.

    Args:
        x: (N, C, H, W) of any floating type.

    Returns:
        (N, G, H, W).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    energy = x * x
    channels = x.shape[1]
    if groups == 1:
        return energy.sum(1, keepdim=True)
    if groups == channels:
        return energy
    return energy.unflatten(1, (groups, channels // groups)).sum(2)


def per_axis(value: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    """One number for each spatial dimension."""
    if type(value) is tuple and len(value) == dims:  # a layer's own, at every call
        return value
    if isinstance(value, int):
        return (value,) * dims
    numbers = tuple(int(number) for number in value)
    if len(numbers) == 1:
        return numbers * dims
    if len(numbers) != dims:
        raise OptionError(f"{name}={value!r}: give one number, or {dims} of them.")
    return numbers


def padding_at_both_ends(
    padding: str | int | Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension. ``"same"`` puts the odd pixel of an even kernel last, as torch."""
    dims = len(window)
    if isinstance(padding, str):
        if padding == "valid":
            return [(0, 0)] * dims
        if padding != "same":
            raise OptionError(f"padding {padding!r} is unknown; choose 'same', 'valid' or numbers.")
        if any(step != 1 for step in stride):
            raise OptionError(f"padding 'same' needs stride 1, and stride is {tuple(stride)}.")
        totals = [gap * (size - 1) for gap, size in zip(dilation, window, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(number, number) for number in per_axis(padding, dims, "padding")]


def padded(
    x: Tensor, pads: list[tuple[int, int]], padding: str | int | Sequence[int], mode: str
) -> tuple[Tensor, list[tuple[int, int]], str | int | Sequence[int]]:
    """The input with a border as ``mode`` says, and what is left to pad with zeros."""
    if mode == "zeros" or not any(map(any, pads)):
        return x, pads, padding
    return F.pad(x, flat(pads), mode=mode), [(0, 0)] * len(pads), 0


def flat(pads: list[tuple[int, int]]) -> list[int]:
    """As ``F.pad`` wants them: the last dimension first."""
    return [number for pair in reversed(pads) for number in pair]


def conv_cosine_and_type(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    eps: float,
    scale: Tensor | None = None,
) -> tuple[Tensor, torch.dtype]:
    """``conv_cosine`` times ``scale``, (O,), and the type that the plain convolution would return (autocast: half)."""
    dims = weight.dim() - 2
    stride, dilation = per_axis(stride, dims, "stride"), per_axis(dilation, dims, "dilation")
    pads = padding_at_both_ends(padding, weight.shape[2:], stride, dilation)
    x, pads, padding = padded(x, pads, padding, padding_mode)
    multiplicand, multiplier, length, power = factors_and_lengths(x, weight, eps)
    product = CONVOLUTIONS[dims](multiplicand, multiplier, None, stride, padding, dilation, groups)
    inverse_norm = patch_inverse_norm(x, weight.shape[2:], stride, pads, dilation, groups, eps) * power

    out_type = product.dtype
    product = widen(product, inverse_norm.dtype)
    filters = weight.shape[0]
    if (factor := product_of(length, scale)) is not None:
        product = product * factor.view(-1, *[1] * dims)
    if groups in (1, filters):
        return product * inverse_norm, out_type
    grouped = product.unflatten(1, (groups, filters // groups))
    return (grouped * inverse_norm.unsqueeze(2)).flatten(1, 2), out_type


def product_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Where there is one."""
    if one is None or other is None:
        return other if one is None else one
    return Written.apply(one * other) if is_seen_through() else one * other


def patch_inverse_norm(
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    pads: list[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    eps: float,
) -> Tensor:
    """1 / |patch| by plain operations: (N, C, H, W) to (N, G, P, Q), in float32 or wider."""
    energy = patch_energy(x, groups)
    if any(map(any, pads)):
        energy = F.pad(energy, flat(pads))
    return torch.rsqrt(box_sum(energy, window, stride, dilation) + eps)


def conv_cosine(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    eps: float = DEFAULT_EPS,
) -> Tensor:
    """Cosine between each patch and each filter; a patch of zeros has cosine 0 with every filter.

    Args:
        x: (N, C, H, W), or (N, C, L) or (N, C, T, H, W) according to ``weight``.
        weight: (O, C/G, U, V). Its length does not matter beyond ``eps``, only its direction.
        padding_mode: as in ``nn.Conv2d``: zeros, reflect, replicate, circular.
        eps: added to both squared norms, inside the root.

    Returns:
        (N, O, P, Q) in float32 or wider, in [-1, 1] up to rounding. Padded zeros count in no norm, so a border
        patch is normalised over the pixels it really has.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, section 2.1.
    """
    return conv_cosine_and_type(x, weight, stride, padding, dilation, groups, padding_mode, eps)[0]


def linear_cosine_and_type(
    x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None
) -> tuple[Tensor, torch.dtype]:
    """``linear_cosine`` times ``scale``, (O,), and the type that ``F.linear`` would return (half under autocast)."""
    multiplicand, multiplier, length, power = factors_and_lengths(x, weight, eps)
    product = F.linear(multiplicand, multiplier)
    wide = widened(x)
    inverse_norm = torch.rsqrt((wide * wide).sum(-1, keepdim=True) + eps) * power
    cosine = widen(product, inverse_norm.dtype) * inverse_norm
    return cosine if (factor := product_of(length, scale)) is None else cosine * factor, product.dtype


def linear_cosine(x: Tensor, weight: Tensor, *, eps: float = DEFAULT_EPS) -> Tensor:
    """Cosine between each vector and each row of ``weight``; a vector of zeros has cosine 0 with every row.

    Args:
        x: (..., D).
        weight: (O, D).

    Returns:
        (..., O) in float32 or wider, in [-1, 1] up to rounding.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, section 2.1.
    """
    return linear_cosine_and_type(x, weight, eps)[0]
