"""How compiled graphs reach the CPU's kernels: operators whose inside the compiler does not see.

For what it makes much of: the responses with asin and tanh, which it would compute anew in each pass that reads them;
depthwise layers, whose norms are as many as the outputs and come of the patches that the convolution reads; and 1x1
convolutions, which it has multiplied image by image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.functional import blocks, cpu_binding, cpu_depthwise, cpu_pointwise
from spherify.functional.cosine import (
    CONVOLUTIONS,
    factors_and_lengths,
    flat,
    is_seen_through,
    padded,
    padding_at_both_ends,
    patch_inverse_norm,
    per_axis,
)
from spherify.functional.filters import like
from spherify.functional.graph_operators import ours
from spherify.functional.inductor import tell_inductor
from spherify.functional.precision import type_of_product

is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)  # torch 2.6 cannot be asked


@torch.compiler.assume_constant_result
def are_here() -> bool:
    """Whether the kernels can be had; asked while a graph is made."""
    tell_inductor()
    return cpu_binding.library() is not None


@torch.compiler.assume_constant_result
def can_multiply() -> bool:
    """Whether they find the product of matrices that torch has; asked while a graph is made."""
    return cpu_pointwise.sgemm() is not None


def serves(x: Tensor, weight: Tensor, operator: str, window: dict[str, Any]) -> bool:
    """Whether a layer is to go this way: its training is being compiled, on the CPU in float32, and its kind gains."""
    if not torch.compiler.is_dynamo_compiling() or is_exporting() or torch._C._are_functorch_transforms_active():
        return False
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if type_of_product(x, weight) != torch.float32 or x.numel() == 0 or x.dim() > 4 or x.dim() != weight.dim():
        return False
    groups = window.get("groups", 1)
    if is_depthwise(x, weight, groups) or (groups == 1 and operator != "cosine"):
        return are_here()
    return is_pointwise(weight, window) and are_here() and can_multiply()


def goes_without_clamp(x: Tensor, weight: Tensor) -> bool:
    """Whether the cosine's response is left as it is computed, at most a few rounding steps beyond 1.

    The clamp and its mask are a third of the arithmetic around a compiled layer; and with the gain behind it the output
    reads five tensors, from which number on the compiler writes it before an activation reads it.
    """
    if not is_seen_through() or is_exporting() or x.device.type != "cpu":
        return False
    return type_of_product(x, weight) in (torch.float32, torch.float64)


def is_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    return 1 < groups == x.shape[1] == weight.shape[0]


def is_pointwise(weight: Tensor, window: dict[str, Any]) -> bool:
    """Whether a convolution is a product of matrices, but for its stride: 1x1 on maps without padding.

    Linear layers are not asked for: the compiler knows better when to multiply for their gradients, and its passes over
    their outputs, which are made anyhow, take the cosine for nothing.
    """
    if weight.dim() != 4 or window["groups"] != 1 or weight.shape[2] != 1 or weight.shape[3] != 1:
        return False
    axes = (per_axis(window[name], 2, name) for name in ("stride", "dilation"))
    return not any(map(any, padding_at_both_ends(window["padding"], weight.shape[2:], *axes)))


def response(
    x: Tensor, weight: Tensor, operator: str, k: float | Tensor | None, eps: float, window: dict[str, Any]
) -> Tensor:
    """g(theta), before gain and bias: (N, O, ...); of ``serves`` layers.

    Args:
        window: stride, padding, dilation, groups and padding_mode; empty for linear layers.
    """
    soft, number = (k, 0.0) if isinstance(k, Tensor) else (None, k or 0.0)
    if is_pointwise(weight, window) and can_multiply():
        rows, columns = per_axis(window["stride"], 2, "stride")
        x = x if rows == columns == 1 else x[:, :, ::rows, ::columns]
        return PointwiseResponse.apply(in_rows(x), weight, soft, operator, number, eps)
    if weight.dim() == 2:
        multiplicand, multiplier, length, _ = factors_and_lengths(x, weight, eps)
        inverse = torch.rsqrt((x * x).sum(1, keepdim=True) + eps)
        product = F.linear(multiplicand, multiplier)
        return Response.apply(product, inverse, length, soft, operator, number)
    dims, sizes, groups = weight.dim() - 2, weight.shape[2:], window["groups"]
    stride, dilation = (per_axis(window[name], dims, name) for name in ("stride", "dilation"))
    pads = padding_at_both_ends(window["padding"], sizes, stride, dilation)
    x, pads, padding = padded(x, pads, window["padding"], window["padding_mode"])
    if groups == 1:
        multiplicand, multiplier, length, _ = factors_and_lengths(x, weight, eps)
        product = CONVOLUTIONS[dims](multiplicand, multiplier, None, stride, padding, dilation, groups)
        inverse = patch_inverse_norm(x, sizes, stride, pads, dilation, groups, eps)
        return Response.apply(product, inverse, length, soft, operator, number)
    if any(before != after for before, after in pads):
        x, pads = F.pad(x, flat(pads)), [(0, 0)] * dims
    described = (list(stride), [before for before, _ in pads], list(dilation))
    return DepthwiseResponse.apply(in_rows(x) if dims == 2 else x, weight, soft, operator, number, described, eps)


def in_rows(x: Tensor) -> Tensor:
    """Channels-last in the graph already: what is kept for the gradient is laid out as the graph has it."""
    return x.contiguous(memory_format=torch.channels_last)


class Response(torch.autograd.Function):
    """Response to ``product inverse length``; only itself is kept of what has its size."""

    @staticmethod
    def forward(
        ctx: Any, product: Tensor, inverse: Tensor, length: Tensor, k: Tensor | None, operator: str, fixed_k: float
    ) -> Tensor:
        response = ours.respond(product, inverse, length, k, operator, fixed_k)
        ctx.save_for_backward(response, inverse, length, k)
        ctx.operator, ctx.fixed_k = operator, fixed_k
        return response

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        response, inverse, length, k = ctx.saved_tensors
        product, along, sums = ours.respond_backward(gradient, response, inverse, length, k, ctx.operator, ctx.fixed_k)
        return product, along / inverse, None, k_gradient(sums, k, ctx.needs_input_grad[3]), None, None


class PointwiseResponse(torch.autograd.Function):
    """The whole of a 1x1 convolution, with its product, but for gain and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, k: Tensor | None, operator: str, fixed_k: float, eps: float
    ) -> Tensor:
        response, norms, lengths = ours.pointwise(x, weight, k, operator, fixed_k, eps)
        ctx.save_for_backward(response, x, weight, norms, lengths, k)
        ctx.operator, ctx.fixed_k = operator, fixed_k
        return response

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        response, x, weight, norms, lengths, k = ctx.saved_tensors
        needs_x, needs_weight, needs_k = ctx.needs_input_grad[:3]
        by = [needs_x, needs_weight, needs_k]
        by_x, by_weight, sums = ours.pointwise_backward(
            gradient, response, x, weight, norms, lengths, k, ctx.operator, ctx.fixed_k, by
        )
        by_k = k_gradient(sums, k, needs_k)
        return by_x if needs_x else None, by_weight if needs_weight else None, by_k, None, None, None


class DepthwiseResponse(torch.autograd.Function):
    """The same for depthwise layers, from input and filters: product and norms are computed within, and never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        k: Tensor | None,
        operator: str,
        fixed_k: float,
        window: cpu_depthwise.Windowed,
        eps: float,
    ) -> Tensor:
        response = ours.depthwise(x, weight, k, operator, fixed_k, *window, eps)
        ctx.save_for_backward(response, x, weight, k)
        ctx.operator, ctx.fixed_k, ctx.window, ctx.eps = operator, fixed_k, window, eps
        return response

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        response, x, weight, k = ctx.saved_tensors
        needs_x, _, needs_k, *_ = ctx.needs_input_grad
        by_x, by_weight, sums = ours.depthwise_backward(
            gradient, response, x, weight, k, ctx.operator, ctx.fixed_k, *ctx.window, ctx.eps, needs_x
        )
        return by_x if needs_x else None, by_weight, k_gradient(sums, k, needs_k), None, None, None, None


def k_gradient(sums: Tensor, k: Tensor | None, is_needed: bool) -> Tensor | None:
    if k is None or not is_needed:
        return None
    softness = blocks.Softness.of(k)
    assert softness is not None
    return like(blocks.by_k(sums[1], sums[0], softness), k, is_needed)
