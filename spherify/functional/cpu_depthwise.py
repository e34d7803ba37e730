"""Depthwise layers on channels-last maps by one kernel each way, as compiled graphs call them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from spherify.functional import cpu_binding
from spherify.functional.cpu_binding import empty_at_once
from spherify.functional.cpu_kernels import (
    by_filter,
    checked,
    constants,
    elementwise,
    guard_of,
    sizes_of_output,
    window_of,
)
from spherify.functional.cpu_rows import describe_fit, hold, places_of, shape_of_sums

Windowed = tuple[Sequence[int], Sequence[int], Sequence[int]]  # stride, padding, dilation
Softness = Tensor | float | None


class Held(NamedTuple):
    """What serves all calls of a shape: addresses of the window and the response, and how the latter lies."""

    places: tuple[int, int]
    sizes: list[int]
    strides: tuple[int, ...]
    alive: list[object]


HELD: dict[tuple[object, ...], Held] = {}


@functools.cache
def library() -> ctypes.CDLL:
    kernels = cpu_binding.library()
    assert kernels is not None
    kernels.depthwise_at.argtypes = (*(c_void_p,) * 6, c_float)
    kernels.depthwise_backward_at.argtypes = (*(c_void_p,) * 10, c_float)
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


def described(x: Tensor, weight: Tensor, operator: str, k: Softness, window: Windowed) -> Held:
    """What serves all calls of a shape, found once.

    Args:
        x: (N, C, H, W), with the channels innermost.
    """
    stride, padding, dilation = tuple(window[0]), tuple(window[1]), tuple(window[2])
    kind, threads = Tensor if isinstance(k, Tensor) else k, torch.get_num_threads()
    key = (x.shape, weight.shape, stride, padding, dilation, operator, kind, threads)
    if (held := HELD.get(key)) is not None:
        return held
    threads = cpu_binding.threads_for(x.numel())
    frame, _ = window_of(x.shape, tuple(weight.shape[2:]), stride, padding, dilation, x.shape[1], True, threads)
    sizes = shape_of_response(x, weight, window)
    like = x.new_empty(sizes).contiguous(memory_format=torch.channels_last)
    terms, (_, *alive) = elementwise(like, like, operator, constants(operator, k), guard=guard_of(operator))
    describe_fit(terms, operator, k)
    places = ctypes.addressof(frame), ctypes.addressof(terms)
    return hold(HELD, key, Held(places, sizes, like.stride(), [frame, terms, *alive]))


def respond(x: Tensor, weight: Tensor, operator: str, k: Softness, window: Windowed, eps: float) -> Tensor:
    """The response, before gain and bias, of (N, C, H, W) that ``lies_in_rows`` to (C, 1, U, V): (N, C, P, Q)."""
    held, weight = described(x, weight, operator, k, window), weight.contiguous()
    out = empty_at_once(held.sizes, held.strides)
    soft = by_filter(k, weight.shape[0]) if isinstance(k, Tensor) else None
    checked(library().depthwise_at(*held.places, *places_of(x, weight, soft, out), eps))
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
        needs_x: whether the first is wanted; else it is empty, as the sums are but for a learned k.
    """
    held, dense = described(x, weight, operator, k, window), weight.contiguous()
    soft = by_filter(k, weight.shape[0]) if isinstance(k, Tensor) else None
    by_x = empty_at_once(x.shape, x.stride()) if needs_x else empty_at_once((0,), (1,))
    by_weight = empty_at_once(dense.shape, dense.stride())
    sums = empty_at_once(shape_of_sums(dense.shape[0], k), (dense.shape[0], 1))
    places = places_of(x, dense, soft, gradient, response, by_x if needs_x else None, by_weight, sums)
    checked(library().depthwise_backward_at(*held.places, *places, eps))
    return by_x, by_weight, sums
