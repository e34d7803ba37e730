"""The gradient by a filter's direction under ``torch.compile``: what it has along the filter is taken off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spherify.functional import cpu_binding, cpu_kernels
from spherify.functional.precision import type_of_product, widened

EARLY_FROM = 1 << 16  # numbers of a weight below which a call of its own costs more than waiting does


class AcrossFilters(torch.autograd.Function):
    """The filters as they are; what their gradient has along a filter is taken off, as its length does not matter."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, inverse_length: Tensor) -> Tensor:
        ctx.save_for_backward(weight, inverse_length)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return across(gradient, *ctx.saved_tensors), None


class AcrossFiltersEarly(torch.autograd.Function):
    """As ``AcrossFilters``, with the gradient by the input held back until that by the weight is done.

    Left to itself, Inductor puts the last step of every weight's gradient off to the end of the backward pass, and
    holds each weight's channels-last copy until then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inverse_length: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, inverse_length)
        return x.view_as(x), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor, by_weight: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        take_off_along_(by_weight, by_x, *ctx.saved_tensors)
        return by_x, by_weight, None


class Written(torch.autograd.Function):
    """A tensor as it is, which the compiler is to write before it is read.

    Inlined into the pass over the output, a product of two numbers by filter counts as one more tensor read there; from
    five on Inductor writes the output before an activation reads it, and a (N, H, W, D) one as an image at that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.as_strided(x.shape, x.stride())  # only what lies in memory has strides

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def input_and_filters(x: Tensor, weight: Tensor, inverse_length: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``weight`` as they are, but for the weight's gradient, which is across the filters.

    Args:
        x: (N, C, ...).
        weight: (O, C/G, ...).
        inverse_length: (O,), 1 / |filter|.
    """
    is_early = weight.dim() > 2 and weight.numel() >= EARLY_FROM and weight.dtype == torch.float32
    is_here = x.device.type == "cpu" and x.requires_grad
    if is_early and is_here and type_of_product(x, weight) == torch.float32:
        return AcrossFiltersEarly.apply(x, weight, inverse_length)
    return x, AcrossFilters.apply(weight, inverse_length)


def across(gradient: Tensor, weight: Tensor, inverse_length: Tensor) -> Tensor:
    """``gradient - weight <gradient, weight> / |weight|^2``, filter by filter."""
    wide, rows = widened(gradient), widened(weight)
    along = sum_by_filter(wide * rows) * inverse_length.square()
    return (wide - rows * along.view(-1, *[1] * (weight.dim() - 1))).to(gradient.dtype)


def sum_by_filter(weight: Tensor) -> Tensor:
    """(O, ...) to (O,), without a view: of one the compiler reads a channels-last weight number by number."""
    return weight.sum(tuple(range(1, weight.dim())))


def take_off_along(by_weight: Tensor, by_x: Tensor, weight: Tensor, inverse_length: Tensor) -> None:
    """``across`` in place. ``by_x`` is left as it is: it is named so that what reads it waits."""
    if weight.numel() == 0 or not lie_alike(by_weight, weight) or cpu_binding.library() is None:
        by_weight.copy_(across(by_weight, weight, inverse_length))
        return
    rows = weight.shape[0]
    shape = (rows, weight.numel() // rows)
    by_rows, rows_of_weight = (tensor.as_strided(shape, (shape[1], 1)) for tensor in (by_weight, weight))
    cpu_kernels.subtract_own_(by_rows, rows_of_weight, inverse_length)


def lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether filters lie one behind the other, and the numbers of each in the same order."""
    layouts = (torch.contiguous_format, *([torch.channels_last] if one.dim() == 4 else []))
    return any(one.is_contiguous(memory_format=way) and other.is_contiguous(memory_format=way) for way in layouts)


def register() -> None:
    """Once in a process, also where this module is imported anew."""
    name = "spherify::take_off_along_"
    if hasattr(torch.ops.spherify, "take_off_along_"):
        return
    schema = "(Tensor(a!) by_weight, Tensor(b!) by_x, Tensor weight, Tensor inverse_length) -> ()"
    # Of any layout: asked for the one that autograd expects, the compiler would transpose weight and gradient.
    torch.library.define(name, schema, tags=(torch.Tag.flexible_layout,))
    torch.library.impl(name, "CPU", take_off_along)
    torch.library.register_fake(name, lambda *_: None)


register()
take_off_along_ = torch.ops.spherify.take_off_along_
