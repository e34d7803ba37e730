"""All images of a small set on the device, and augmentation there: no loader can feed a small network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from spherify.data.dataset import DataSet, Split
from spherify.data.preprocess import Preprocessing, test_transform
from spherify.errors import OptionError
from spherify.train.augment import flip_share, own_random_numbers, seed_of
from spherify.train.order import Batch, Order
from spherify.train.recipe import PAD, Recipe

TEST_BATCH = 512


def device_batches(
    data: DataSet, how: Preprocessing, recipe: Recipe, order: Order, own: Sequence[int], device: torch.device
) -> tuple[DeviceBatches, Slices]:
    """Both splits on the device; every process holds all training images and its share of the test images.

    Raises:
        OptionError: the recipe asks for augmentation that runs on single images on the CPU alone.
    """
    asked = {"aa": recipe.aa, "color_jitter": recipe.color_jitter}
    if wrong := [name for name, value in asked.items() if value]:
        raise OptionError(f"{' and '.join(wrong)} cannot run on the device; leave out that, or data_on_device.")
    if recipe.train_crop_mode in ("rkrc", "rkrr"):
        raise OptionError(
            f"train_crop_mode {recipe.train_crop_mode} cannot run on the device; choose rrc, pad or none."
        )
    train = DeviceBatches(stacked(data.train, how, range(len(data.train)), device), recipe, order, data.mirrors)
    return train, Slices(stacked(data.test, how, own, device))


def stacked(split: Split, how: Preprocessing, own: Sequence[int], device: torch.device) -> Batch:
    """Images as in the test, normalised, and their labels, on the device."""
    transform = test_transform(how)
    images = torch.stack([transform(split[index][0]) for index in own])
    return images.to(device), torch.from_numpy(split.labels[np.asarray(own)]).to(device)


class Slices:
    """Batches of tensors that lie on the device, in their order."""

    def __init__(self, tensors: Batch, size: int = TEST_BATCH) -> None:
        self.tensors, self.size = tensors, size

    def __len__(self) -> int:
        return math.ceil(len(self.tensors[1]) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        images, labels = self.tensors
        yield from zip(images.split(self.size), labels.split(self.size), strict=True)


class DeviceBatches:
    """Training batches taken from tensors on the device and augmented there."""

    def __init__(self, tensors: Batch, recipe: Recipe, order: Order, mirrors: bool) -> None:
        self.images, self.labels = tensors
        self.recipe, self.order = recipe, order
        self.hflip = flip_share(recipe, mirrors)
        device = self.images.device.type
        self.erase = RandomErasing(recipe.reprob, mode=recipe.remode, device=device) if recipe.reprob else None

    def __len__(self) -> int:
        return self.order.count

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        device = self.images.device
        permutation = torch.from_numpy(self.order.permutation(epoch)).to(device)
        for batch in range(first, self.order.count):
            start = batch * self.order.together + self.order.rank * self.order.batch_size
            own = permutation[start : start + self.order.batch_size]
            seed = seed_of(self.order.seed, epoch, batch, self.order.rank)
            yield self.augmented(self.images[own], seed), self.labels[own]

    def augmented(self, images: Tensor, seed: int) -> Tensor:
        """(B, C, H, W), each image by random numbers of its own."""
        recipe = self.recipe
        if recipe.no_aug:
            return images
        generator = torch.Generator(images.device).manual_seed(seed)
        if recipe.train_crop_mode == "rrc":
            images = random_resized_crops(images, recipe.crop_scale, recipe.ratio, generator)
        elif recipe.train_crop_mode == "pad":
            images = padded_crops(images, generator)
        images = flipped(images, self.hflip, 3, generator)
        images = flipped(images, recipe.vflip, 2, generator)
        if self.erase is None:
            return images
        with own_random_numbers(seed):
            return self.erase(images.clone())


def uniform(images: Tensor, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """(B,)."""
    return torch.rand(len(images), generator=generator, device=images.device) * (high - low) + low


def flipped(images: Tensor, share: float, dim: int, generator: torch.Generator) -> Tensor:
    if not share:
        return images
    chosen = uniform(images, generator) < share
    return torch.where(chosen[:, None, None, None], images.flip(dim), images)


def padded_crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crops of images with mirrored pixels around them, each image at its own place."""
    height, width = images.shape[2:]
    rows = mirrored(shifts(images, generator), height)  # (B, H)
    columns = mirrored(shifts(images, generator), width)  # (B, W)
    number = torch.arange(len(images), device=images.device)
    return images.permute(0, 2, 3, 1)[number[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def shifts(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(-PAD, PAD + 1, (len(images),), generator=generator, device=images.device)


def mirrored(shift: Tensor, length: int) -> Tensor:
    """(B, length): places in a line of pixels, shifted; beyond its ends the line is mirrored, its last pixel twice."""
    place = torch.arange(length, device=shift.device)[None, :] + shift[:, None]
    place = torch.where(place < 0, -place - 1, place)
    return torch.where(place >= length, 2 * length - 1 - place, place).clamp(0, length - 1)


def random_resized_crops(
    images: Tensor, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """A part of each image, of random area, form and place, enlarged to the whole size (bilinear)."""
    area = uniform(images, generator, *scale)
    low, high = np.log(ratio[0]), np.log(ratio[1])
    form = uniform(images, generator, low, high).exp().sqrt()
    width, height = (area.sqrt() * form).clamp(max=1), (area.sqrt() / form).clamp(max=1)  # shares of a side
    x = (uniform(images, generator) * 2 - 1) * (1 - width)  # centre of the part, the image being [-1, 1]
    y = (uniform(images, generator) * 2 - 1) * (1 - height)
    zero = torch.zeros_like(x)
    part = torch.stack([torch.stack([width, zero, x], dim=1), torch.stack([zero, height, y], dim=1)], dim=1)
    grid = F.affine_grid(part.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
