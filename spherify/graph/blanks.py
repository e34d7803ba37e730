"""Tensors without data, and questions about their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PLAIN_TYPES = (Tensor, nn.Parameter)  # a subclass may have its own answer


def blank(shape: Iterable[int], like: Tensor) -> Tensor:
    """A contiguous tensor; ``x.new_empty`` is answered in Python, slowly."""
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta")


def blank_like(x: Tensor) -> Tensor:
    """``torch.empty_like(x, device="meta")``, by the strides where these fill the memory without a gap."""
    if x.layout is not torch.strided or x.is_quantized:
        return torch.empty_like(x, device="meta")
    strides = x.stride()
    if x.is_contiguous() or is_dense(x.shape, strides):
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")
    return torch.empty_like(x, device="meta")


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_like(x: Tensor, other: Any) -> bool:
    """Whether ``other`` is a tensor without data of the same floating-point type."""
    return type(other) in PLAIN_TYPES and other.is_meta and other.dtype == x.dtype and x.is_floating_point()


def common_shape(one: Sequence[int], two: Sequence[int]) -> tuple[int, ...] | None:
    """The shape to which two are broadcast, or None."""
    longer, shorter = (one, two) if len(one) >= len(two) else (two, one)
    start = len(longer) - len(shorter)
    shape = list(longer)
    for index, size in enumerate(shorter, start):
        if shape[index] == 1:
            shape[index] = size
        elif size not in (1, shape[index]):
            return None
    return tuple(shape)
