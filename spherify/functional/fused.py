"""SphereConv as one operator of ``torch.library``, for eager mode: it keeps input, weight, patch norm and output.

``torch.compile`` and ``torch.export`` fuse the plain operations themselves and are given those (functional/sphere.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from spherify.functional.blocks import (
    energy_of,
    kernels_for,
    normalise_and_respond_,
    respond_backward,
    wide_type,
)
from spherify.functional.filters import (
    by_direction_,
    filter_shape,
    filters_for,
    like,
    multiply,
    multiply_backward,
    rows_of,
    spread_over_window,
    subtract_along_,
    window_sum,
)

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
# Before torch 2.7 they cannot be asked for; under a checkpoint the answer is then kept, which costs memory alone.
saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


def takes(*tensors: object) -> bool:
    """Whether the operator serves this call: eager, on plain tensors, with nobody looking inside.

    Compilers, exporters, ``torch.func``, forward-mode derivatives, checkpoints, counters of operations and our own
    recorder get the plain operations, which they can take apart.
    """
    for tensor in tensors:
        if isinstance(tensor, Tensor) and (type(tensor) not in PLAIN_TENSORS or not (tensor.is_cpu or tensor.is_cuda)):
            return False
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    # torch's C functions are asked straight: with its caches full of a large product, Python's frames cost the most
    if torch._C._is_tracing() or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return False
    return saved_tensor_hooks(False) is None


def patch_inverse_norm(
    x: Tensor,
    window: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
) -> Tensor:
    """1 / |patch|, (N, G, P, Q) in float32 or wider."""
    if (kernels := kernels_for(x)) is not None and len(window) <= 2:
        return kernels.patch_inverse_norm(x, window, stride, padding, dilation, groups, eps)
    if all(size == 1 for size in window) and not any(padding):
        taken = (slice(None), slice(None), *[slice(None, None, step) for step in stride])
        x, stride = x[taken], [1] * len(stride)
    return window_sum(energy_of(x, groups), window, stride, padding, dilation).add_(eps).rsqrt_()


def product_and_rest(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    k: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    operator: str,
    fixed_k: float,
    eps: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Response of the angle between each patch and each filter, and what its gradient needs.

    Args:
        x: (N, C, ...).
        weight: (O, C/G, ...).
        stride, padding, dilation: one number a trailing dimension; none for a linear layer.
        fixed_k: where ``k`` is None; 0 for operators that have no k.
        compute: type of the product and of the output.

    Returns:
        The output (N, O, ...), the inverse norm (N, G, ...) and, where it cannot be had from the output, the
        response before gain and bias (else an empty tensor).
    """
    inverse = patch_inverse_norm(x, weight.shape[2:], stride, padding, dilation, groups, eps)
    filters, length, power = filters_for(weight, inverse, eps, compute)
    out = multiply(x.to(compute), filters.to(compute), stride, padding, dilation, groups)
    wide = inverse.dtype
    softness = fixed_k or None if k is None else filter_shape(k, out, wide)
    scale, offset = filter_shape(gain, out, wide), filter_shape(bias, out, wide)
    shaped, scaled = filter_shape(length, out, wide), inverse if power == 1.0 else inverse * power
    if operator == "cosine" or (gain is None and bias is None):
        normalise_and_respond_(out, scaled, shaped, operator, softness, scale, offset)
        return out, inverse, x.new_empty(0)
    response = normalise_and_respond_(out, scaled, shaped, operator, softness, None, None)
    out = response.clone() if scale is None else (response * scale).to(compute)
    return out if offset is None else out.add_(offset), inverse, response


SCHEMA = (  # written out: before torch 2.7 it is not read from ``list[int]``
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? gain, Tensor? k, int[] stride, int[] padding, int[] dilation, "
    "int groups, str operator, float fixed_k, float eps, ScalarType compute) -> (Tensor, Tensor, Tensor)"
)
sphere_product = torch.library.custom_op("spherify::sphere_product", product_and_rest, mutates_args=(), schema=SCHEMA)


@sphere_product.register_fake
def _(x, weight, bias, gain, k, stride, padding, dilation, groups, operator, fixed_k, eps, compute):  # type: ignore[no-untyped-def]
    out = multiply(x.to(compute), weight.to(compute), stride, padding, dilation, groups)
    inverse = x.new_empty((x.shape[0], groups, *out.shape[2:]), dtype=wide_type(x.dtype))
    is_kept_apart = operator != "cosine" and (gain is not None or bias is not None)
    return out, inverse, torch.empty_like(out) if is_kept_apart else x.new_empty(0)


def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, gain, k, *ctx.numbers = inputs
    out, inverse, response = output
    is_kept_apart = response.dim() > 1
    keep(ctx, response if is_kept_apart else out.detach())
    ctx.save_for_backward(x, weight, bias, gain, k, inverse)


