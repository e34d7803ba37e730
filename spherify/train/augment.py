"""What training images go through, by timm, and random numbers that belong to an image and not to a process."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from spherify.data.dataset import Split
from spherify.data.preprocess import Preprocessing, ToChannels, Transform
from spherify.train.recipe import PAD, Recipe


def training_transform(how: Preprocessing, recipe: Recipe, *, mirrors: bool) -> Transform:
    """From a PIL image to an augmented (C, H, W) tensor.

    Args:
        mirrors: whether a mirror image is of the same class, where the recipe leaves that open.
    """
    hflip = flip_share(recipe, mirrors)
    colour = ToChannels(how.input_size[0])
    if recipe.no_aug or recipe.train_crop_mode in ("pad", "none"):
        return transforms.Compose([colour, *plain_steps(how, recipe, hflip)])
    own = create_transform(
        input_size=how.input_size,
        is_training=True,
        train_crop_mode=recipe.train_crop_mode,
        scale=recipe.crop_scale,
        ratio=recipe.ratio,
        hflip=hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.aa,
        interpolation=how.interpolation,
        mean=how.mean,
        std=how.std,
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
    )
    return transforms.Compose([colour, own])


def flip_share(recipe: Recipe, mirrors: bool) -> float:
    if recipe.no_aug:
        return 0.0
    return (0.5 if mirrors else 0.0) if recipe.hflip is None else recipe.hflip


def plain_steps(how: Preprocessing, recipe: Recipe, hflip: float) -> list[Transform]:
    """Resized as in the test; with ``pad``, mirrored pixels around and a crop, as the authors of the paper do."""
    size = how.input_size[1:]
    steps: list[Transform] = [
        create_transform(
            input_size=how.input_size,
            is_training=True,
            no_aug=True,
            interpolation=how.interpolation,
            mean=how.mean,
            std=how.std,
        )
    ]
    if recipe.no_aug:
        return steps
    if recipe.train_crop_mode == "pad":
        steps.append(transforms.RandomCrop(size, padding=PAD, padding_mode="symmetric"))
    if hflip:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if recipe.vflip:
        steps.append(transforms.RandomVerticalFlip(recipe.vflip))
    if recipe.reprob:
        steps.append(RandomErasing(recipe.reprob, mode=recipe.remode, device="cpu"))
    return steps


class Augmented(Dataset):
    """A split whose images are augmented by random numbers of their own.

    ``[(index, seed)]`` is a (C, H, W) tensor and its class, the same whenever and in whatever process it is asked for.
    """

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        image, label = self.split[index]
        with own_random_numbers(seed):
            return self.transform(image), label


def seed_of(*parts: int) -> int:
    """A number of 32 bits from several, so that neighbours have nothing in common."""
    text = " ".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """All three generators of the CPU started from ``seed``, and put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPU's too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
