"""Depthwise layers on channels-last maps by one kernel each way, as compiled graphs call them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_void_p

import torch
from torch import Tensor

from spherify.functional import cpu_binding
from spherify.functional.cpu_kernels import ByFilter, checked, described_window
from spherify.functional.cpu_rows import terms_of

Windowed = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]  # window, stride, padding, dilation


class Depthwise(ctypes.Structure):
    """As in cpu_depthwise.h."""

    _fields_ = tuple((name, c_void_p) for name in ("x", "product", "gradient", "saved", "out", "by_x", "sums"))


def takes(x: Tensor, product: Tensor) -> bool:
    """Whether both lie with their channels innermost."""
    return all(cpu_binding.takes(one, one.shape[1]) and cpu_binding.is_rows(one) for one in (x, product))


@functools.cache
def library() -> ctypes.CDLL:
    kernels = cpu_binding.library()
    assert kernels is not None
    for kernel in (kernels.depthwise_respond, kernels.depthwise_backward):
        kernel.argtypes = (c_void_p, c_void_p, c_void_p, c_float)
    return kernels


def respond(
    product: Tensor, x: Tensor, operator: str, values: dict[str, ByFilter], window: Windowed, eps: float
) -> Tensor:
    """The response to ``product length / |patch|``, for tensors that ``takes``; ``values`` as for ``elementwise``."""
    out = torch.empty_like(product)
    described, _ = described_window(x, *window, x.shape[1])
    terms, alive = terms_of(product, product, operator, values)
    tensors = Depthwise(x.data_ptr(), product.data_ptr(), None, None, out.data_ptr(), None, None)
    checked(library().depthwise_respond(*map(ctypes.byref, (tensors, described, terms)), eps))
    del alive
    return out


def respond_backward(
    gradient: Tensor,
    response: Tensor,
    x: Tensor,
    operator: str,
    values: dict[str, ByFilter],
    window: Windowed,
    eps: float,
    has_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by product and, through the norms, input; and (2, C): with the response, and for k.

    Args:
        has_k: whether that last is wanted; else it is zero.
    """
    if gradient.stride() != response.stride():
        gradient = torch.empty_like(response).copy_(gradient)
    product, by_x, sums = torch.empty_like(response), torch.empty_like(x), response.new_zeros((2, x.shape[1]))
    described, _ = described_window(x, *window, x.shape[1])
    terms, alive = terms_of(response, response, operator, values)
    pointers = (tensor.data_ptr() for tensor in (gradient, response, product, by_x))
    tensors = Depthwise(x.data_ptr(), None, *pointers, sums.data_ptr() if has_k else None)
    checked(library().depthwise_backward(*map(ctypes.byref, (tensors, described, terms)), eps))
    del alive
    return product, by_x, sums