def keep(ctx: Any, answer: Tensor | None) -> None:
    """Not through save_for_backward: a ReLU in place right behind may change it, which the plain layer would allow."""
    ctx.answer, ctx.version = answer, None if answer is None else answer._version


def taken_from(ctx: Any) -> Tensor | None:
    """What was kept, which is let go: a second backward pass through the graph finds None and computes it again.

    None also where it was changed in place.
    """
    answer, ctx.answer = ctx.answer, None
    return answer if answer is not None and answer._version == ctx.version else None


def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, gain, k, inverse = ctx.saved_tensors
    if torch.is_grad_enabled():
        grads = differentiable_backward(ctx, gradient, x, weight, bias, gain, k)
    else:
        answer = taken_from(ctx)
        if answer is None:
            out, _, response = sphere_product(x, weight, bias, gain, k, *ctx.numbers)
            answer = response if response.dim() > 1 else out
        grads = fast_backward(ctx, gradient, answer, x, weight, bias, gain, k, inverse)
    return *grads, *[None] * len(ctx.numbers)


def is_safe_divisor(gain: Tensor) -> bool:
    """Whether the gradient by the cosine's gain may be had by dividing by the gain; a GPU is not waited for.

    The other way, with the gain in the filters, needs no division and two more tensors of the weight's size.
    """
    if gain.is_cuda or gain.dim() == 0 or gain.numel() == 0:
        return False
    size = gain.detach().abs()
    return bool(size.min() > 1e-4 * size.max())


def fast_backward(
    ctx: Any,
    gradient: Tensor,
    answer: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    k: Tensor | None,
    inverse: Tensor,
) -> list[Tensor | None]:
    stride, padding, dilation, groups, operator, fixed_k, eps, compute = ctx.numbers
    needs = ctx.needs_input_grad[:5]
    needs_x, needs_weight, needs_bias, needs_gain, needs_k = needs
    wide = inverse.dtype
    filters, length, power = filters_for(weight, inverse, eps, compute)
    softness = fixed_k or None if k is None else filter_shape(k, answer, wide)
    scale, offset = filter_shape(gain, answer, wide), filter_shape(bias, answer, wide)
    is_cosine = operator == "cosine"
    scaled = inverse if power == 1.0 else inverse * power
    is_in_filters = is_cosine and gain is not None and not is_safe_divisor(gain)
    in_gradient = None if is_in_filters else scale
    found = respond_backward(
        gradient, answer, scaled, filter_shape(length, answer, wide), operator, softness, in_gradient, offset, needs
    )
    with_gain = filters.to(wide) * rows_of(gain, weight) if is_in_filters and needs_x else filters
    by_x, by_filters = multiply_backward(
        found.product,
        x.to(compute),
        with_gain.to(compute),
        stride,
        padding,
        dilation,
        groups,
        needs_x,
        needs_weight or (needs_gain and is_in_filters),
    )
    by_gain = found.gain
    if is_cosine and gain is not None and not is_in_filters:
        by_gain = found.along_filter / gain.to(wide)
    by_weight = None
    if by_filters is not None:
        by_filters = by_filters.to(wide_type(weight.dtype))
        if is_in_filters:
            by_gain = (by_filters * filters).flatten(1).sum(1) if needs_gain else None
            by_filters.mul_(rows_of(gain, weight))
        if needs_weight:
            by_weight = by_direction_(by_filters, weight, found.along_filter, eps, power, length)
    if by_x is not None:
        window = (weight.shape[2:], stride, padding, dilation)
        by_x = by_x.to(x.dtype)
        if (kernels := kernels_for(by_x, x)) is not None and x.dim() <= 4:
            kernels.subtract_along_(by_x, x, found.along, inverse, *window)
        else:
            along = spread_over_window(found.along.mul_(inverse * inverse), x.shape[2:], *window)
            by_x = subtract_along_(by_x, x, along)
    return [
        by_x,
        by_weight,
        like(found.bias, bias, needs_bias),
        like(by_gain, gain, needs_gain),
        like(found.k, k, needs_k),
    ]


def differentiable_backward(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    k: Tensor | None,
) -> list[Tensor | None]:
    """For gradients of gradients: the plain operations once more, and their own derivatives."""
    from spherify.functional.plain import plain_sphere

    stride, padding, dilation, groups, operator, fixed_k, eps, _ = ctx.numbers
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode="zeros")
    leaves = [x, weight, bias, gain, k]
    is_wanted = [leaf is not None and wanted for leaf, wanted in zip(leaves, ctx.needs_input_grad, strict=False)]
    with torch.enable_grad():
        out = plain_sphere(x, weight, bias, operator, (fixed_k or None) if k is None else k, eps, gain, window)
        wanted = [leaf for leaf, yes in zip(leaves, is_wanted, strict=True) if yes]
        found = iter(torch.autograd.grad(out, wanted, gradient.to(out.dtype), create_graph=True))  # type: ignore[arg-type]
    return [next(found) if yes else None for yes in is_wanted]


sphere_product.register_autograd(backward, setup_context=set_up)
