"""Folded depthwise layers on the CPU: product, norms and response by one kernel, in one pass."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from spherify.functional import cpu_binding, cpu_kernels
from spherify.functional.curves import Curve
from spherify.functional.fused import takes

SERVED = ((3, 3), (5, 5), (7, 7))  # windows of which the kernels may serve a layer


def convolved(
    x: Tensor,
    weight: Tensor,
    numbers: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
    operator: str,
    values: dict[str, cpu_kernels.ByFilter],
    *,
    guard: float | None,
    low: float,
    high: float,
    curve: Curve | None,
    is_gelu: bool,
    eps: float,
    power: float,
) -> Tensor | None:
    """The folded layer's answer (N, O, P, Q), or None where the kernel does not serve it.

    Args:
        x: (N, C, H, W), which the kernels take.
        numbers: stride, padding, dilation, groups.
        The others are those of ``normalise_and_respond_`` and ``patch_inverse_norm``.
    """
    kernels = cpu_binding.library()
    groups = numbers[3]
    taken = tuple(weight.shape[2:])
    if kernels is None or taken not in SERVED or groups != x.shape[1] or not is_plain(weight):
        return None
    if weight.shape[:2] != (groups, 1):
        return None
    window, sizes = cpu_kernels.described_window(x, taken, *numbers)
    if min(sizes) < 1:
        return None
    out = empty(sizes, bool(window.channels_last))
    guard = cpu_kernels.guard_of(operator) if guard is None else guard
    response, alive = cpu_kernels.elementwise(  # the norms, which lie as the output does, are the kernel's own
        out, out, operator, values, guard=guard, low=low, high=high, curve=curve, is_gelu=is_gelu
    )
    layer = cpu_binding.Layer(window, response, eps, power)
    if (kernel := kernel_for(layer)) is None:
        return None
    cpu_kernels.checked(kernel(x.data_ptr(), weight.data_ptr(), out.data_ptr(), ctypes.byref(layer)))
    del alive
    return out


def kernel_for(layer: cpu_binding.Layer) -> Callable[..., int] | None:
    """What convolves for a folded depthwise layer: on planes with 3x3 windows, channels-last also with 5x5 and 7x7."""
    kernels = cpu_binding.library()
    assert kernels is not None
    if kernels.can_convolve(ctypes.byref(layer.window), layer.response.filters):
        return kernels.convolve_and_respond
    return kernels.convolve_rows_and_respond if kernels.can_convolve_rows(ctypes.byref(layer)) else None


def empty(sizes: tuple[int, ...], rows: bool) -> Tensor:
    layout = torch.channels_last if rows else torch.contiguous_format
    return torch.empty(sizes, dtype=torch.float32, device="cpu", memory_format=layout)


def is_plain(weight: Tensor) -> bool:
    """Whether filters can be read where they lie, by nobody who wants a gradient or another type."""
    wants_graph = weight.requires_grad and torch.is_grad_enabled()
    is_here = takes(weight) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_here and weight.is_contiguous() and not wants_graph and not torch._C._is_any_autocast_enabled()
