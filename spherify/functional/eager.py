"""SphereConv's product as eager mode calls it: an autograd function around the CPU's kernels or the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spherify.functional import cpu_kernels, cpu_product
from spherify.functional.blocks import Softness, by_k
from spherify.functional.filters import like
from spherify.functional.fused import (
    backward,
    fast_backward,
    is_safe_divisor,
    keep,
    product_and_rest,
    set_up,
    taken_from,
)


class SphereProduct(torch.autograd.Function):
    """The operator as eager mode calls it: without the dispatcher, which costs a small layer dearly.

    On the CPU in float32 by the kernels of ``cpu_kernels``; anything else by the code of ``sphere_product``.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        found = by_cpu_kernels(*inputs, keeps=True)
        if found is None:
            output = product_and_rest(*inputs)
            set_up(ctx, inputs, output)
            ctx.length = None
            return output[0]
        x, weight, bias, gain, k, *ctx.numbers = inputs
        keep(ctx, cpu_product.to_keep(found, weight, ctx.numbers[4]))
        ctx.is_response = found.response is not None
        ctx.length = found.length
        ctx.save_for_backward(x, weight, bias, gain, k, cpu_product.norms_to_keep(found))
        return found.out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.length is None or torch.is_grad_enabled():
            return backward(ctx, *gradients)
        return *backward_by_cpu_kernels(ctx, gradients[0], *ctx.saved_tensors), *[None] * len(ctx.numbers)


def by_cpu_kernels(*inputs: Any, keeps: bool = False) -> cpu_product.Product | None:
    """The arguments of ``product_and_rest``; None where the kernels do not serve."""
    x, weight, bias, gain, k, stride, padding, dilation, groups, operator, fixed_k, eps, compute = inputs
    if not cpu_product.serves(x, weight, (bias, gain, k), groups, compute):
        return None
    window = cpu_product.Window(stride, padding, dilation, groups)
    softness = fixed_k or None if k is None else k
    return cpu_product.forward(x, weight, bias, gain, softness, operator, eps, window, keeps=keeps)


def sphere_product_forward(*inputs: Any) -> Tensor:
    """The output alone, where no gradient is wanted."""
    found = by_cpu_kernels(*inputs)
    return product_and_rest(*inputs)[0] if found is None else found.out


def backward_by_cpu_kernels(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    k: Tensor | None,
    inverse: Tensor | None,
) -> list[Tensor | None]:
    *numbers, operator, fixed_k, eps, _ = ctx.numbers
    window = cpu_product.Window(*numbers)
    needs_x, needs_weight, needs_bias, needs_gain, needs_k = ctx.needs_input_grad[:5]
    is_cosine = operator == "cosine"
    if is_cosine and gain is not None and not is_safe_divisor(gain):
        out, inverse, _ = product_and_rest(x, weight, bias, gain, k, *ctx.numbers)
        return fast_backward(ctx, gradient, out, x, weight, bias, gain, k, inverse)
    answer = taken_from(ctx)
    if answer is None and ctx.version is not None:
        again = by_cpu_kernels(x, weight, bias, gain, k, *ctx.numbers, keeps=True)
        assert again is not None
        answer = cpu_product.to_keep(again, weight, operator)
    values = dict(gain=gain, **cpu_kernels.constants(operator, fixed_k or None if k is None else k))
    if not ctx.is_response:
        values |= dict(offset=bias, unscale=None if is_cosine or gain is None else 1.0 / gain)
    found = cpu_product.backward(
        gradient, answer, x, weight, inverse, ctx.length, eps, values, operator, window,
        needs_x, needs_weight or (needs_gain and is_cosine),
    )  # fmt: skip
    by_gain, by_k = None, None
    if needs_gain and gain is not None:
        by_gain = found.along_filter / gain if is_cosine else found.with_response
    if needs_k:
        by_k = k_gradient(found, k, gain)
    return [
        found.x,
        found.weight if needs_weight else None,
        like(found.total, bias, needs_bias),
        like(by_gain, gain, needs_gain),
        like(by_k, k, needs_k),
    ]


def k_gradient(found: cpu_product.Gradients, k: Tensor | None, gain: Tensor | None) -> Tensor | None:
    """(O,)."""
    softness = Softness.of(k)
    if softness is None or k is None:
        return None
    factor = found.with_response if gain is None else found.with_response * gain.flatten()
    return by_k(found.for_k, factor, softness)
