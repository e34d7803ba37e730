"""The linear part of SphereConv and its transpose: filters with their lengths, the product, the window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.functional.blocks import grouped, kernels_for, wide_type
from spherify.functional.cosine import CONVOLUTIONS, box_sum, unit_filters

MANY_MAPS = 8


def filter_shape(value: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(O,) or one number, shaped to broadcast as (O, 1, ...) against (N, O, ...)."""
    return None if value is None else value.to(dtype).reshape(-1, *[1] * (like.dim() - 2))


def rows_of(value: Tensor | None, weight: Tensor) -> Tensor:
    """(O,) shaped to broadcast against the weight."""
    assert value is not None
    return value.to(wide_type(weight.dtype)).reshape(-1, *[1] * (weight.dim() - 1))


def like(gradient: Tensor | None, leaf: Tensor | None, is_needed: bool) -> Tensor | None:
    """The gradient in the shape and type of what it is the gradient by; one number for all filters takes their sum."""
    if gradient is None or leaf is None or not is_needed:
        return None
    if gradient.shape == leaf.shape and gradient.dtype == leaf.dtype:
        return gradient
    total = gradient.sum() if leaf.numel() == 1 else gradient
    return total.reshape(leaf.shape).to(leaf.dtype)


def inverse_lengths(weight: Tensor, eps: float) -> Tensor:
    """(O,): 1 / |w| of each filter, in float32 or wider."""
    if (kernels := kernels_for(weight)) is not None:
        return kernels.inverse_lengths(weight, eps)
    rows = weight.flatten(1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=wide_type(weight.dtype)).square_().add_(eps).rsqrt_()


def filters_for(
    weight: Tensor, inverse_norm: Tensor, eps: float, compute: torch.dtype
) -> tuple[Tensor, Tensor | None, float]:
    """What the input is multiplied by, and by what the product is to be multiplied: filter by filter, and as a whole.

    Where the output is small against the weight it is the output that is divided by the filters' lengths: one pass
    in place of three over the weight; with the GPU's kernels it costs nothing anywhere. Not in float16, whose range
    asks for unit filters.
    """
    positions = inverse_norm.numel() // max(1, inverse_norm.shape[1])
    is_small = positions * weight.shape[0] <= 2 * weight.numel()
    if compute != torch.float16 and (is_small or kernels_for(weight) is not None):
        return weight, inverse_lengths(weight, eps), 1.0
    unit, power = unit_filters(weight, eps=eps)
    return unit, None, power


def multiply(
    x: Tensor, filters: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    if filters.dim() == 2:
        return F.linear(x, filters)
    return CONVOLUTIONS[filters.dim() - 2](x, filters, None, stride, padding, dilation, groups)


def multiply_backward(
    gradient: Tensor,
    x: Tensor,
    filters: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs_x: bool,
    needs_filters: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if not (needs_x or needs_filters):
        return None, None
    if filters.dim() == 2:
        return gradient @ filters if needs_x else None, gradient.t() @ x if needs_filters else None
    mask = [needs_x, needs_filters, False]
    zeros = [0] * len(stride)
    by_x, by_filters, _ = torch.ops.aten.convolution_backward(
        gradient, x, filters, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return by_x, by_filters


def by_direction_(
    by_filters: Tensor, weight: Tensor, along: Tensor, eps: float, power: float, length: Tensor | None
) -> Tensor:
    """The gradient by the weight from that by the filters of ``filters_for``, in place.

    A filter's length does not matter: what the gradient has along the filter, ``along`` in all, is taken off.
    """
    inverse = inverse_lengths(weight, eps) if length is None else length
    if length is None:
        by_filters.mul_(rows_of(inverse / power, weight))
    factor = rows_of(inverse.square() * along.to(inverse.dtype), weight)
    if weight.dtype == by_filters.dtype:
        return by_filters.addcmul_(weight, factor, value=-1)
    return by_filters.sub_(weight * factor).to(weight.dtype)


def sums_by_convolution(x: Tensor, window: Sequence[int]) -> bool:
    """Whether many maps are summed faster by a depthwise convolution with ones than slice by slice: on the CPU.

    Not where autocast, TF32 or their like could reach it.
    """
    precision = getattr(getattr(torch.backends.mkldnn, "conv", None), "fp32_precision", "none")
    if torch.is_autocast_enabled("cpu") or precision not in ("none", "ieee"):
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and len(window) == 2 and x.shape[1] >= MANY_MAPS


def window_sum(
    energy: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Padding and ``box_sum``: (N, G, H, W) to (N, G, P, Q)."""
    if max(window, default=1) > 1 and sums_by_convolution(energy, window):
        maps = energy.shape[1]
        return F.conv2d(energy, energy.new_ones(maps, 1, *window), None, stride, padding, dilation, maps)
    if any(padding):
        energy = F.pad(energy, [number for number in reversed(padding) for _ in range(2)])
    return box_sum(energy, window, stride, dilation)


def spread_over_window(
    x: Tensor,
    sizes: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The transpose of padding and ``box_sum``: (N, G, P, Q) to (N, G, H, W), each patch's number on all its pixels."""
    if max(window, default=1) > 1 and sums_by_convolution(x, window):
        maps = x.shape[1]
        beyond = [
            sizes[axis]
            + 2 * padding[axis]
            - (x.shape[2 + axis] - 1) * stride[axis]
            - dilation[axis] * (window[axis] - 1)
            - 1
            for axis in range(2)
        ]
        return F.conv_transpose2d(x, x.new_ones(maps, 1, *window), None, stride, padding, beyond, maps, dilation)
    first = x.dim() - len(window)
    for axis in reversed(range(len(window))):
        size, step, gap, dim = window[axis], stride[axis], dilation[axis], first + axis
        if size == 1 and step == 1 and padding[axis] == 0:
            continue
        shape = list(x.shape)
        shape[dim] = sizes[axis] + 2 * padding[axis]
        spread = x.new_zeros(shape)
        reach = (x.shape[dim] - 1) * step + 1
        for offset in range(0, gap * size, gap):
            spread.narrow(dim, offset, reach)[(slice(None),) * dim + (slice(None, None, step),)].add_(x)
        x = spread.narrow(dim, padding[axis], sizes[axis])
    return x


def subtract_along_(by_x: Tensor, x: Tensor, along: Tensor) -> Tensor:
    """``by_x - x * along``, in place."""
    groups = along.shape[1]
    if by_x.dtype == along.dtype == x.dtype:
        grouped(by_x, groups).addcmul_(grouped(x, groups), along.unsqueeze(2), value=-1)
        return by_x
    step = (grouped(x, groups) * along.unsqueeze(2)).flatten(1, 2)
    return by_x.sub_(step)
