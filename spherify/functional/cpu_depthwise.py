"""Depthwise layers on channels-last maps by one kernel each way, as compiled graphs call them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_void_p

import torch
from torch import Tensor

from spherify.functional import cpu_binding
from spherify.functional.cpu_binding import Elementwise, Window
from spherify.functional.cpu_kernels import checked, constants, elementwise, guard_of, sizes_of_output, window_of
from spherify.functional.cpu_rows import describe_fit, describe_k, hold

Windowed = tuple[Sequence[int], Sequence[int], Sequence[int]]  # stride, padding, dilation
Softness = Tensor | float | None

HELD: dict[tuple[object, ...], tuple[Window, Elementwise, list[Tensor | None]]] = {}


class Depthwise(ctypes.Structure):
    """As in cpu_depthwise.h."""

    _fields_ = tuple(
        (name, c_void_p) for name in ("x", "weight", "gradient", "saved", "out", "by_x", "by_weight", "sums")
    )


@functools.cache
def library() -> ctypes.CDLL:
    kernels = cpu_binding.library()
    assert kernels is not None
    for kernel in (kernels.depthwise, kernels.depthwise_backward):
        kernel.argtypes = (c_void_p, c_void_p, c_void_p, c_float)
    return kernels


def lies_in_rows(x: Tensor) -> bool:
    """Whether a (N, C, H, W) can be given to the kernels: its channels lie innermost, as those of its response will."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def shape_of_response(x: Tensor, weight: Tensor, window: Windowed) -> list[int]:
    """(N, C, P, Q)."""
    outs = sizes_of_output(x.shape[2:], weight.shape[2:], *window)
    if any(out < 1 for out in outs):
        raise RuntimeError(
            f"Kernel size {tuple(weight.shape[2:])} can't be greater than the padded input {tuple(x.shape[2:])}."
        )
    return [x.shape[0], x.shape[1], *outs]


def described(
    x: Tensor, like: Tensor, sizes: tuple[int, ...], operator: str, k: Softness, window: Windowed
) -> tuple[Window, Elementwise, list[Tensor | None]]:
    """What the kernels are told, and what must outlive them; made once for each shape, but for a learned k.

    Args:
        like: of the response's shape and layout.
        sizes: of the window.
    """
    stride, padding, dilation = map(tuple, window)
    threads = cpu_binding.threads_for(x.numel())
    key = (x.shape, sizes, stride, padding, dilation, operator, Tensor if isinstance(k, Tensor) else k, threads)
    if (held := HELD.get(key)) is None:
        frame, _ = window_of(x.shape, sizes, stride, padding, dilation, x.shape[1], True, threads)
        values = constants(operator, k)
        terms, (_, *alive) = elementwise(like, like, operator, values, guard=guard_of(operator))
        describe_fit(terms, values)
        held = hold(HELD, key, (frame, terms, alive))
    if not isinstance(k, Tensor):
        return held
    frame, terms, alive = held
    terms = Elementwise.from_buffer_copy(terms)
    return frame, terms, [*alive, describe_k(terms, k, x.shape[1])]


def respond(x: Tensor, weight: Tensor, operator: str, k: Softness, window: Windowed, eps: float) -> Tensor:
    """The response, before gain and bias, of (N, C, H, W) that ``lies_in_rows`` to (C, 1, U, V): (N, C, P, Q)."""
    out = torch.empty(
        shape_of_response(x, weight, window), dtype=torch.float32, device="cpu", memory_format=torch.channels_last
    )
    weight = weight.contiguous()
    frame, terms, alive = described(x, out, tuple(weight.shape[2:]), operator, k, window)
    tensors = Depthwise(x.data_ptr(), weight.data_ptr(), None, None, out.data_ptr(), None, None, None)
    checked(library().depthwise(*map(ctypes.byref, (tensors, frame, terms)), eps))
    del alive
    return out


def respond_backward(
    gradient: Tensor,
    response: Tensor,
    x: Tensor,
    weight: Tensor,
    operator: str,
    k: Softness,
    window: Windowed,
    eps: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by input and weight, and (2, C): sums of the gradient with the response, and for k.

    Args:
        gradient: by the response, which both lie as ``x`` does.
        needs_x: whether the first is wanted; else it is empty. Likewise the sums are zero but for a learned k.
    """
    dense = weight.contiguous()
    by_x, by_weight = torch.empty_like(x) if needs_x else x.new_empty(0), torch.empty_like(dense)
    sums = response.new_zeros((2, x.shape[1]))
    frame, terms, alive = described(x, response, tuple(weight.shape[2:]), operator, k, window)
    tensors = Depthwise(
        *(tensor.data_ptr() for tensor in (x, dense, gradient, response)),
        None,
        by_x.data_ptr() if needs_x else None,
        by_weight.data_ptr(),
        sums.data_ptr() if isinstance(k, Tensor) else None,
    )
    checked(library().depthwise_backward(*map(ctypes.byref, (tensors, frame, terms)), eps))
    del alive
    return by_x, by_weight, sums
