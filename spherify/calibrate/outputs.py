"""A network's outputs beside its donor's on images seen and held out, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spherify.calibrate.fresh import can_be_changed, moved
from spherify.calibrate.pair import Pair, angular_call
from spherify.calibrate.parts import parts_of
from spherify.calibrate.recorded import Recorded
from spherify.calibrate.world import World
from spherify.graph.flow import bits, weight_node

FEWEST_IMAGES = 40  # fewer say nothing about other images
HELD_OUT = 0.2  # of the images, at most MOST_HELD_OUT of them
MOST_HELD_OUT = 400
COPIES_HELD = 2  # of each held-out image, changed each in its own way: a few hard ones must not decide
MOST_PRODUCTS = 1e12  # multiplications of one pass over the images; of larger networks, fewer images are solved for


@dataclass
class Outputs:
    """A pair with the donor's outputs on all batches, and which batches are held out.

    Attributes:
        truths: the donor's outputs, batch by batch; those of seen batches are there after ``draw``.
        seen, held: numbers of batches.
    """

    pair: Pair
    generator: torch.Generator
    truths: list[Tensor] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        run = self.pair.student.recorded
        self.output = run.outputs[0]
        for part in parts_of(run, kept=False):
            for call in part.calls:
                self.pair.student.overrides[call] = angular_call(part, run.nodes[call].target)
        self.images = list(self.pair.student.batches)
        batches = list(self.images)
        most = max(1, int(MOST_PRODUCTS / products_of(run) / len(batches[0])))
        numbers = list(range(len(batches)))[:most]
        wanted = min(HELD_OUT * sum(len(batches[number]) for number in numbers), MOST_HELD_OUT)
        while sum(len(batches[number]) for number in self.held) < wanted:
            self.held.append(numbers.pop())
        self.seen = numbers
        self.image_batches = len(batches)
        if can_be_changed(batches[0]):
            self.repeat_held(COPIES_HELD)
        self.truths = [torch.empty(0)] * len(self.images)
        self.draw(self.held)

    def draw(self, numbers: Sequence[int]) -> None:
        """Change the images of these batches anew, and have the donor's outputs on them.

        The donor answers to the changed images, so that no label is needed. ``close`` gives the pair its own images.
        """
        if can_be_changed(self.images[0]):
            self.put(numbers, [moved(self.images[number], self.generator) for number in numbers])
        answers = outputs_of(self.pair.donor, self.pair.twin[self.output], numbers)
        for number, answer in zip(numbers, answers, strict=True):
            self.truths[number] = answer

    def repeat_held(self, most: int) -> None:
        """Take each held-out image ``most`` times, or as often as the bound on products allows."""
        held = [self.images[number] for number in self.held]
        once = products_of(self.pair.student.recorded) * sum(map(len, held))
        for _ in range(min(most, int(HELD_OUT * MOST_PRODUCTS / once)) - 1):
            self.held += range(len(self.images), len(self.images) + len(held))
            self.images += held
        for world in (self.pair.student, self.pair.donor):
            world.batches = list(self.images)
            world.values = [{0: batch} for batch in world.batches]

    def put(self, numbers: Sequence[int], batches: Sequence[Tensor]) -> None:
        for world in (self.pair.student, self.pair.donor):
            for number, batch in zip(numbers, batches, strict=True):
                world.batches[number] = batch
                world.values[number] = {0: batch}

    def close(self) -> None:
        for world in (self.pair.student, self.pair.donor):
            world.batches = self.images[: self.image_batches]
            world.values = [{0: batch} for batch in world.batches]

    @property
    def width(self) -> int:
        """Numbers that the network answers an image with, and as many sums of them as can differ."""
        return math.prod(self.pair.student.recorded.nodes[self.output].meta["shape"][1:])

    def loss(self) -> float:
        """The mean square of the student's errors on the held-out batches."""
        answers = outputs_of(self.pair.student, self.output, self.held)
        errors = [
            answer.float() - self.truths[number].float() for answer, number in zip(answers, self.held, strict=True)
        ]
        return sum(float(error.square().sum()) for error in errors) / sum(error.numel() for error in errors)

    def sums(self, truth: Tensor, count: int) -> Tensor:
        return random_sums(truth, count, self.generator)


