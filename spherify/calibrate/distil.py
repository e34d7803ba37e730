"""A converted network drawn to its donor by gradients: block outputs and answers, on fresh images for each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spherify.calibrate.anneal import divergence_at
from spherify.calibrate.blocks import blocks_of
from spherify.calibrate.fresh import moved, patched
from spherify.calibrate.outputs import products_of
from spherify.calibrate.pair import Pair, angular_call
from spherify.calibrate.parts import parts_of
from spherify.calibrate.recorded import Recorded
from spherify.calibrate.world import World
from spherify.errors import SpherifyError
from spherify.graph.flow import bits

HELD_OUT = 0.1  # of the images, at most MOST_HELD_OUT of them
MOST_HELD_OUT = 400
BATCH = 25  # images a step
MOST_FLOATS = 400_000_000  # of all results of the student's functions for one step's images
MOST_PRODUCTS = 6e12  # multiplications of the donor's and the student's runs and of the slopes, about
WARM_UP = 20  # steps
TESTS = 10  # of held-out images, over all passes


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Attributes:
        passes: over the images; fewer where that were more than ``shown`` images, or MOST_PRODUCTS multiplications.
        shown: so many images in all.
        rate: of Adam, relative to the root mean square of each Parameter; it falls to zero along a cosine.
        blocks: weight of the error of the blocks' outputs beside that of the answers, both relative to what they are
            before the first step.
        temperature: at which the answers of a classifier are compared.
        seed: of order, shifts and patches.
    """

    passes: int = 80
    shown: int = 40_000
    rate: float = 1e-3
    blocks: float = 6.0
    temperature: float = 2.0
    seed: int = 0


