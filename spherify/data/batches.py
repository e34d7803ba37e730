"""Batches of a data set as tensors, ready for a model: for calibration, for tests, for a loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from spherify.data.dataset import DataSet, Split
from spherify.data.preprocess import Preprocessing, Transform, preprocessing_for, test_transform
from spherify.errors import OptionError


class Transformed(Dataset):
    """A split whose images went through a transform: ``[i]`` is a (C, H, W) tensor and its class."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.split[index]
        return self.transform(image), label


def batches(
    data: DataSet,
    model: nn.Module | Preprocessing,
    batch_size: int = 32,
    count: int | None = None,
    *,
    split: str = "train",
    shuffle: bool = True,
    seed: int = 0,
    folder: str | None = None,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches as the model sees them in a test, without augmentation; the same ones at every pass.

    Args:
        data: of ``open_data``.
        model: sees the images as ``preprocessing_for`` says; or that itself.
        batch_size: images a batch; the last one may be smaller.
        count: batches; None for the whole split.
        split: train, test.
        shuffle: take images in a random order, which does not change from pass to pass; else in the split's.
        seed: of that order.
        folder: where the model was loaded from, if it was.

    Returns:
        An iterable of ((B, C, H, W) float tensor, (B,) labels), which has a length and can be run through again.

    Raises:
        OptionError: a number is out of range, or the model takes other images.
        FileError: while iterating, for an image that cannot be read.
    """
    if batch_size < 1 or (count is not None and count < 1):
        raise OptionError(f"batch_size={batch_size}, count={count}: give 1 or more.")
    how = model if isinstance(model, Preprocessing) else preprocessing_for(model, data, folder=folder)
    chosen = data.split(split)
    order = np.random.default_rng(seed).permutation(len(chosen)) if shuffle else np.arange(len(chosen))
    return loader_of(chosen, how, batch_size, order[: None if count is None else count * batch_size].tolist())


def loader_of(
    split: Split, how: Preprocessing, batch_size: int, order: Sequence[int] | None = None, *, workers: int = 0
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader over some images of a split in this order, seen as in a test."""
    images: Dataset = Transformed(split, test_transform(how))
    return DataLoader(
        images if order is None else Subset(images, order),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
