"""What held-out images choose: which of several changes of a network is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from spherify.calibrate.outputs import Outputs
from spherify.calibrate.unknowns import Unknown


def best_of_(
    outputs: Outputs, unknowns: Sequence[Unknown], changes: Sequence[Sequence[Tensor]], before: float
) -> tuple[float, int | None]:
    """Make the change with the least loss on held-out images; no change where none lowers it.

    Args:
        changes: one tensor for each of the unknowns.

    Returns:
        The loss then, and the number of the change, None where there was none.
    """
    return make_best_(outputs, tensors_of(unknowns), [partial(add_, unknowns, change) for change in changes], before)


def take_mean_(
    outputs: Outputs, unknowns: Sequence[Unknown], states: Sequence[Sequence[Tensor]], before: float
) -> float:
    """Take the mean of the last 2, 4, 8, ... states with the least loss on held-out images, if it is less than before.

    Returns:
        The loss then.
    """
    tensors = tensors_of(unknowns)
    counts = [2**power for power in range(1, len(states).bit_length())]
    loss, _ = make_best_(outputs, tensors, [partial(put_mean_, tensors, states[-count:]) for count in counts], before)
    return loss


def make_best_(
    outputs: Outputs, tensors: Sequence[Tensor], makers: Sequence[Callable[[], None]], before: float
) -> tuple[float, int | None]:
    """Each maker changes the tensors from what they are; the one with less loss than before, and the least, stays."""
    start = [tensor.clone() for tensor in tensors]
    best, chosen, kept = before, None, start
    for number, make in enumerate(makers):
        make()
        loss = outputs.loss()
        if loss < best:  # never where the loss is not a number
            best, chosen, kept = loss, number, [tensor.clone() for tensor in tensors]
        put_(tensors, start)
    put_(tensors, kept)
    return best, chosen


def tensors_of(unknowns: Sequence[Unknown]) -> list[Tensor]:
    return [tensor for unknown in unknowns for tensor in unknown.tensors]


def add_(unknowns: Sequence[Unknown], change: Sequence[Tensor]) -> None:
    for unknown, step in zip(unknowns, change, strict=True):
        unknown.add_(step)


def put_mean_(tensors: Sequence[Tensor], states: Sequence[Sequence[Tensor]]) -> None:
    put_(tensors, [torch.stack(values).mean(0) for values in zip(*states, strict=True)])


def put_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
