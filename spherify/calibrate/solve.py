"""Linear solves on the network's outputs: the student's linearised answers against the donor's, all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.calibrate.absorb import write_norm_
from spherify.calibrate.outputs import Outputs, has_comparable_outputs, image_axes, steps_to
from spherify.calibrate.pair import Pair, inputs_of
from spherify.calibrate.patches import output_rows
from spherify.calibrate.statistics import Moments
from spherify.calibrate.unknowns import Played, Unknown, unknowns_of
from spherify.calibrate.world import World
from spherify.graph.flow import is_batch_norm
from spherify.graph.record import one_line

FEWEST_IMAGES = 40  # fewer say nothing about other images
MOST_EQUATIONS = 1600  # of one group of images
FLOATS_KEPT = 350_000_000  # equations times unknowns: 1.4 GB in float32
FEWEST_SUMS = 2  # of the outputs of an image
MOST_GROUPS = 2  # of images in one solve; the first solve has one
LEAST_GAIN = 1e-3  # of the loss; less, and there is no further solve
FEWEST_EQUATIONS = 400  # layers whose filters leave no room for so many keep them


@dataclass(frozen=True, kw_only=True)
class Solves:
    """How the outputs are solved.

    Attributes:
        count: how many solves; 0 leaves the network as it is.
        ridges: tried at each, relative to the mean square of an equation's slopes; held-out images choose.
        refits_kept: plain layers behind converted ones are changed too.
        mixes: of a classifier of images, mixes of two images are solved for.
        seed: of the order of the images, of the sums of outputs drawn and of mixes.
    """

    count: int = 3
    ridges: tuple[float, ...] = (100.0, 10.0, 1.0, 0.3, 0.1, 0.03)
    refits_kept: bool = True
    mixes: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What the solves did.

    Attributes:
        losses: on held-out images, before the first solve and after each that was kept.
        unknowns: numbers that were solved for.
        left: layers whose filters were too large and stayed as they were.
        problem: why there was no further solve, where one could not be computed.
    """

    losses: tuple[float, ...]
    unknowns: int
    left: tuple[str, ...]
    problem: str = ""


