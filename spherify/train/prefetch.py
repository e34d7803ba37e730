"""Batches on their way to the device, one ahead of the one that is computed on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from spherify.train.order import Batch


def prefetched(batches: Iterable[Batch], device: torch.device, *, channels_last: bool = False) -> Iterator[Batch]:
    """The same batches on the device.

    On a GPU the next batch is copied, out of pinned memory and in a stream of its own, while the one before is
    computed on.
    """
    if device.type != "cuda":
        for inputs, labels in batches:
            yield laid_out(inputs.to(device), channels_last), labels.to(device)
        return
    stream = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for inputs, labels in batches:
        with torch.cuda.stream(stream):
            copied = laid_out(inputs.to(device, non_blocking=True), channels_last), labels.to(device, non_blocking=True)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(stream)
        for value in copied:  # its memory must not be given away before this stream is done with it
            value.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead


def laid_out(inputs: Tensor, channels_last: bool) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if channels_last and inputs.ndim == 4 else inputs
