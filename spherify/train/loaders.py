"""Batches for training, whose order and augmentation follow from seed, epoch and position alone."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from spherify.data.batches import loader_of
from spherify.data.dataset import DataSet
from spherify.data.preprocess import Preprocessing, preprocessing_for
from spherify.errors import FileError, SpherifyError
from spherify.train.augment import Augmented, training_transform
from spherify.train.on_device import device_batches
from spherify.train.order import Batch, Order
from spherify.train.recipe import Recipe


class Resumable(Protocol):
    """Training batches that can be had again from any place: what an interrupted run needs to go on."""

    def __len__(self) -> int: ...

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch from number ``first`` on."""


@dataclass(frozen=True, kw_only=True)
class Loaders:
    """What ``fit`` trains on and tests with.

    Attributes:
        train: any iterable of (inputs, labels) batches that has a length, or a ``Resumable``.
        test: any iterable of (inputs, labels) batches, this process's share of the images; None: no tests.
        classes: names of the classes, where they are known.
    """

    train: Iterable[Batch] | Resumable
    test: Iterable[Batch] | None = None
    classes: tuple[str, ...] = ()


def loaders_for(
    model: nn.Module | Preprocessing,
    data: DataSet,
    recipe: Recipe,
    *,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    device: str | torch.device = "cpu",
) -> Loaders:
    """The batches of a data set by a recipe, for one of several processes.

    Args:
        model: sees the images as ``preprocessing_for`` says; or that itself.
        workers: processes that read images; 0 reads in this one.
        rank, world: number of this process, and of all.
        device: where ``data_on_device`` puts the images.

    Raises:
        OptionError: there are fewer training images than one step takes.
    """
    how = model if isinstance(model, Preprocessing) else preprocessing_for(model, data, image_size=recipe.img_size)
    order = Order(len(data.train), recipe.batch_size, recipe.grad_accum_steps, recipe.seed, rank=rank, world=world)
    own = range(rank, len(data.test), world)  # each image in one process, and once
    if recipe.data_on_device:
        on_device = device_batches(data, how, recipe, order, own, torch.device(device))
        return Loaders(train=on_device[0], test=on_device[1], classes=data.classes)
    train = TrainingBatches(data, how, recipe, order, workers)
    test_batch = max(recipe.batch_size, 64)
    test = Checked(loader_of(data.test, how, test_batch, own, workers=workers))
    return Loaders(train=train, test=test, classes=data.classes)


class TrainingBatches:
    """Augmented images of a data set from a loader of torch, from any place in any epoch."""

    def __init__(self, data: DataSet, how: Preprocessing, recipe: Recipe, order: Order, workers: int) -> None:
        self.order = order
        images = Augmented(data.train, training_transform(how, recipe, mirrors=data.mirrors))
        self.loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=order,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=leave_interrupts_to_the_parent,
        )

    def __len__(self) -> int:
        return self.order.count

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        self.order.epoch, self.order.first = epoch, first
        yield from Checked(self.loader)


def leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent finishes its step and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Checked:
    """A loader whose workers' errors are told in one line, as if they had happened here."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        state = torch.get_rng_state()  # a loader draws a seed for its workers, and a resumed run draws once more
        iterator = iter(self.loader)
        torch.set_rng_state(state)
        while True:
            try:
                yield next(iterator)
            except StopIteration:
                return
            except SpherifyError as error:
                raise FileError(last_line(error)) from error
            except OSError as error:
                raise FileError(f"the images cannot be read ({last_line(error)}); restore them.") from error
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise SpherifyError(
                    f"a process that reads images ended ({last_line(error)}); try again with fewer --workers."
                ) from error


def last_line(error: Exception) -> str:
    """The message itself: before it a worker writes its traceback, and the class of the error."""
    line = str(error).strip().splitlines()[-1]
    return re.sub(r"^[\w.]*Error: ", "", line)
