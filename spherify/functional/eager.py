"""SphereConv's product as eager mode calls it: an autograd function around the CPU's kernels or the fused operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spherify.functional import cpu_kernels, cpu_training
from spherify.functional.filters import like
from spherify.functional.fused import backward, fast_backward, keep, product_and_rest, set_up, taken_from


class SphereProduct(torch.autograd.Function):
    """The operator as eager mode calls it: without the dispatcher, which costs a small layer dearly.

    On the CPU in float32 by the kernels of ``cpu_training``; anything else by the code of ``sphere_product``.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        by_kernels = by_cpu_kernels(*inputs, keeps=True)
        if by_kernels is None:
            output = product_and_rest(*inputs)
            set_up(ctx, inputs, output)
            ctx.way = None
            return output[0]
        ctx.way, found = by_kernels
        x, weight, bias, gain, k, *ctx.numbers = inputs
        keep(ctx, found.answer)
        ctx.is_response, ctx.terms, ctx.divides = found.is_response, found.terms, found.divides
        ctx.save_for_backward(x, weight, bias, gain, k, found.inverse)
        return found.out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.way is None or torch.is_grad_enabled():
            return backward(ctx, *gradients)
        return *backward_by_cpu_kernels(ctx, gradients[0], *ctx.saved_tensors), *[None] * len(ctx.numbers)


def by_cpu_kernels(*inputs: Any, keeps: bool = False) -> tuple[cpu_training.Way, cpu_training.Product] | None:
    """The arguments of ``product_and_rest``; None where the kernels do not serve."""
    x, weight, bias, gain, k, *numbers, compute = inputs
    given = cpu_training.Given(x, weight, bias, gain, k)
    return cpu_training.forward(given, cpu_training.Call(*numbers), compute, keeps=keeps)


def sphere_product_forward(*inputs: Any) -> Tensor:
    """The output alone, where no gradient is wanted."""
    by_kernels = by_cpu_kernels(*inputs)
    return product_and_rest(*inputs)[0] if by_kernels is None else by_kernels[1].out


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
    needs_x, needs_weight, needs_bias, needs_gain, needs_k = ctx.needs_input_grad[:5]
    is_cosine = ctx.numbers[4] == "cosine"
    if is_cosine and gain is not None and not ctx.divides:
        out, inverse, _ = product_and_rest(x, weight, bias, gain, k, *ctx.numbers)
        return fast_backward(ctx, gradient, out, x, weight, bias, gain, k, inverse)
    answer = taken_from(ctx)
    if answer is None and ctx.version is not None:
        again = by_cpu_kernels(x, weight, bias, gain, k, *ctx.numbers, keeps=True)
        assert again is not None
        answer = again[1].answer
    ready = (cpu_kernels.by_filter(value, ctx.way.filters) for value in (bias, gain, k))
    found = ctx.way.backward(
        gradient,
        cpu_training.Given(x, weight, *ready),
        answer,
        ctx.is_response,
        inverse,
        ctx.terms,
        needs_x,
        needs_weight or (needs_gain and is_cosine),
    )
    leaves = zip((bias, gain, k), (needs_bias, needs_gain, needs_k), strict=True)
    by_filter = (
        like(found.by_filter[row], leaf, True) if needed else None for row, (leaf, needed) in enumerate(leaves)
    )
    return [found.x, found.weight if needs_weight else None, *by_filter]
