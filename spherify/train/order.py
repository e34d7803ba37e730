"""Which images make which batch of which process: from seed, epoch and position alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from spherify.errors import OptionError
from spherify.train.augment import seed_of

Batch = tuple[Tensor, Tensor]  # inputs (B, ...), labels (B,)


class Order(Sampler[list[tuple[int, int]]]):
    """Which images make which batch of this process, and with which random numbers.

    An epoch is a random order of all images, cut into batches for all processes together and then among them: two
    processes see in one step what one process with twice the batch size sees. What does not fill a step is left
    out, other images in each epoch.
    """

    def __init__(self, images: int, batch_size: int, accumulated: int, seed: int, *, rank: int = 0, world: int = 1):
        together = batch_size * world
        count = images // (together * accumulated) * accumulated
        if count == 0:
            raise OptionError(
                f"{images} training images do not fill one step of {together * accumulated}; lower the batch size."
            )
        self.images, self.batch_size, self.together, self.count = images, batch_size, together, count
        self.seed, self.rank = seed, rank
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        return self.count - self.first

    def indices(self, epoch: int, batch: int) -> np.ndarray:
        """(B,): images of one batch."""
        start = batch * self.together + self.rank * self.batch_size
        return self.permutation(epoch)[start : start + self.batch_size]

    def permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.images)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.epoch, self.permutation(self.epoch)
        for batch in range(self.first, self.count):
            start = batch * self.together + self.rank * self.batch_size
            own = order[start : start + self.batch_size]
            yield [(int(index), seed_of(self.seed, epoch, int(index))) for index in own]
