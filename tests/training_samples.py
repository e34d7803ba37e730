"""A small network, small data and short recipes for the tests of training."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from spherify.convert import spherify
from spherify.data.dataset import ArrayImages, DataSet
from spherify.train.conduct import Conduct
from spherify.train.recipe import Recipe, resolved

QUIET = Conduct(quiet=True, log_interval=1)
CLASSES = 3


def net(*, dropout: float = 0.0, norm: bool = False, seed: int = 0) -> nn.Module:
    """Two convolutions and a classifier, 8x8 grey images."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(8 * 16, CLASSES),
    )


def angular_net(operator: str = "cosine", **options) -> nn.Module:
    return spherify(net(**options), operator=operator, example_input=torch.zeros(2, 1, 8, 8))


def stripes(count: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, 8, 8) uint8 images of bright rows, bright columns, or neither, and their classes."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 80, (count, 8, 8))
    labels = np.arange(count) % CLASSES
    for image, label in zip(images, labels, strict=True):
        place = random.integers(0, 8)
        if label == 0:
            image[place] += 150
        elif label == 1:
            image[:, place] += 150
    return images.astype(np.uint8), labels


def data_set(count: int = 48, *, mirrors: bool = True) -> DataSet:
    return DataSet(
        name="stripes",
        classes=("rows", "columns", "none"),
        train=ArrayImages(*stripes(count)),
        test=ArrayImages(*stripes(18, seed=1)),
        mean=(0.2,),
        std=(0.2,),
        size=(1, 8, 8),
        mirrors=mirrors,
    )


def batches(count: int = 6, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of stripes as tensors: a loader as simple as can be."""
    images, labels = stripes(count * size, seed)
    inputs = torch.from_numpy(images).float()[:, None] / 100 - 0.5
    return list(zip(inputs.split(size), torch.from_numpy(labels).split(size), strict=True))


def recipe(**changes) -> Recipe:
    """Plain: SGD with a constant rate, no augmentation; with changes."""
    plain = Recipe(
        epochs=2, batch_size=8, opt="momentum", lr=0.05, weight_decay=0.0, sched="none", no_aug=True, img_size=8
    )
    return resolved(plain, **changes)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def are_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
