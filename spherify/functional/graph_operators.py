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
    if (found := cpu_rows.respond(product, inverse, length, k, operator, fixed_k)) is not None:
        return found
    if inverse.shape[1] == 1 and not inverse.is_contiguous():
        return respond(product, inverse.contiguous(), length, k, operator, fixed_k)
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
    if (by_rows := cpu_rows.respond_backward(gradient, response, inverse, length, k, operator, fixed_k)) is not None:
        return by_rows
    if inverse.shape[1] == 1 and not inverse.is_contiguous():
        return respond_backward(gradient, response, inverse.contiguous(), length, k, operator, fixed_k)
    soft = fixed_k or None if k is None else k
    if cpu_binding.takes(response, inverse.shape[1]) and cpu_binding.fits(response, inverse):
        values = values_of(length, k, operator, fixed_k)
        by_product, along, sums = cpu_kernels.respond_backward(gradient, response, inverse, operator, values)
        return by_product, along, sums[1:3].clone() if k is not None else sums[:0]
    shaped, soft = filter_shape(length, response, response.dtype), softness_like(soft, response)
    softness = blocks.Softness.of(soft)
    found, sums = blocks.backward_by_blocks(
        gradient, response, inverse, shaped, operator, softness, None, None, [True] * 5
    )
    return found.product, found.along, sums[2:].clone() if k is not None else sums[:0]


def values_of(length: Tensor, k: Tensor | None, operator: str, fixed_k: float) -> dict[str, cpu_kernels.ByFilter]:
    return dict(length=length, **cpu_kernels.constants(operator, fixed_k or None if k is None else k))


def softness_like(k: float | Tensor | None, product: Tensor) -> float | Tensor | None:
    return filter_shape(k, product, product.dtype) if isinstance(k, Tensor) else k


def depthwise(
    x: Tensor, weight: Tensor, k: Tensor | None, operator: str, fixed_k: float, *window_and_eps: Any
) -> Tensor:
    """``window_and_eps``: as in ``WINDOW``."""
    *window, eps = window_and_eps
    soft = fixed_k or None if k is None else k
    given, filters = as_images(x), weight.unsqueeze(2) if x.dim() == 3 else weight
    return as_given(cpu_depthwise.respond(given, filters, operator, soft, of_images(x, window), eps), x, given)


def depthwise_backward(
    gradient: Tensor,
    response: Tensor,
    x: Tensor,
    weight: Tensor,
    k: Tensor | None,
    operator: str,
    fixed_k: float,
    *window_eps_and_need: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *window, eps, needs_x = window_eps_and_need
    soft = fixed_k or None if k is None else k
    given, filters = as_images(x), weight.unsqueeze(2) if x.dim() == 3 else weight
    by_x, by_weight, sums = cpu_depthwise.respond_backward(
        as_images(gradient), as_images(response), given, filters, operator, soft, of_images(x, window), eps, needs_x
    )
    return as_given(by_x, x, given) if needs_x else by_x, by_weight.view(weight.shape), sums


def as_images(x: Tensor) -> Tensor:
    """(N, C, H, W) with the channels innermost, as the kernels read it."""
    return (x.unsqueeze(2) if x.dim() == 3 else x).contiguous(memory_format=torch.channels_last)


def of_images(x: Tensor, window: list[list[int]]) -> cpu_depthwise.Windowed:
    stride, padding, dilation = window
    return (stride, padding, dilation) if x.dim() == 4 else ([1, *stride], [0, *padding], [1, *dilation])


def as_given(found: Tensor, x: Tensor, given: Tensor) -> Tensor:
    """Laid out as ``x`` is, of which ``given`` was made."""
    if given is x:
        return found
    return (found.squeeze(2) if x.dim() == 3 else found).contiguous()


def shape_of_depthwise(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    out = x.new_empty(cpu_depthwise.shape_of_response(x, weight, others[3:6]))
    return out.contiguous(memory_format=torch.channels_last) if cpu_depthwise.lies_in_rows(x) else out


SOFTNESS = "Tensor? k, str operator, float fixed_k"
TERMS = f"Tensor length, {SOFTNESS}"
WINDOW = "int[] stride, int[] padding, int[] dilation, float eps"
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
        lambda _, response, inverse, __, k, *others: (
            torch.empty_like(response),
            torch.empty_like(inverse),
            response.new_empty(cpu_rows.shape_of_sums(response.shape[1], k)),
        ),
    ),
    "depthwise": (
        f"(Tensor x, Tensor weight, {SOFTNESS}, {WINDOW}) -> Tensor",
        depthwise,
        shape_of_depthwise,
    ),
    "depthwise_backward": (
        f"(Tensor gradient, Tensor response, Tensor x, Tensor weight, {SOFTNESS}, {WINDOW}, bool needs_x)"
        " -> (Tensor, Tensor, Tensor)",
        depthwise_backward,
        lambda _, response, x, weight, k, *others: (
            torch.empty_like(x) if others[-1] else x.new_empty(0),
            torch.empty_like(weight, memory_format=torch.contiguous_format),
            response.new_empty(cpu_rows.shape_of_sums(response.shape[1], k)),
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
        "str operator, float fixed_k, bool[3] by) -> (Tensor, Tensor, Tensor)",
        cpu_pointwise.respond_backward,
        lambda _, __, x, weight, *others: cpu_pointwise.shapes_of_gradients(x, weight, others[-1]),
    ),
}


def register() -> None:
    """Once in a process, also where this module is imported anew.

    ``respond`` alone leaves the layout to the compiler: such a tag takes the place of what ``in_graphs`` tells it.
    """
    for name, (schema, function, shapes) in OPERATORS.items():
        if hasattr(torch.ops.spherify, name):
            continue
        tags = (torch.Tag.flexible_layout,) if name == "respond" else ()
        torch.library.define(f"spherify::{name}", schema, tags=tags)
        torch.library.impl(f"spherify::{name}", "CPU", function)
        torch.library.register_fake(f"spherify::{name}", shapes)
        setattr(torch.ops.spherify, direct_name(name), function)


def direct_name(name: str) -> str:
    """Under which graphs' code, which imports torch alone, finds an operator's function beside the operator."""
    return f"{name}_directly"


register()
ours = torch.ops.spherify
