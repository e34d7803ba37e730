"""SphereConv as one operator of ``torch.library``, for eager mode: it keeps input, weight, patch norm and output.

``torch.compile`` and ``torch.export`` fuse the plain operations themselves and are given those (functional/sphere.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from spherify.functional.blocks import (
    energy_of,
    grouped,
    normalise_and_respond_,
    respond_backward,
    wide_type,
)
from spherify.functional.cosine import CONVOLUTIONS, box_sum, unit_filters

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def takes(*tensors: object) -> bool:
    """Whether the operator serves this call: eager, on plain tensors, with nobody looking inside.

    Compilers, exporters, ``torch.func``, forward-mode derivatives, checkpoints, counters of operations and our own
    recorder get the plain operations, which they can take apart.
    """
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if any(type(tensor) not in PLAIN_TENSORS or tensor.device.type not in ("cpu", "cuda") for tensor in given):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
        return False
    if any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()):
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def type_of_product(x: Tensor, weight: Tensor) -> torch.dtype:
    """What the plain convolution would compute in: autocast's type, or that of its arguments."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return x.dtype


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
    if all(size == 1 for size in window) and not any(padding):
        x, stride = x[(slice(None), slice(None), *[slice(None, None, step) for step in stride])], [1] * len(stride)
    energy = energy_of(x, groups)
    if any(padding):
        energy = F.pad(energy, [number for number in reversed(padding) for _ in range(2)])
    return box_sum(energy, window, stride, dilation).add(eps).rsqrt_()


def spread_over_window(
    x: Tensor,
    sizes: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The transpose of padding and ``box_sum``: (N, G, P, Q) to (N, G, H, W), each patch's number on all its pixels."""
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


def filter_shape(value: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(O,) or one number, shaped to broadcast as (O, 1, ...) against (N, O, ...)."""
    return None if value is None else value.to(dtype).reshape(-1, *[1] * (like.dim() - 2))


def multiply(
    x: Tensor, filters: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    if filters.dim() == 2:
        return F.linear(x, filters)
    return CONVOLUTIONS[filters.dim() - 2](x, filters, None, stride, padding, dilation, groups)


@torch.library.custom_op("spherify::sphere_product", mutates_args=())
def sphere_product(
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


def inverse_lengths(weight: Tensor, eps: float) -> Tensor:
    """(O,): 1 / |w| of each filter, in float32 or wider."""
    rows = weight.flatten(1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=wide_type(weight.dtype)).square_().add_(eps).rsqrt_()


def filters_for(
    weight: Tensor, inverse_norm: Tensor, eps: float, compute: torch.dtype
) -> tuple[Tensor, Tensor | None, float]:
    """What the input is multiplied by, and by what the product is to be multiplied: filter by filter, and as a whole.

    Where the output is small against the weight it is the output that is divided by the filters' lengths: one pass
    in place of three over the weight. Not in float16, whose range asks for unit filters.
    """
    positions = inverse_norm.numel() // max(1, inverse_norm.shape[1])
    if compute != torch.float16 and positions * weight.shape[0] <= 2 * weight.numel():
        return weight, inverse_lengths(weight, eps), 1.0
    unit, power = unit_filters(weight, eps=eps)
    return unit, None, power


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
    # Not through save_for_backward: a ReLU in place right behind may change it, which the plain layer would allow.
    ctx.answer = response if is_kept_apart else out.detach()
    ctx.version = ctx.answer._version
    ctx.save_for_backward(x, weight, bias, gain, k, inverse)


def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, gain, k, inverse = ctx.saved_tensors
    if torch.is_grad_enabled():
        grads = differentiable_backward(ctx, gradient, x, weight, bias, gain, k)
    else:
        answer = ctx.answer
        if answer._version != ctx.version:
            out, _, response = sphere_product(x, weight, bias, gain, k, *ctx.numbers)
            answer = response if response.dim() > 1 else out
        grads = fast_backward(ctx, gradient, answer, x, weight, bias, gain, k, inverse)
    return *grads, *[None] * len(ctx.numbers)


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
    found = respond_backward(
        gradient, answer, scaled, filter_shape(length, answer, wide), operator, softness, scale, offset, needs
    )
    # For the cosine the gain is in the filters, where the sums for its gradient cost nothing.
    is_in_filters = is_cosine and gain is not None
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
    by_gain = None if is_cosine else found.gain
    by_weight = None
    if by_filters is not None:
        by_filters = by_filters.to(wide_type(weight.dtype))
        if is_in_filters:
            by_gain = (by_filters * filters).flatten(1).sum(1) if needs_gain else None
            by_filters.mul_(rows_of(gain, weight))
        if needs_weight:
            by_weight = by_direction_(by_filters, weight, found.along_filter, eps, power, length)
    if by_x is not None:
        along = spread_over_window(
            found.along.mul_(inverse * inverse), x.shape[2:], weight.shape[2:], stride, padding, dilation
        )
        by_x = subtract_along_(by_x.to(x.dtype), x, along)
    if not is_cosine:
        by_gain = found.gain if needs_gain else None
    return [
        by_x,
        by_weight,
        like(found.bias, bias, needs_bias),
        like(by_gain, gain, needs_gain),
        like(found.k, k, needs_k),
    ]


def rows_of(value: Tensor | None, weight: Tensor) -> Tensor:
    """(O,) shaped to broadcast against the weight."""
    assert value is not None
    return value.to(wide_type(weight.dtype)).reshape(-1, *[1] * (weight.dim() - 1))


def like(gradient: Tensor | None, leaf: Tensor | None, is_needed: bool) -> Tensor | None:
    """The gradient in the shape and type of what it is the gradient by; one number for all filters takes their sum."""
    if gradient is None or leaf is None or not is_needed:
        return None
    total = gradient.sum() if leaf.numel() == 1 else gradient
    return total.reshape(leaf.shape).to(leaf.dtype)


def subtract_along_(by_x: Tensor, x: Tensor, along: Tensor) -> Tensor:
    """``by_x - x * along``, in place."""
    groups = along.shape[1]
    if by_x.dtype == along.dtype == x.dtype:
        grouped(by_x, groups).addcmul_(grouped(x, groups), along.unsqueeze(2), value=-1)
        return by_x
    step = (grouped(x, groups) * along.unsqueeze(2)).flatten(1, 2)
    return by_x.sub_(step)


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


def multiply_backward(
    gradient: Tensor,
    x: Tensor,
    filters: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
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
    from spherify.functional.sphere import plain_sphere

    stride, padding, dilation, groups, operator, fixed_k, eps, _ = ctx.numbers
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    leaves = [x, weight, bias, gain, k]
    is_wanted = [leaf is not None and wanted for leaf, wanted in zip(leaves, ctx.needs_input_grad, strict=False)]
    with torch.enable_grad():
        out = plain_sphere(x, weight, bias, operator, (fixed_k or None) if k is None else k, eps, gain, window)
        wanted = [leaf for leaf, yes in zip(leaves, is_wanted, strict=True) if yes]
        found = iter(torch.autograd.grad(out, wanted, gradient.to(out.dtype), create_graph=True))  # type: ignore[arg-type]
    return [next(found) if yes else None for yes in is_wanted]


sphere_product.register_autograd(backward, setup_context=set_up)
