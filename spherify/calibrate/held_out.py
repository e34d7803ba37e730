"""What held-out images choose: which of several changes of a network is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spherify.calibrate.outputs import Outputs
from spherify.calibrate.subspace import Solvable


def best_of_(
    outputs: Outputs, unknowns: Sequence[Solvable], changes: list[list[Tensor]], before: float
) -> tuple[float, int | None]:
    """Make the change with the least loss on held-out images; no change where none lowers it.

    Returns:
        The loss then, and the number of the change, None where there was none.
    """
    tensors = [tensor for unknown in unknowns for tensor in unknown.tensors]
    start = [tensor.clone() for tensor in tensors]
    best, chosen, kept = before, None, start
    for number, change in enumerate(changes):
        for unknown, step in zip(unknowns, change, strict=True):
            unknown.add_(step)
        loss = outputs.loss()
        if loss < best:  # never where the loss is not a number
            best, chosen, kept = loss, number, [tensor.clone() for tensor in tensors]
        for tensor, value in zip(tensors, start, strict=True):
            tensor.copy_(value)
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.copy_(value)
    return best, chosen


def take_mean_(
    outputs: Outputs, unknowns: Sequence[Solvable], states: Sequence[Sequence[Tensor]], before: float
) -> float:
    """Take the mean of the last 2, 4, 8, ... states with the least loss on held-out images, if it is less than before.

    Returns:
        The loss then.
    """
    tensors = [tensor for unknown in unknowns for tensor in unknown.tensors]
    best, kept, count = before, [tensor.clone() for tensor in tensors], 2
    while count <= len(states):
        for tensor, *values in zip(tensors, *states[-count:], strict=True):
            tensor.copy_(torch.stack(values).mean(0))
        loss = outputs.loss()
        if loss < best:
            best, kept = loss, [tensor.clone() for tensor in tensors]
        count *= 2
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.copy_(value)
    return best