@torch.no_grad()
def solve_outputs_(pair: Pair, solves: Solves, progress: Callable[[str], None] = lambda name: None) -> Solved | None:
    """Bring the student's outputs nearer to the donor's by linear solves over everything that can be changed.

    At each, the student's outputs are linearised in all scales, offsets and filters, and the least squares towards
    the donor's outputs solved group by group of images, with a ridge; the mean of the groups' solutions is taken, with
    the ridge that serves the held-out images best, and only where it lowers their loss. The first solve takes one
    group, from which the others start nearer.

    Returns:
        What was done, or why nothing was; None where outputs are no numbers image by image.

    Source: the mean of solutions is that of Zhang, Duchi, Wainwright 2015, Divide and Conquer Kernel Ridge Regression;
    the linearisation is a Gauss-Newton step with Levenberg's damping.
    """
    if solves.count < 1 or not has_comparable_outputs(pair):
        return None
    if problem := too_few(pair):
        return Solved(losses=(), unknowns=0, left=(), problem=problem)
    outputs = Outputs(pair, torch.Generator().manual_seed(solves.seed), mixes=solves.mixes)
    unknowns, left = unknowns_of(pair.student.recorded, FLOATS_KEPT // FEWEST_EQUATIONS, kept=solves.refits_kept)
    axes = image_axes(outputs, {position for unknown in unknowns for position in unknown.positions})
    unknowns = [unknown for unknown in unknowns if all(position in axes for position in unknown.positions)]
    size = sum(unknown.size for unknown in unknowns)
    losses, problem = [outputs.loss()], ""
    for number in range(solves.count if unknowns else 0):
        progress(f"outputs {number + 1}")
        sums, images = shape_of_group(sum(len(pair.student.batches[seen]) for seen in outputs.seen), size)
        groups = groups_of(outputs, images, min(number + 1, MOST_GROUPS))
        try:
            changes = mean_changes(outputs, unknowns, axes, groups, solves.ridges, min(sums, outputs.classes))
        except RuntimeError as error:  # a function without a derivative, which torch tells only when asked for it
            problem = one_line(error)
            break
        loss = best_of_(outputs, unknowns, changes, losses[-1])
        if loss is None:
            break
        losses.append(loss)
        if loss > (1.0 - LEAST_GAIN) * losses[-2]:
            break
    outputs.close()
    if len(losses) > 1:
        refresh_norms_(pair.student, {unknown.name for unknown in unknowns})
    return Solved(losses=tuple(losses), unknowns=size, left=tuple(left), problem=problem)


def too_few(pair: Pair) -> str:
    """What is wrong with the number of images, or nothing: fewer than classes cannot even show each class once."""
    images = sum(map(len, pair.student.batches))
    if images < FEWEST_IMAGES:
        return f"{images} images, and {FEWEST_IMAGES} are needed"
    shape = pair.student.recorded.nodes[pair.student.recorded.outputs[0]].meta["shape"]
    if len(shape) == 2 and images < shape[1]:
        return f"{images} images, fewer than the {shape[1]} classes"
    return ""


def shape_of_group(images: int, unknowns: int) -> tuple[int, int]:
    """(sums of the outputs of each image, images in a group): the fewer images there are, the more sums of each."""
    equations = max(1, min(MOST_EQUATIONS, FLOATS_KEPT // unknowns))
    sums = max(FEWEST_SUMS, equations // images)
    return sums, max(1, equations // sums)


def groups_of(outputs: Outputs, limit: int, count: int) -> list[list[int]]:
    """``count`` groups of at most ``limit`` images; where these are not mixed anew each time, no group comes twice."""
    groups = grouped(outputs, limit)
    return [groups[number % len(groups)] for number in range(count if outputs.mixes else min(count, len(groups)))]


def grouped(outputs: Outputs, limit: int) -> list[list[int]]:
    """The seen batches in a random order, in groups of at most so many images; what is left over joins no group."""
    batches = outputs.pair.student.batches
    groups: list[list[int]] = [[]]
    count = 0
    for index in torch.randperm(len(outputs.seen), generator=outputs.generator).tolist():
        number = outputs.seen[index]
        if groups[-1] and count + len(batches[number]) > limit:
            groups.append([])
            count = 0
        groups[-1].append(number)
        count += len(batches[number])
    return groups[:-1] if len(groups) > 1 and count < limit // 2 else groups


def mean_changes(
    outputs: Outputs,
    unknowns: list[Unknown],
    axes: dict[int, int],
    groups: list[list[int]],
    ridges: Sequence[float],
    sums: int,
) -> list[list[Tensor]]:
    """For each ridge, the mean of the groups' solutions, one tensor an unknown; empty if slopes are infinite."""
    changes: list[list[Tensor]] = []
    for group in groups:
        if outputs.mixes:
            outputs.draw(group)
        blocks, errors = equations_of(outputs, unknowns, axes, group, sums)
        scales = [
            unknown.spread(block.norm(dim=0).square()).clamp_min(1e-30).rsqrt()
            for unknown, block in zip(unknowns, blocks, strict=True)
        ]
        gram = torch.zeros(len(errors), len(errors), dtype=torch.float64, device=errors.device)
        for block, scale in zip(blocks, scales, strict=True):
            gram += block.mul_(scale) @ block.mT
        if not bool(gram.isfinite().all()):  # a slope can be infinite where the value is not
            return []
        values, vectors = torch.linalg.eigh(gram)
        turned, size = vectors.mT @ errors.double(), gram.diagonal().mean()
        found = []
        for ridge in ridges:
            weights = (vectors @ (turned / (values.clamp_min(0.0) + ridge * size))).float() / len(groups)
            found.append([weights @ block * scale for block, scale in zip(blocks, scales, strict=True)])
        changes = added(changes, found) if changes else found
        del blocks, block
    return changes


def added(first: list[list[Tensor]], second: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]


def equations_of(
    outputs: Outputs, unknowns: list[Unknown], axes: dict[int, int], group: list[int], count: int
) -> tuple[list[Tensor], Tensor]:
    """For some sums of each image's outputs: how they change with the unknowns, (sums, size) each, and their errors."""
    images = sum(len(outputs.pair.student.batches[number]) for number in group)
    blocks: list[Tensor] = []
    errors: list[Tensor] = []
    filled = 0
    for number in group:
        played, answer, sums = play(outputs, unknowns, axes, number, count)
        difference = outputs.truths[number].float() - answer
        errors.append((sums * difference).flatten(2).sum(2).flatten())
        blocks = blocks or [answer.new_empty(len(sums) * images, unknown.size) for unknown in unknowns]
        end = filled + len(errors[-1])
        for block, unknown in zip(blocks, unknowns, strict=True):
            block[filled:end] = unknown.rows(played).flatten(0, 1)
        filled = end
        played.world.values[number] = {0: played.world.batches[number]}
    return blocks, torch.cat(errors)


def play(
    outputs: Outputs, unknowns: list[Unknown], axes: dict[int, int], number: int, count: int
) -> tuple[Played, Tensor, Tensor]:
    """A batch through the student with its graph: values, slopes of the drawn sums, outputs, and the sums."""
    world = outputs.pair.student
    places = sorted({position for unknown in unknowns for position in unknown.positions})
    values = world.values[number] = {0: world.batches[number]}
    with torch.enable_grad():
        for step in steps_to(world, outputs.output):
            value = world.call(number, step)
            if step in places and not value.requires_grad:
                value = value.detach().requires_grad_()
            values[step] = value
        answer = values[outputs.output].float()
    sums = outputs.sums(outputs.truths[number].float(), count)
    slopes = [
        torch.autograd.grad(
            answer,
            [values[place] for place in places],
            total,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for total in sums
    ]
    by_place = {place: torch.stack([slope[index] for slope in slopes]) for index, place in enumerate(places)}
    return Played(world, number, len(world.batches[number]), by_place, axes), answer.detach(), sums


def best_of_(outputs: Outputs, unknowns: list[Unknown], changes: list[list[Tensor]], before: float) -> float | None:
    """Make the change with the least loss on held-out images; None, and no change, where none lowers it."""
    tensors = [tensor for unknown in unknowns for tensor in unknown.tensors]
    start = [tensor.clone() for tensor in tensors]
    best, kept = before, start
    for change in changes:
        for unknown, step in zip(unknowns, change, strict=True):
            unknown.add_(step)
        loss = outputs.loss()
        if loss < best:  # never where the loss is not a number
            best, kept = loss, [tensor.clone() for tensor in tensors]
        for tensor, value in zip(tensors, start, strict=True):
            tensor.copy_(value)
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.copy_(value)
    return best if best < before else None


def refresh_norms_(world: World, names: set[str]) -> None:
    """Give each BatchNorm among these the statistics of its input, and weights with which it answers as before."""
    recorded = world.recorded
    for number, batch in enumerate(world.batches):
        world.values[number] = {0: batch}
    world.done = 1
    world.want([len(recorded.nodes) - 1])
    for position, node in enumerate(recorded.nodes):
        is_wanted = is_batch_norm(node) and recorded.path(position) in names
        norm = recorded.model.get_submodule(recorded.path(position)) if is_wanted else None
        if not isinstance(norm, _BatchNorm) or not norm.affine or norm.running_mean is None or norm.running_var is None:
            continue
        moments = Moments()

        def visit(_: int, values: list[Tensor], moments: Moments = moments) -> None:
            moments.add(output_rows(values[0], True))

        world.advance(inputs_of(recorded, position), visit)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        write_norm_(norm, scale, norm.bias - scale * norm.running_mean, moments.mean, moments.variance)
