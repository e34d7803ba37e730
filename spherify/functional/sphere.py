"""SphereConv in one, two and three dimensions, and for fully connected layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.errors import OptionError
from spherify.functional.cosine import (
    CONVOLUTIONS,
    DEFAULT_EPS,
    flat,
    padded,
    padding_at_both_ends,
    per_axis,
)
from spherify.functional.eager import SphereProduct, sphere_product_forward
from spherify.functional.fused import takes
from spherify.functional.plain import per_filter, plain_sphere
from spherify.functional.precision import type_of_product
from spherify.functional.responses import checked_k, response_named

Size = int | Sequence[int]


def check_call(operator: str, k: float | Tensor | None, eps: float) -> None:
    response = response_named(operator)
    if not isinstance(k, Tensor):
        checked_k(operator, k)
        if response.default_k is not None and k is None:
            raise OptionError(f"operator {operator!r} needs a k; give a number or a tensor.")
    elif response.default_k is None:
        raise OptionError(f"operator {operator!r} has no k; leave k out, or choose sigmoid or learnable.")
    if not 0 < eps < math.inf:
        raise OptionError(f"eps={eps!r} is no positive number; without it a patch of zeros has no cosine.")


def asks_for_shapes(x: Tensor) -> bool:
    """Whether this is a run without data and without gradients: the plain twin's answer has the same shape and type."""
    return x.is_meta and not torch.is_grad_enabled()


def plain_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: str | Size,
    dilation: Size,
    groups: int,
    padding_mode: str,
) -> Tensor:
    """What the ``nn.Conv`` twin computes, bit for bit."""
    dims = weight.dim() - 2
    if padding_mode != "zeros":
        axes = (per_axis(stride, dims, "stride"), per_axis(dilation, dims, "dilation"))
        pads = padding_at_both_ends(padding, weight.shape[2:], *axes)
        x, _, padding = padded(x, pads, padding, padding_mode)
    return CONVOLUTIONS[dims](x, weight, bias, stride, padding, dilation, groups)


def sphere_conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    eps: float,
    gain: Tensor | None,
    window: dict,
) -> Tensor:
    """The one body behind ``sphere_conv1d``, ``sphere_conv2d`` and ``sphere_conv3d``."""
    check_call(operator, k, eps)
    if weight.dim() != dims + 2:
        raise OptionError(f"sphere_conv{dims}d: the weight has {weight.dim()} dimensions, not {dims + 2}.")
    if x.dim() == dims + 1:  # unbatched, as the plain convolution allows
        return sphere_conv(dims, x[None], weight, bias, operator, k, eps, gain, window)[0]
    if operator == "identity" or asks_for_shapes(x):
        return plain_conv(x, weight, bias, **window)
    if takes(x, weight, bias, k, gain) and (compute := common_type(x, weight)) is not None:
        return fused_conv(x, weight, bias, operator, k, eps, gain, window, compute)
    return plain_sphere(x, weight, bias, operator, k, eps, gain, window)


