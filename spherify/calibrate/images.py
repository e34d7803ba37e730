"""Calibration images: collected from whatever yields batches, checked, and cut to even batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spherify.errors import OptionError

FEWEST_IMAGES = 8
PIXELS_AT_ONCE = 400_000  # eight images of 224 pixels; of more, results lie outside the caches, and each takes longer
MOST_AT_ONCE = 128


def collected(batches: Iterable[Any], limit: int | None, device: torch.device) -> list[Tensor]:
    """Tensors (N, ...) of about equal size from batches that are inputs or (inputs, targets).

    Raises:
        OptionError: no images, too few, of several sizes, not numbers, or not finite.
    """
    if limit is not None and limit < FEWEST_IMAGES:
        raise OptionError(f"calibration with {limit} images is too few; give at least {FEWEST_IMAGES}.")
    parts: list[Tensor] = []
    count = 0
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        inputs = checked(batch[0] if isinstance(batch, (tuple, list)) and batch else batch, parts)
        parts.append(inputs if limit is None else inputs[: limit - count])
        count += len(parts[-1])
        if limit is not None and count >= limit:
            break
    if count < FEWEST_IMAGES:
        raise OptionError(f"calibration got {count} images; give at least {FEWEST_IMAGES}.")
    return cut(torch.cat(parts), device)


def checked(inputs: Any, before: list[Tensor]) -> Tensor:
    if not isinstance(inputs, Tensor) or inputs.dim() < 2:
        kind = f"a tensor of {inputs.dim()} dimensions" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise OptionError(f"calibration batches must be tensors (N, ...) or (inputs, targets); got {kind}.")
    if before and inputs.shape[1:] != before[0].shape[1:]:
        sizes = f"{tuple(before[0].shape[1:])} and {tuple(inputs.shape[1:])}"
        raise OptionError(f"calibration images have several sizes, {sizes}; give images of one size.")
    if inputs.is_floating_point() and not inputs.isfinite().all():
        raise OptionError("calibration images hold NaN or infinite numbers; check how they are read and normalised.")
    return inputs.detach()


def cut(images: Tensor, device: torch.device) -> list[Tensor]:
    """Batches for one step of the work; two sizes at most."""
    pixels = max(1, images[0].numel() // max(1, images.shape[1]))
    size = max(1, min(MOST_AT_ONCE, PIXELS_AT_ONCE // pixels))
    return [part.to(device) for part in images.split(size)]


def is_large(parts: Sequence[Tensor]) -> bool:
    """Values between layers are held in float16."""
    return sum(part.numel() for part in parts) > 20_000_000
