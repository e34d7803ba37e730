"""Scales and statistics from a few batches: cumulative BatchNorm averages, gains that match the donor's spread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.calibrate.absorb import write_scale_
from spherify.calibrate.pair import Pair, angular_call, check_finite, inputs_of
from spherify.calibrate.parts import Part, parts_of
from spherify.calibrate.patches import output_rows
from spherify.calibrate.world import World
from spherify.graph.flow import CONV_FUNCTIONS, is_batch_norm


@contextlib.contextmanager
def averaging(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within it the norms take plain averages over all batches, from the first on; their momenta come back."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def average_norms_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """BatchNorm statistics anew, all in one pass, without donor or graph. The modes are the caller's to restore."""
    model.eval()
    norms, order = norms_of(model), dict[nn.Module, None]()
    hooks = [norm.register_forward_hook(lambda norm, *_: order.setdefault(norm)) for norm in norms]
    try:
        with averaging(norms):
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    paths = {module: path for path, module in model.named_modules()}
    for norm in order:
        for statistics in (norm.running_mean, norm.running_var):
            assert isinstance(statistics, Tensor)
            check_finite(paths[norm], "its input in the converted model", statistics)


@torch.no_grad()
def match_statistics_(pair: Pair, progress: Callable[[str], None] = lambda name: None) -> None:
    """In graph order: each BatchNorm gets its input's statistics, each gain and bias the donor's mean and spread."""
    run = pair.student.recorded
    parts = parts_of(run, kept=False)
    for part in parts:
        for call in part.calls:
            pair.student.overrides[call] = angular_call(part, run.nodes[call].target)
    stations: list[tuple[int, Part | None]] = [(part.calls[0], part) for part in parts if part.has_gain]
    stations += [(position, None) for position, node in enumerate(run.nodes) if is_batch_norm(node)]
    pair.student.want([len(run.nodes) - 1])
    pair.donor.want([len(pair.donor.recorded.nodes) - 1])
    for position, owner in sorted(stations, key=lambda station: station[0]):
        progress(run.path(position))
        if owner is None:
            match_norm_(pair.student, position)
        else:
            match_gain_(pair, owner)


class Moments:
    """Mean and variance of each channel over everything it was shown."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        self.count += len(rows)
        self.total = self.total.to(rows) + rows.sum(0)
        self.squares = self.squares.to(rows) + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return (self.total / self.count).float()

    @property
    def variance(self) -> Tensor:
        mean = self.total / self.count
        return (self.squares / self.count - mean.square()).clamp_min(0).float()


def match_norm_(world: World, position: int) -> None:
    norm = world.recorded.model.get_submodule(world.recorded.path(position))
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return
    moments = Moments()
    source = inputs_of(world.recorded, position)
    world.advance(source, lambda number, values: moments.add(output_rows(values[0], True)))
    check_finite(world.recorded.path(position), "its input in the converted model", moments.mean)
    norm.running_mean.copy_(moments.mean)
    norm.running_var.copy_(moments.variance)


def match_gain_(pair: Pair, part: Part) -> None:
    """Gain and bias with which each channel has the donor's mean and spread, over all calls of the layer."""
    student, donor, call = pair.student, pair.donor, part.calls[0]
    is_conv = student.recorded.nodes[call].target in CONV_FUNCTIONS
    mine, theirs = Moments(), Moments()
    student.advance(inputs_of(student.recorded, call))
    for number in range(len(student.batches)):
        mine.add(output_rows(student.call(number, call), is_conv))
    donor.advance([pair.twin[call]], lambda number, values: theirs.add(output_rows(values[0], is_conv)))
    check_finite(part.name, "its output in the donor", theirs.mean)
    check_finite(part.name, "its input in the converted model", mine.mean)
    gain = part.module.output_gain()  # type: ignore[operator,union-attr]
    factor = (theirs.variance / mine.variance.clamp_min(1e-12)).sqrt()
    has_bias = part.can_shift(student.recorded)
    bias = part.bias[part.rows].detach().float() if has_bias and part.bias is not None else torch.zeros_like(factor)
    shift = theirs.mean - factor * (mine.mean - bias)
    write_scale_(part, gain[part.rows].detach().float() * factor, shift if has_bias else bias, mine.mean, mine.variance)
