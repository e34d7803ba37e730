"""The operators that compiled graphs hold for the CPU's kernels, registered with torch; ``in_graphs`` calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spherify.functional import blocks, cpu_binding, cpu_depthwise, cpu_kernels, cpu_pointwise, cpu_rows
from spherify.functional.filters import filter_shape


def respond(
    product: Tensor, inverse: Tensor, length: Tensor, k: Tensor | None, operator: str, fixed_k: float
) -> Tensor:
    inverse = inverse if inverse.shape[1] > 1 else inverse.contiguous()
    if cpu_rows.takes(product, inverse):
        return cpu_rows.respond(product, inverse, operator, values_of(length, k, operator, fixed_k))
    out, soft = product.clone(), fixed_k or None if k is None else k
    if cpu_binding.takes(out, inverse.shape[1]) and cpu_binding.fits(out, inverse):
        values = values_of(length, k, operator, fixed_k)
        cpu_kernels.normalise_and_respond_(out, inverse, operator, values)
        return out
    shaped, soft = filter_shape(length, out, out.dtype), softness_like(soft, out)
    return blocks.normalise_and_respond_(out, inverse, shaped, operator, soft, None, None)


def respond_backward(
    gradient: Tensor,
    response: Tensor,
    inverse: Tensor,
    length: Tensor,
    k: Tensor | None,
    operator: str,
    fixed_k: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inverse = inverse if inverse.shape[1] > 1 else inverse.contiguous()
    if cpu_rows.takes(response, inverse):
        values = values_of(length, k, operator, fixed_k)
        return cpu_rows.respond_backward(gradient, response, inverse, operator, values, k is not None)
    soft = fixed_k or None if k is None else k
    if cpu_binding.takes(response, inverse.shape[1]) and cpu_binding.fits(response, inverse):
        values = values_of(length, k, operator, fixed_k)
        by_product, along, sums = cpu_kernels.respond_backward(gradient, response, inverse, operator, values)
        return by_product, along, sums[1:3].clone()
    shaped, soft = filter_shape(length, response, response.dtype), softness_like(soft, response)
    softness = blocks.Softness.of(soft)
    found, sums = blocks.backward_by_blocks(
        gradient, response, inverse, shaped, operator, softness, None, None, [True] * 5
    )
    return found.product, found.along, sums[2:].clone()


def values_of(length: Tensor, k: Tensor | None, operator: str, fixed_k: float) -> dict[str, cpu_kernels.ByFilter]:
    return dict(length=length, **cpu_kernels.constants(operator, fixed_k or None if k is None else k))


def softness_like(k: float | Tensor | None, product: Tensor) -> float | Tensor | None:
    return filter_shape(k, product, product.dtype) if isinstance(k, Tensor) else k


def depthwise_respond(
    product: Tensor,
    x: Tensor,
    length: Tensor,
    k: Tensor | None,
    operator: str,
    fixed_k: float,
    *window_and_eps: Any,
) -> Tensor:
    """``window_and_eps``: as in ``WINDOW``."""
    windowed: cpu_depthwise.Windowed = window_and_eps[:4]
    eps = window_and_eps[4]
    if cpu_depthwise.takes(x, product):
        return cpu_depthwise.respond(product, x, operator, values_of(length, k, operator, fixed_k), windowed, eps)
    x = readable(x)
    inverse = cpu_kernels.patch_inverse_norm(x, *windowed, x.shape[1], eps)
    return respond(product, inverse, length, k, operator, fixed_k)


def depthwise_backward(
    gradient: Tensor,
    response: Tensor,
    x: Tensor,
    length: Tensor,
    k: Tensor | None,
    operator: str,
    fixed_k: float,
    *window_and_eps: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    windowed: cpu_depthwise.Windowed = window_and_eps[:4]
    eps = window_and_eps[4]
    if cpu_depthwise.takes(x, response):
        values = values_of(length, k, operator, fixed_k)
        return cpu_depthwise.respond_backward(gradient, response, x, operator, values, windowed, eps, k is not None)
    given = readable(x)
    inverse = cpu_kernels.patch_inverse_norm(given, *windowed, x.shape[1], eps)
    product, along, sums = respond_backward(gradient, response, inverse, length, k, operator, fixed_k)
    by_x = cpu_kernels.subtract_along_(torch.zeros_like(given), given, along, inverse, *windowed)
    return product, by_x if by_x.stride() == x.stride() else torch.empty_like(x).copy_(by_x), sums


def readable(x: Tensor) -> Tensor:
    """As it is, or laid out as the kernels read it."""
    return x if cpu_binding.takes(x, x.shape[1]) else x.contiguous()


TERMS = "Tensor length, Tensor? k, str operator, float fixed_k"
WINDOW = "int[] window, int[] stride, int[] padding, int[] dilation, float eps"
OPERATORS: dict[
    str, tuple[str, Callable[..., Any], Callable[..., Any]]
] = {  # schema, what it does, shapes of what it gives
    "respond": (
        f"(Tensor product, Tensor inverse, {TERMS}) -> Tensor",
        respond,
        lambda product, *_: torch.empty_like(product),
    ),
    "respond_backward": (
        f"(Tensor gradient, Tensor response, Tensor inverse, {TERMS}) -> (Tensor, Tensor, Tensor)",
        respond_backward,
        lambda _, response, inverse, *__: (
            torch.empty_like(response),
            torch.empty_like(inverse),
            response.new_empty((2, response.shape[1])),
        ),
    ),
    "depthwise_respond": (
        f"(Tensor product, Tensor x, {TERMS}, {WINDOW}) -> Tensor",
        depthwise_respond,
        lambda product, *_: torch.empty_like(product),
    ),
    "depthwise_backward": (
        f"(Tensor gradient, Tensor response, Tensor x, {TERMS}, {WINDOW}) -> (Tensor, Tensor, Tensor)",
        depthwise_backward,
        lambda _, response, x, *__: (
            torch.empty_like(response),
            torch.empty_like(x),
            response.new_empty((2, response.shape[1])),
        ),
    ),
    "pointwise": (
        "(Tensor x, Tensor weight, Tensor? k, str operator, float fixed_k, float eps) -> (Tensor, Tensor, Tensor)",
        cpu_pointwise.respond,
        lambda x, weight, *_: (
            cpu_pointwise.like_rows(x, weight.shape[0]),
            x.new_empty(x.numel() // x.shape[1]),
            x.new_empty(weight.shape[0]),
        ),
    ),
    "pointwise_backward": (
        "(Tensor gradient, Tensor response, Tensor x, Tensor weight, Tensor norms, Tensor lengths, Tensor? k, "
        "str operator, float fixed_k, bool[4] by) -> (Tensor, Tensor, Tensor, Tensor)",
        cpu_pointwise.respond_backward,
        lambda _, __, x, weight, *others: cpu_pointwise.shapes_of_gradients(x, weight, others[-1]),
    ),
    "pointwise_by_filters": (
        "(Tensor by_product, Tensor x, Tensor weight, Tensor lengths) -> Tensor",
        cpu_pointwise.by_filters,
        lambda _, x, weight, __: x.new_empty(weight.shape),
    ),
}


def register() -> None:
    """Once in a process, also where this module is imported anew. Of any layout: the kernels read those of the CPU."""
    for name, (schema, function, shapes) in OPERATORS.items():
        if hasattr(torch.ops.spherify, name):
            continue
        tags = () if name.endswith("backward") else (torch.Tag.flexible_layout,)
        torch.library.define(f"spherify::{name}", schema, tags=tags)
        torch.library.impl(f"spherify::{name}", "CPU", function)
        torch.library.register_fake(f"spherify::{name}", shapes)


register()
ours = torch.ops.spherify
