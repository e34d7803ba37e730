"""Folded depthwise layers with 3x3 windows on the CPU: product, norms and response by one kernel, in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from spherify.functional import cpu_binding, cpu_kernels
from spherify.functional.curves import Curve
from spherify.functional.fused import takes


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
    if kernels is None or groups != x.shape[1] or weight.shape != (groups, 1, 3, 3) or not is_plain(weight):
        return None
    window, sizes = cpu_kernels.described_window(x, (3, 3), *numbers)
    if not kernels.can_convolve(ctypes.byref(window), groups):
        return None
    out = x.new_empty(sizes)
    guard = cpu_kernels.guard_of(operator) if guard is None else guard
    response, alive = cpu_kernels.elementwise(  # the norms, which lie as the output does, are the kernel's own
        out, out, operator, values, guard=guard, low=low, high=high, curve=curve, is_gelu=is_gelu
    )
    place = ctypes.byref(cpu_binding.Layer(window, response, eps, power))
    cpu_kernels.checked(kernels.convolve_and_respond(x.data_ptr(), weight.data_ptr(), out.data_ptr(), place))
    del alive
    return out


def is_plain(weight: Tensor) -> bool:
    """Whether filters can be read where they lie, by nobody who wants a gradient or another type."""
    wants_graph = weight.requires_grad and torch.is_grad_enabled()
    is_here = takes(weight) and weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_here and weight.is_contiguous() and not wants_graph and not torch._C._is_any_autocast_enabled()