def common_type(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type to compute in, or None where the plain operation has its own answer to unlike types."""
    compute = type_of_product(x, weight)
    return compute if x.dtype == weight.dtype or compute in (torch.float16, torch.bfloat16) else None


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    eps: float,
    gain: Tensor | None,
    window: dict,
    compute: torch.dtype,
) -> Tensor:
    numbers = tuple(window[name] for name in ("stride", "padding", "dilation"))
    if any(type(number) is list for number in numbers):
        numbers = tuple(tuple(number) if isinstance(number, list) else number for number in numbers)
    border, axes = geometry(weight.shape[2:], *numbers, window["padding_mode"])
    if border is not None:
        mode = window["padding_mode"]
        x = F.pad(x, border, mode="constant" if mode == "zeros" else mode)
    return fused(x, weight, bias, operator, k, eps, gain, axes, window["groups"], compute)


Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@functools.lru_cache(maxsize=1024)
def geometry(
    sizes: Sequence[int], stride: Size, padding: str | Size, dilation: Size, mode: str
) -> tuple[list[int] | None, Axes]:
    """The border to be put around the input first, if any, as for ``F.pad``; and stride, padding, dilation by axis."""
    steps, gaps = per_axis(stride, len(sizes), "stride"), per_axis(dilation, len(sizes), "dilation")
    pads = padding_at_both_ends(padding, sizes, steps, gaps)
    if any(before != after for before, after in pads) or (mode != "zeros" and any(map(any, pads))):
        return flat(pads), (steps, (0,) * len(sizes), gaps)
    return None, (steps, tuple(before for before, _ in pads), gaps)


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    eps: float,
    gain: Tensor | None,
    axes: Axes,
    groups: int,
    compute: torch.dtype,
) -> Tensor:
    """One call of ``torch.ops.spherify.sphere_product``, after the checks that ``respond`` would make."""
    for value, name in ((k, "k"), (gain, "gain"), (bias, "bias")):
        if isinstance(value, Tensor):
            per_filter(value, weight.shape[0], 0, name)
    soft, number = (k, 0.0) if isinstance(k, Tensor) else (None, k or 0.0)
    arguments = (x, weight, bias, gain, soft, *axes, groups, operator, number, eps, compute)
    return SphereProduct.apply(*arguments) if torch.is_grad_enabled() else sphere_product_forward(*arguments)


def sphere_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    operator: str = "cosine",
    k: float | Tensor | None = None,
    eps: float = DEFAULT_EPS,
    gain: Tensor | None = None,
) -> Tensor:
    """Response of the angle between each patch and each filter: (N, C, L) to (N, O, Q).

    Arguments as for ``sphere_conv2d``, with one spatial dimension.
    """
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode)
    return sphere_conv(1, x, weight, bias, operator, k, eps, gain, window)


def sphere_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    operator: str = "cosine",
    k: float | Tensor | None = None,
    eps: float = DEFAULT_EPS,
    gain: Tensor | None = None,
) -> Tensor:
    """Response of the angle between each patch and each filter, ``g(theta) * gain + bias``.

    A patch of zeros responds with 0 (before the bias) and has a gradient of at most ``1 / sqrt(eps)`` a unit.
    Norms and angles are computed in float32 or wider, also under autocast; the convolution itself runs in the type
    that autocast or the caller chose.

    Args:
        x: (N, C, H, W), or (C, H, W).
        weight: (O, C/G, U, V). Only the direction of each filter matters.
        bias: (O,).
        stride, padding, dilation, groups: as in ``F.conv2d``. The patch norm is taken group by group.
        padding_mode: zeros, reflect, replicate, circular, as in ``nn.Conv2d``.
        operator: cosine, linear, sigmoid, learnable.
        k: softness of sigmoid and learnable: a number in [1e-3, 1e3], or a tensor with one number or O numbers.
        eps: added to both squared norms, inside the root; positive.
        gain: (O,) or one number.

    Returns:
        (N, O, P, Q), in the type that ``F.conv2d`` returns; in [-1, 1] before gain and bias.

    Raises:
        OptionError: unknown operator, k out of range or not fitting, eps not positive.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, eq. 1 to 4.
    """
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode)
    return sphere_conv(2, x, weight, bias, operator, k, eps, gain, window)


def sphere_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    operator: str = "cosine",
    k: float | Tensor | None = None,
    eps: float = DEFAULT_EPS,
    gain: Tensor | None = None,
) -> Tensor:
    """Response of the angle between each patch and each filter: (N, C, T, H, W) to (N, O, S, P, Q).

    Arguments as for ``sphere_conv2d``, with three spatial dimensions.
    """
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode)
    return sphere_conv(3, x, weight, bias, operator, k, eps, gain, window)


def sphere_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    operator: str = "cosine",
    k: float | Tensor | None = None,
    eps: float = DEFAULT_EPS,
    gain: Tensor | None = None,
) -> Tensor:
    """Response of the angle between each vector and each row of the weight, ``g(theta) * gain + bias``.

    Args:
        x: (..., D).
        weight: (O, D).
        bias, operator, k, eps, gain: as in ``sphere_conv2d``.

    Returns:
        (..., O), in the type that ``F.linear`` returns.

    Raises:
        OptionError: as in ``sphere_conv2d``.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, eq. 1.
    """
    check_call(operator, k, eps)
    if operator == "identity" or asks_for_shapes(x):
        return F.linear(x, weight, bias)
    if takes(x, weight, bias, k, gain) and (compute := common_type(x, weight)) is not None:
        rows = x.reshape(-1, x.shape[-1])
        out = fused(rows, weight, bias, operator, k, eps, gain, ((), (), ()), 1, compute)
        return out.view(*x.shape[:-1], weight.shape[0])
    return plain_sphere(x, weight, bias, operator, k, eps, gain, {})
