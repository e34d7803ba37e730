"""Images that nobody has seen yet, made of those at hand: mirrored, shifted, patched with one another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 8  # by up to this part of the side
MOST_PATCHED = 0.5  # of an image's area


def can_be_changed(batch: Tensor) -> bool:
    """They are images: (N, C, H, W), floating-point."""
    return batch.dim() == 4 and batch.is_floating_point()


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each mirrored left to right or not, and shifted by up to an eighth of its sides over its mirrored border.

    Args:
        images: (N, C, H, W); anything else comes back as it is.
    """
    if not can_be_changed(images):
        return images
    count, _, height, width = images.shape
    most = [side // SHIFT for side in (height, width)]
    down, right = (torch.randint(2 * step + 1, (count, 1), generator=generator).to(images.device) for step in most)
    mirrored = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
    wider = F.pad(images, (most[1], most[1], most[0], most[0]), mode="reflect").movedim(1, -1)
    rows = down + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = right + torch.where(mirrored, columns.flip(0), columns)
    every = torch.arange(count, device=images.device)[:, None, None]
    return wider[every, rows[:, :, None], columns[:, None]].movedim(-1, 1).contiguous()


def patched(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each with a rectangle of its own proportions, up to half of its area, taken from another one at the same place.

    Every pixel stays that of a photograph: a blend of two, or an enlarged one, is not what the network is made for.

    Args:
        images: (N, C, H, W); anything else comes back as it is.

    Source: Yun et al. 2019, CutMix, arXiv:1905.04899; the donor's answers to them take the place of labels, Beyer et
    al. 2022, Knowledge distillation: a good teacher is patient and consistent, arXiv:2106.05237.
    """
    if not can_be_changed(images):
        return images
    count, (height, width) = len(images), images.shape[2:]
    others = images[torch.randperm(count, generator=generator).to(images.device)]
    sides = (MOST_PATCHED * torch.rand(count, generator=generator)).sqrt()
    places = torch.rand(2, count, generator=generator)
    images = images.clone()
    for number, (side, top, left) in enumerate(zip(sides.tolist(), *places.tolist(), strict=True)):
        tall, wide = int(side * height), int(side * width)
        rows, columns = int(top * (height - tall + 1)), int(left * (width - wide + 1))
        area = (number, slice(None), slice(rows, rows + tall), slice(columns, columns + wide))
        images[area] = others[area]
    return images
