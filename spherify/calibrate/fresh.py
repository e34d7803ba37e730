"""Images that nobody has seen yet, made of those at hand: mirrored, shifted, mixed in pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 8  # by up to this part of the side
MIXED = 0.5  # of the images
LEAST_SHARE = 0.5  # of the first image in a mix of two


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
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored.to(images.device), images.flip(3), images)
    height, width = images.shape[2:]
    down, right = height // SHIFT, width // SHIFT
    wide = F.pad(images, (right, right, down, down), mode="reflect")
    tops = torch.randint(0, 2 * down + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(0, 2 * right + 1, (len(images),), generator=generator).tolist()
    cuts = zip(wide, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + height, left : left + width] for image, top, left in cuts])


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every second one, by chance, as a x + (1 - a) y with another one y, a drawn evenly from [LEAST_SHARE, 1].

    Args:
        images: (N, C, H, W); anything else comes back as it is.

    Source: Zhang et al. 2018, mixup, arXiv:1710.09412.
    """
    if not can_be_changed(images):
        return images
    others = images[torch.randperm(len(images), generator=generator).to(images.device)]
    shares = LEAST_SHARE + (1.0 - LEAST_SHARE) * torch.rand(len(images), 1, 1, 1, generator=generator)
    alone = torch.rand(len(images), 1, 1, 1, generator=generator) >= MIXED
    return torch.lerp(others, images, torch.where(alone, torch.ones(()), shares).to(images))
