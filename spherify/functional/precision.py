"""Arithmetic in float32 or wider, whatever autocast says."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """In float32, or in its own type where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "meta":  # where autocast does not exist
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
