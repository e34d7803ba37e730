"""Arithmetic in float32 or wider, whatever autocast says."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """In float32, or in its own type where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def type_of_product(x: Tensor, weight: Tensor) -> torch.dtype:
    """What the plain convolution would compute in: autocast's type, or that of its arguments."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "meta":  # where autocast does not exist
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