def random_sums(outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, N, ...): random sums of each image's outputs, the mean of whose squares is the mean square of these.

    As many sums of (N, M) outputs as there are outputs give it exactly.
    """
    total = outputs[0].numel()
    if outputs.dim() > 2:
        signs = torch.randint(2, (count, *outputs.shape), generator=generator).to(outputs) * 2.0 - 1.0
        return signs / math.sqrt(total)
    drawn = torch.randn(*outputs.shape, min(count, total), generator=generator)
    return torch.linalg.qr(drawn).Q.to(outputs).permute(2, 0, 1)


def has_comparable_outputs(pair: Pair) -> bool:
    """The first output is floating-point, image by image, and of the same shape in student and donor."""
    run, donor = pair.student.recorded, pair.donor.recorded
    if not run.outputs or not run.is_activation(run.outputs[0]) or run.outputs[0] not in pair.twin:
        return False
    mine, theirs = run.nodes[run.outputs[0]].meta, donor.nodes[pair.twin[run.outputs[0]]].meta
    shape = mine["shape"]
    images = len(pair.student.batches[0])
    return bool(mine["dtype"].is_floating_point and shape == theirs["shape"] and len(shape) > 1 and shape[0] == images)


def too_few(pair: Pair) -> str:
    """What is wrong with the number of images, or nothing: fewer than classes cannot even show each class once."""
    images = sum(map(len, pair.student.batches))
    if images < FEWEST_IMAGES:
        return f"{images} images, and {FEWEST_IMAGES} are needed"
    shape = pair.student.recorded.nodes[pair.student.recorded.outputs[0]].meta["shape"]
    if len(shape) == 2 and images < shape[1]:
        return f"{images} images, fewer than the {shape[1]} classes"
    return ""


@torch.no_grad()
def outputs_of(world: World, output: int, numbers: Sequence[int]) -> list[Tensor]:
    """The values there on some batches; nothing else is kept."""
    steps = steps_to(world, output)
    last_use: dict[int, list[int]] = {}
    for step in steps[:-1]:
        last_use.setdefault(max(user for user in world.recorded.users[step] if user in steps), []).append(step)
    found = []
    for number in numbers:
        world.values[number] = {0: world.batches[number]}
        world.run(number, steps, last_use)
        found.append(world.widened(world.values[number][output]))
        world.values[number] = {0: world.batches[number]}
    return found


def steps_to(world: World, output: int) -> list[int]:
    return [step for step in bits(world.recorded.ancestors[output] & world.recorded.activations) if step > 0]


def with_slopes(world: World, number: int, steps: Sequence[int], places: Sequence[int]) -> Tensor:
    """The value of the last step on one batch, with slopes by the values at some places, which stay with the world."""
    values = world.values[number] = {0: world.batches[number]}
    with torch.enable_grad():
        for step in steps:
            value = world.call(number, step)
            if step in places and not value.requires_grad:
                value = value.detach().requires_grad_()
            values[step] = value
        return values[steps[-1]].float()


def products_of(recorded: Recorded) -> float:
    """Multiplications of all conv and linear calls for one image."""
    images = recorded.nodes[0].meta["shape"][0]
    total = 0.0
    for call in recorded.layer_calls():
        weight = weight_node(recorded.nodes[call])
        fan_in = math.prod(weight.meta["shape"][1:]) if weight is not None else 1
        total += math.prod(recorded.nodes[call].meta["shape"]) * fan_in / images
    return max(total, 1.0)


@torch.no_grad()
def image_axes(outputs: Outputs, wanted: set[int]) -> dict[int, int]:
    """For each wanted position, the axis along which the images lie, 0 or 1: found by what changes with one image.

    Positions where it is neither are not in it.
    """
    world = outputs.pair.student
    number = next((n for n in outputs.seen if len(world.batches[n]) > 1), outputs.seen[0])
    images = len(world.batches[number])
    steps = steps_to(world, outputs.output)
    places = wanted & set(steps)
    runs = []
    for batch in (world.batches[number], torch.cat([world.batches[number][-1:], world.batches[number][1:]])):
        values = world.values[number] = {0: batch}
        for step in steps:
            values[step] = world.call(number, step)
        runs.append({place: values[place] for place in places})
    world.values[number] = {0: world.batches[number]}
    axes = {}
    for place in places:
        first, second = runs[0][place], runs[1][place]
        for axis in (0, 1):
            if first.dim() > axis and first.shape[axis] % images == 0 and (axis == 0 or first.shape[1] == images):
                one, other = (value.movedim(axis, 0).unflatten(0, (images, -1))[1:] for value in (first, second))
                if torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(first.abs().amax())):
                    axes[place] = axis
                    break
    return axes
