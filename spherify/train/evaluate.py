"""How good a model is: accuracy, loss, every class, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn

from spherify.errors import OptionError
from spherify.train.objective import logits_of
from spherify.train.order import Batch
from spherify.train.prefetch import prefetched


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came out, over all processes.

    Attributes:
        top1, top5: percent of the images whose class is the first, among the first five; of fewer than five classes,
            all of them are among the first five.
        loss: mean cross-entropy of the margin-free logits.
        images: how many, each counted once.
        images_per_second: loading included.
        classes: names.
        confusion: (classes, classes) counts; rows are true classes, columns answers.
    """

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float
    classes: tuple[str, ...]
    confusion: np.ndarray

    def per_class(self) -> list[dict[str, Any]]:
        """Of each class its name, number of images, and percent of them recognised; None where there are none."""
        counts = self.confusion.sum(1)
        return [
            {
                "class": name,
                "images": int(count),
                "top1": round(100 * float(self.confusion[number, number]) / int(count), 3) if count else None,
            }
            for number, (name, count) in enumerate(zip(self.classes, counts, strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "top1": round(self.top1, 4),
            "top5": round(self.top5, 4),
            "loss": round(self.loss, 6),
            "images": self.images,
            "images_per_second": round(self.images_per_second, 1),
            "per_class": self.per_class(),
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    classes: Sequence[str] = (),
    device: torch.device | str | None = None,
    channels_last: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    is_stopped: Callable[[], bool] = lambda: False,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation | None:
    """Run a model over batches in eval mode; every module's mode is put back afterwards.

    In a process group each process gives its own share of the images, and all get the whole result.

    Args:
        batches: (inputs, labels).
        classes: names; numbers where they are not given.
        device: where to; that of the model where None.
        autocast: made anew around each batch.
        is_stopped: asked before each batch; once true, the result is None.
        on_batch: told the number of images after each batch.

    Raises:
        OptionError: the labels do not go with the number of the model's outputs, or there are no images.
    """
    device = torch.device(device) if device is not None else device_of(model)
    totals = Totals(len(classes))
    start = time.perf_counter()
    with in_eval_mode(model):
        for inputs, labels in prefetched(batches, device, channels_last=channels_last):
            if is_stopped():
                return None
            with autocast():
                logits = logits_of(model(inputs)).float()
            totals.add(logits, labels)
            if on_batch is not None:
                on_batch(len(labels))
    return totals.evaluation(time.perf_counter() - start, classes, device)


class Totals:
    """Sums over batches, and at the end over processes."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.sums: Tensor | None = None  # loss, hits, hits among five, images
        self.confusion: Tensor | None = None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        count, outputs = len(labels), logits.shape[1]
        if self.classes not in (0, outputs) or int(labels.max()) >= outputs:
            wanted = self.classes or int(labels.max()) + 1
            raise OptionError(f"the model answers for {outputs} classes, and the data have {wanted}.")
        loss = F.cross_entropy(logits, labels, reduction="sum")
        shares = accuracy(logits, labels, topk=(1, 5))
        sums = torch.stack([loss.double(), *(share.double() * count / 100 for share in shares), loss.new_tensor(count)])
        pairs = torch.bincount(labels * outputs + logits.argmax(1), minlength=outputs**2)
        self.sums = sums if self.sums is None else self.sums + sums
        self.confusion = pairs if self.confusion is None else self.confusion + pairs

    def evaluation(self, seconds: float, classes: Sequence[str], device: torch.device) -> Evaluation:
        self.share(device)
        if self.sums is None or self.confusion is None:
            raise OptionError("there are no images to evaluate the model on.")
        loss, hits, among_five, count = (float(value) for value in self.sums)
        outputs = round(len(self.confusion) ** 0.5)
        return Evaluation(
            top1=100 * round(hits) / count,
            top5=100 * round(among_five) / count,
            loss=loss / count,
            images=int(count),
            images_per_second=count / max(seconds, 1e-9),
            classes=tuple(classes) or tuple(map(str, range(outputs))),
            confusion=self.confusion.view(outputs, outputs).cpu().numpy(),
        )

    def share(self, device: torch.device) -> None:
        """Add up over the processes; one of them may have had no image."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        size = torch.tensor(0 if self.confusion is None else len(self.confusion), device=device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)
        if self.sums is None or self.confusion is None:
            self.sums = torch.zeros(4, dtype=torch.float64, device=device)
            self.confusion = torch.zeros(int(size), dtype=torch.int64, device=device)
        if int(size):
            dist.all_reduce(self.sums)
            dist.all_reduce(self.confusion)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within, and afterwards of each module the mode it had: a frozen BatchNorm stays frozen."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    return next((value.device for value in model.parameters()), torch.device("cpu"))
