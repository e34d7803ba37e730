"""What is measured between two rows of the log."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from spherify.train.history import Row
from spherify.train.objective import logits_of


class Meter:
    """Loss, accuracy and speed since the last row of the log; on the device until they are asked for."""

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.hits: Tensor | None = None
        self.images = self.labelled = self.batches = 0
        self.start = time.monotonic()
        self.shown_at = 0.0
        self.newest: Tensor | None = None

    def add(self, loss: Tensor, outputs: Any, labels: Tensor | None, count: int, classes: int | None) -> None:
        """One batch. ``labels`` is None behind mixup, where an image has no one class."""
        self.newest = loss.detach()
        total = self.newest.double() if loss.device.type != "mps" else self.newest
        self.loss = total if self.loss is None else self.loss + total
        self.images, self.batches = self.images + count, self.batches + 1
        if labels is not None:
            hits = (logits_of(outputs, classes).detach().argmax(1) == labels).sum()
            self.hits = hits if self.hits is None else self.hits + hits
            self.labelled += count

    def recent_loss(self) -> float | None:
        return None if self.newest is None else float(self.newest)

    def speed(self, world: int) -> float:
        return self.images * world / max(time.monotonic() - self.start, 1e-9)

    def means(self, accelerator: Any) -> Row:
        """Over all processes."""
        if self.loss is None:
            return {}
        hits = self.hits if self.hits is not None else torch.zeros((), device=self.loss.device)
        numbers = [
            self.loss,
            hits.to(self.loss.dtype),
            *(self.loss.new_tensor(n) for n in (self.labelled, self.batches)),
        ]
        loss, hits_all, labelled, batches = accelerator.reduce(torch.stack(numbers), reduction="sum").tolist()
        row: Row = {"train_loss": loss / batches, "images_per_second": round(self.speed(accelerator.num_processes), 1)}
        if labelled:
            row["train_top1"] = 100 * hits_all / labelled
        return row
