"""SphereConv's product and its gradient by the CPU's kernels: few calls, nothing stored that need not be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spherify.functional import cpu_binding, cpu_kernels
from spherify.functional.filters import multiply, multiply_backward


class Window(NamedTuple):
    """A convolution's arguments, one number a trailing dimension; none for a linear layer."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def serves(x: Tensor, weight: Tensor, others: Sequence[Tensor | None], groups: int, compute: torch.dtype) -> bool:
    """Whether the kernels can take this call: float32, at most two dimensions, laid out as they read it, all here."""
    return (
        compute == torch.float32
        and weight.dtype == torch.float32
        and x.dim() <= 4
        and weight.is_contiguous()
        and weight.numel() > 0
        and all(tensor is None or tensor.device.type == "cpu" for tensor in (weight, *others))
        and cpu_binding.takes(x, groups)
    )


class Product(NamedTuple):
    """The output, and what its gradient needs.

    Attributes:
        inverse: (N, G, ...): 1 / |patch|.
        length: (O,): 1 / |filter|.
        response: before gain and bias, where it cannot be had from the output.
    """

    out: Tensor
    inverse: Tensor
    length: Tensor
    response: Tensor | None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    k: float | Tensor | None,
    operator: str,
    eps: float,
    window: Window,
    *,
    keeps: bool,
) -> Product | None:
    """None where the convolution's output lies in a way the kernels do not read. ``keeps``: for a gradient later."""
    inverse = patch_norms(x, weight, window, eps)
    out = multiply(x, weight, *window)
    if not cpu_binding.takes(out, window.groups) or not cpu_binding.fits(out, inverse):
        return None
    length = cpu_kernels.inverse_lengths(weight, eps)
    keeps = keeps and operator != "cosine" and not is_in_output(gain, bias)
    values = dict(length=length, gain=gain, bias=bias, **cpu_kernels.constants(operator, k))
    response = cpu_kernels.normalise_and_respond_(out, inverse, operator, values, keeps=keeps)
    return Product(out, inverse, length, response)


def patch_norms(x: Tensor, weight: Tensor, window: Window, eps: float) -> Tensor:
    """1 / |patch|: (N, G, ...)."""
    return cpu_kernels.patch_inverse_norm(x, weight.shape[2:], *window, eps)


def is_in_output(gain: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the response can be had from the output to within two rounding steps: no bias larger than its gain."""
    if gain is None:
        return bias is None or bool((bias.detach().abs() <= 1.0).all())
    size = gain.detach().abs()
    if bias is None:
        return bool((size >= torch.finfo(size.dtype).tiny).all())
    return bool(torch.logical_and(size >= torch.finfo(size.dtype).tiny, bias.detach().abs() <= size).all())


def to_keep(found: Product, weight: Tensor, operator: str) -> Tensor | None:
    """What the gradient needs of the answer: nothing for linear layers with the cosine, else output or response."""
    if operator == "cosine" and weight.dim() == 2:
        return None
    return found.out.detach() if found.response is None else found.response


def norms_to_keep(found: Product) -> Tensor | None:
    """The patch norms, unless they are nearly as many as the outputs (depthwise layers): those are computed again."""
    return found.inverse if found.inverse.numel() * 4 <= found.out.numel() else None


class Gradients(NamedTuple):
    """By input and weight; and sums (O,): of the gradient, with the response, for k, along the filters."""

    x: Tensor | None
    weight: Tensor | None
    total: Tensor
    with_response: Tensor
    for_k: Tensor
    along_filter: Tensor


def backward(
    gradient: Tensor,
    saved: Tensor | None,
    x: Tensor,
    weight: Tensor,
    inverse: Tensor | None,
    length: Tensor,
    eps: float,
    values: dict[str, cpu_kernels.ByFilter],
    operator: str,
    window: Window,
    needs_x: bool,
    needs_weight: bool,
) -> Gradients:
    """From what ``to_keep`` and ``norms_to_keep`` kept. ``values`` as for ``respond_backward``, without the lengths."""
    values = {"length": length, **values}
    if saved is None:
        inverse = patch_norms(x, weight, window, eps) if inverse is None else inverse
        product, _, sums = cpu_kernels.respond_backward(gradient, None, inverse, operator, values)
        by_x, by_weight = multiply_backward(product, x, weight, *window, needs_x, needs_weight)
        if by_x is not None:
            cpu_kernels.subtract_own_(by_x, x, inverse)
        if by_weight is not None:
            sums[3] = cpu_kernels.subtract_own_(by_weight, weight, length)
        return Gradients(by_x, by_weight, *sums.unbind())
    total, by_weight, by_x = None, None, None
    blocks = in_blocks(x, saved, weight)
    by_all = torch.empty_like(x) if needs_x and len(blocks) > 1 else None
    for block in blocks:
        part = x[block]
        norms = patch_norms(part, weight, window, eps) if inverse is None else inverse[block]
        product, along, sums = cpu_kernels.respond_backward(gradient[block], saved[block], norms, operator, values)
        by_x, by_filters = multiply_backward(product, part, weight, *window, needs_x, needs_weight)
        total = sums if total is None else total.add_(sums)
        if by_filters is not None:
            by_weight = by_filters.contiguous() if by_weight is None else by_weight.add_(by_filters)
        if by_x is None:
            continue
        if by_all is not None:
            by_x = by_all[block].copy_(by_x)
        elif by_x.stride() != x.stride():
            by_x = torch.empty_like(x).copy_(by_x)
        cpu_kernels.subtract_along_(by_x, part, along, norms, weight.shape[2:], *window[:3])
    assert total is not None
    if by_weight is not None:
        cpu_kernels.subtract_along_filters_(by_weight, weight, length, total[3])
    return Gradients(by_x if by_all is None else by_all, by_weight, *total.unbind())


BLOCKS = 4


def in_blocks(x: Tensor, saved: Tensor, weight: Tensor) -> list[slice]:
    """Some images at a time, where the output is large beside the weight: of its gradient by the product only a part
    stands beside the rest, and that part stays in the cache."""
    images, threads = x.shape[0], torch.get_num_threads()
    step = max(-(-images // BLOCKS), threads)
    if weight.dim() == 2 or saved.numel() < 4 * weight.numel() or saved.numel() < 1 << 17:
        step = images
    return [slice(start, start + step) for start in range(0, images, step)]