def batch_size(model_run: Recorded, images: int) -> int:
    """Images a step: four steps a pass at least, within the memory that all results take."""
    first = model_run.nodes[0].meta["shape"][0]
    floats = sum(
        math.prod(model_run.nodes[position].meta.get("shape") or (0,)) for position in bits(model_run.activations)
    )
    return max(1, min(BATCH, images // 4, int(MOST_FLOATS * first / max(floats, 1))))


@dataclass
class Watched:
    """One network's run on a batch of any images: the values at some places, the answer last.

    Attributes:
        places: positions in this network's run.
    """

    world: World
    places: list[int]
    steps: list[int] = field(init=False)
    last_use: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        run = self.world.recorded
        self.steps = [step for step in bits(run.ancestors[self.places[-1]] & run.activations) if step > 0]
        inside = {step: number for number, step in enumerate(self.steps)}
        self.last_use = {}
        for step in self.steps:
            if step not in self.places:
                last = max((user for user in run.users[step] if user in inside), default=step)
                self.last_use.setdefault(last, []).append(step)

    def __call__(self, batch: Tensor) -> list[Tensor]:
        world = self.world
        kept = world.batches[0], world.values[0]
        world.batches[0], world.values[0] = batch, {0: batch}
        try:
            world.run(0, self.steps, self.last_use)
            return [world.values[0][place] for place in self.places]
        finally:
            world.values[0].clear()  # a cycle in World.arguments would keep it, and all slopes, until Python looks
            world.batches[0], world.values[0] = kept


def distil_(pair: Pair, images: Tensor, schedule: Schedule, progress: Callable[[str], None]) -> None:
    """Train every Parameter of the student; the weights that are best on held-out images stay.

    Args:
        pair: of batches of the size that ``batch_size`` says.
        images: (N, ...), all of them.

    Raises:
        SpherifyError: the loss is not finite.
    """
    run, size = pair.student.recorded, len(pair.student.batches[0])
    for part in parts_of(run, kept=False):
        for call in part.calls:
            pair.student.overrides[call] = angular_call(part, run.nodes[call].target)
    generator = torch.Generator().manual_seed(schedule.seed)
    held = max(1, round(min(HELD_OUT * len(images), MOST_HELD_OUT) / size)) * size
    seen, tests = images[: len(images) - held], images[len(images) - held :]
    task = Task(pair, schedule.temperature)
    held_out = [part for batch in tests.split(size) for part in (batch, moved(batch, generator))]
    wanted = [task.wanted(batch) for batch in held_out]

    def test() -> tuple[float, float]:
        with torch.no_grad():
            errors = [task.errors(*given) for given in zip(held_out, wanted, strict=True)]
        return sum(float(answer) for answer, _ in errors), sum(float(blocks) for _, blocks in errors)

    shown = min(schedule.shown, MOST_PRODUCTS / (4.0 * products_of(run)))
    passes = max(1, min(schedule.passes, round(shown / len(seen))))
    descent = Descent(list(run.model.parameters()), schedule.rate, passes * (len(seen) // size))
    with descent:
        at_first = test()
        weight = schedule.blocks * at_first[0] / max(at_first[1], 1e-12)
        best, kept = at_first[0], descent.taken_down()
        for number in range(passes):
            progress(f"pass {number + 1} of {passes}")
            for chosen in torch.randperm(len(seen), generator=generator).split(size):
                if len(chosen) == size:
                    batch = patched(moved(seen[chosen.to(seen.device)], generator), generator)
                    answer, blocks = task.errors(batch, task.wanted(batch))
                    descent.step(answer + weight * blocks)
            is_due = (number + 1) % max(1, passes // TESTS) == 0 or number + 1 == passes
            if is_due and (now := test()[0]) < best:
                best, kept = now, descent.taken_down()
        descent.put_back(kept)


class Task:
    """What is wanted of the student, and how far it is from it."""

    def __init__(self, pair: Pair, temperature: float) -> None:
        run, self.temperature = pair.student.recorded, temperature
        output = run.outputs[0]
        ends = [block.end for block in blocks_of(run, parts_of(run, kept=True)) if block.end in pair.twin]
        places = [*(end for end in ends if end != output and self.are_alike(pair, end)), output]
        self.student = Watched(pair.student, places)
        self.donor = Watched(pair.donor, [pair.twin[place] for place in places])
        shape = run.nodes[output].meta["shape"]
        self.is_classifier = len(shape) == 2 and shape[1] > 1

    @staticmethod
    def are_alike(pair: Pair, place: int) -> bool:
        mine, theirs = pair.student.recorded.nodes[place], pair.donor.recorded.nodes[pair.twin[place]]
        is_number = mine.meta["dtype"].is_floating_point if "dtype" in mine.meta else False
        return is_number and mine.meta["shape"] == theirs.meta["shape"]

    @torch.no_grad()
    def wanted(self, batch: Tensor) -> list[Tensor]:
        """The donor's block outputs, and its answer."""
        return self.donor(batch)

    def errors(self, batch: Tensor, wanted: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of the student's answers, and of its blocks' outputs, the mean over the blocks."""
        *blocks, answer = self.student(batch)
        *targets, truth = wanted
        pairs = zip(blocks, targets, strict=True)
        inside = torch.stack([relative_error(*pair) for pair in pairs]).mean() if blocks else answer.new_zeros(())
        if self.is_classifier:
            return divergence_at(self.temperature, answer, truth), inside
        return relative_error(answer, truth), inside


def relative_error(answer: Tensor, truth: Tensor) -> Tensor:
    """Mean square of the difference, by the variance of what is wanted."""
    wide = truth.float()
    return (answer.float() - wide).square().mean() / wide.var(correction=0).clamp_min(1e-12)


class Descent:
    """Adam on some Parameters; within it they take gradients, and afterwards flags and gradients are as before."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, total: int) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.is_floating_point()]
        self.flags = [(parameter.requires_grad, parameter.grad) for parameter in self.parameters]
        groups = [
            {"params": [p], "lr": rate * max(float(p.detach().square().mean().sqrt()), 1e-3)} for p in self.parameters
        ]
        self.optimiser = torch.optim.Adam(groups)
        self.falling = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser,
            lambda step: min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / total))),
        )

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
            parameter.grad = None

    def __exit__(self, *error: object) -> None:
        for parameter, (flag, gradient) in zip(self.parameters, self.flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient

    def step(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise SpherifyError("the reconstruction's loss is not finite; check the calibration images.")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.falling.step()

    def taken_down(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def put_back(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
