"""The rows that a conv or linear call multiplies its filters with, at sampled positions of its output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.functional.cosine import flat, padding_at_both_ends, per_axis
from spherify.graph.flow import CONV_FUNCTIONS

CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CONV_DEFAULTS: dict[str, Any] = dict(bias=None, stride=1, padding=0, dilation=1, groups=1)


@dataclass(frozen=True)
class Call:
    """One call of ``F.conv1d/2d/3d`` or ``F.linear``, its arguments by name."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    is_conv: bool = False

    @classmethod
    def of(cls, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        is_conv = function in CONV_FUNCTIONS
        return cls(**{**dict(zip(CONV_ARGUMENTS, args, strict=False)), **kwargs}, is_conv=is_conv)

    def window(self) -> dict[str, Any]:
        """The arguments that only a convolution has."""
        return {name: getattr(self, name) for name in CONV_ARGUMENTS[3:]} if self.is_conv else {}


def output_rows(output: Tensor, is_conv: bool) -> Tensor:
    """(N, O, P, Q) or (..., O) as (rows, O)."""
    if is_conv:
        output = output if output.dim() > 2 else output[None]
        return output.movedim(1, -1).flatten(0, -2)
    return output.flatten(0, -2) if output.dim() > 1 else output[None]


def sampled(count: int, wanted: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``wanted`` of the numbers below ``count`` in order, each at most once; all where there are no more."""
    if wanted >= count:
        return torch.arange(count, device=device)
    if count > 8 * wanted:  # draw few of many without a list of all: repeats are rare, and taken out
        drawn = torch.randint(count, (wanted + wanted // 4,), generator=generator).unique()
        return drawn[torch.randperm(len(drawn), generator=generator)[:wanted]].sort().values.to(device)
    return torch.randperm(count, generator=generator)[:wanted].sort().values.to(device)


def patch_rows(call: Call, positions: Tensor) -> Tensor:
    """The patches at the given rows of the output, group by group.

    Args:
        positions: (R,) numbers of rows in ``output_rows``.

    Returns:
        (G, R, fan_in), in the order of ``weight.flatten(1)``.
    """
    if not call.is_conv:
        rows = call.input.flatten(0, -2) if call.input.dim() > 1 else call.input[None]
        return rows[positions][None]
    dims = call.weight.dim() - 2
    x = call.input if call.input.dim() == dims + 2 else call.input[None]
    window = tuple(call.weight.shape[2:])
    stride, dilation = per_axis(call.stride, dims, "stride"), per_axis(call.dilation, dims, "dilation")
    pads = padding_at_both_ends(call.padding, window, stride, dilation)
    if any(number for pair in pads for number in pair):
        x = F.pad(x, flat(pads))
    sizes = tuple(x.shape[2:])
    maps = [
        (size - gap * (length - 1) - 1) // step + 1
        for size, length, step, gap in zip(sizes, window, stride, dilation, strict=True)
    ]
    corner, left = torch.zeros_like(positions), positions
    for axis in reversed(range(dims)):
        inner = math.prod(sizes[axis + 1 :])
        corner = corner + (left % maps[axis]) * stride[axis] * inner
        left = left // maps[axis]
    corner = corner + left * math.prod(sizes)
    offsets = torch.zeros(1, dtype=torch.long, device=x.device)
    for axis in range(dims):
        inner = math.prod(sizes[axis + 1 :])
        steps = torch.arange(window[axis], device=x.device) * dilation[axis] * inner
        offsets = (offsets[:, None] + steps).flatten()
    pixels = x.movedim(1, -1).reshape(-1, x.shape[1])  # (N H W, C)
    rows = pixels[corner[:, None] + offsets]  # (R, U V, C)
    rows = rows.unflatten(2, (call.groups, -1)).permute(2, 0, 3, 1)  # (G, R, C/G, U V)
    return rows.flatten(2)


def patch_maps(call: Call) -> Tensor | None:
    """The patches of a 2-d convolution at all places of its output, as (N, G, P Q, fan_in); None for other calls.

    The rows of ``patch_rows`` image by image, many times as fast to gather.
    """
    if not call.is_conv or call.weight.dim() != 4 or call.input.dim() != 4:
        return None
    window = tuple(call.weight.shape[2:])
    stride, dilation = per_axis(call.stride, 2, "stride"), per_axis(call.dilation, 2, "dilation")
    pads = padding_at_both_ends(call.padding, window, stride, dilation)
    x = F.pad(call.input, flat(pads))
    maps = F.unfold(x, window, dilation=dilation, stride=stride)
    return maps.unflatten(1, (call.groups, -1)).mT


def unit_rows(rows: Tensor, eps: float) -> Tensor:
    """Each row by its length, as the angular layers take it."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows * torch.rsqrt(rows.square().sum(-1, keepdim=True) + eps)
