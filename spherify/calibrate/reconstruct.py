"""Block-wise reconstruction: a short optimisation towards the donor's activations, on unlabelled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherify.calibrate.blocks import Block, blocks_of
from spherify.calibrate.pair import Pair, angular_call
from spherify.calibrate.parts import parts_of
from spherify.errors import SpherifyError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Attributes:
        passes: over the images for each block.
        final_passes: over the images for the whole network, on the donor's outputs.
        rate, final_rate: of Adam, relative to the root mean square of each Parameter.
        seed: of the order of the batches.
    """

    passes: int = 4
    final_passes: int = 4
    rate: float = 0.003
    final_rate: float = 0.0007
    seed: int = 0


def reconstruct_(pair: Pair, schedule: Schedule, progress: Callable[[str], None] = lambda name: None) -> None:
    """Optimise block after block, each on what the blocks before it give, then the whole network on its outputs."""
    run = pair.student.recorded
    parts = parts_of(run, kept=True)
    for part in parts:
        if part.is_angular:
            for call in part.calls:
                pair.student.overrides[call] = angular_call(part, run.nodes[call].target)
    pair.student.want([len(run.nodes) - 1])
    pair.donor.want([len(pair.donor.recorded.nodes) - 1])
    blocks = blocks_of(run, parts)
    inputs = [values[0] for values in pair.student.values]
    generator = torch.Generator().manual_seed(schedule.seed)
    for block in blocks if schedule.passes else ():
        progress(" ".join(part.name for part in block.parts[:1]))
        fit_block_(pair, block, schedule, generator)
    progress("outputs")
    for number, values in enumerate(pair.student.values):
        values.clear()
        values[0] = inputs[number]
    fit_outputs_(pair, schedule, generator)


def fit_block_(pair: Pair, block: Block, schedule: Schedule, generator: torch.Generator) -> None:
    student, donor = pair.student, pair.donor
    with torch.no_grad():
        student.advance([block.start])
        targets: list[Tensor] = []
        donor.advance([pair.twin[block.end]], lambda number, values: targets.append(values[0]))
        scale = channel_scale(targets)

    def loss_of(number: int) -> Tensor:
        answer = student.between(number, block.steps)
        return ((answer - student.widened(targets[number])) / scale).square().mean()

    optimise_(parameters_of(pair, block), loss_of, len(targets), schedule.passes, schedule.rate, generator)


def channel_scale(targets: Sequence[Tensor]) -> Tensor | float:
    """One number: the root mean square of the donor's activations about their mean."""
    mean = sum(float(target.double().mean()) for target in targets) / len(targets)
    square = sum(float((target.double() - mean).square().mean()) for target in targets) / len(targets)
    return max(math.sqrt(square), 1e-6)


def fit_outputs_(pair: Pair, schedule: Schedule, generator: torch.Generator) -> None:
    """The whole network: Kullback-Leibler divergence from the donor's outputs, or squared error where they are maps."""
    student, donor = pair.student, pair.donor
    run = student.recorded
    output = run.outputs[0]
    steps = [step for step in range(1, output + 1) if run.is_activation(step) and run.depends_on(output, step)]
    targets: list[Tensor] = []
    with torch.no_grad():
        donor.advance([pair.twin[output]], lambda number, values: targets.append(values[0]))
    is_classifier = targets[0].dim() == 2 and targets[0].shape[1] > 1
    scale = channel_scale(targets)

    def loss_of(number: int) -> Tensor:
        answer = student.between(number, steps)
        if not is_classifier:
            return ((answer - targets[number]) / scale).square().mean()
        return F.kl_div(answer.log_softmax(1), targets[number].log_softmax(1), reduction="batchmean", log_target=True)

    every = Block(0, output, tuple(steps), tuple(parts_of(run, kept=True)))
    optimise_(parameters_of(pair, every), loss_of, len(targets), schedule.final_passes, schedule.final_rate, generator)


def parameters_of(pair: Pair, block: Block) -> list[nn.Parameter]:
    """Every floating-point Parameter that a block's functions read, and what its angular layers hold."""
    run = pair.student.recorded
    inside = {run.path(step) for step in block.steps} | {part.name for part in block.parts}
    modules = [run.model.get_submodule(path) for path in sorted(inside)]
    found = {id(p): p for module in modules for p in module.parameters(recurse=False) if p.is_floating_point()}
    return list(found.values())


def optimise_(
    parameters: list[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    batches: int,
    passes: int,
    rate: float,
    generator: torch.Generator,
) -> None:
    """Adam with a rate that falls to zero along a cosine; what is best on held-out batches stays.

    Flags and gradients are as before afterwards.

    Raises:
        SpherifyError: the loss is not finite.
    """
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    groups = [{"params": [p], "lr": rate * max(float(p.detach().square().mean().sqrt()), 1e-3)} for p in parameters]
    seen = max(1, batches - max(1, batches // 5))
    held = range(seen if seen < batches else 0, batches)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        optimiser = torch.optim.Adam(groups)
        total = max(1, passes * seen)
        falling = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / total)
        )
        best, kept = mean_loss(loss_of, held), [parameter.detach().clone() for parameter in parameters]
        for _ in range(passes):
            for number in torch.randperm(seen, generator=generator).tolist():
                descend_(optimiser, loss_of(number))
                falling.step()
            now = mean_loss(loss_of, held)
            if now < best:
                best, kept = now, [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@torch.no_grad()
def mean_loss(loss_of: Callable[[int], Tensor], numbers: Sequence[int]) -> float:
    return sum(float(loss_of(number)) for number in numbers) / len(numbers)


def descend_(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    if not torch.isfinite(loss):
        raise SpherifyError("the reconstruction's loss is not finite; check the calibration images.")
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
