"""Linear solves on the network's outputs: the student's linearised answers against the donor's, all layers at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.calibrate.absorb import write_norm_
from spherify.calibrate.held_out import best_of_, take_mean_, tensors_of
from spherify.calibrate.outputs import Outputs, has_comparable_outputs, image_axes, steps_to, too_few, with_slopes
from spherify.calibrate.pair import Pair, inputs_of
from spherify.calibrate.patches import output_rows
from spherify.calibrate.statistics import Moments
from spherify.calibrate.unknowns import Played, Unknown, unknowns_of
from spherify.calibrate.world import World
from spherify.graph.flow import is_batch_norm
from spherify.graph.record import one_line

MOST_EQUATIONS = 8192  # of one solve
FLOATS_KEPT = 150_000_000  # equations times unknowns: 0.6 GB in float32
FEWEST_SUMS = 2  # of the outputs of an image
MOST_SUMS = 10
LEAST_GAIN = 1e-3  # of the loss; less, and there is no further solve
NEXT_RIDGES = (10.0, 3.0, 1.0, 1.0 / 3.0)  # times the last one that served best
ROWS_AT_ONCE = 1024
MOST_NUMBERS = 4500  # with the filters of the smallest layers; with more, a solve learns its images by heart


@dataclass(frozen=True, kw_only=True)
class Solves:
    """How the outputs are solved.

    Attributes:
        count: how many solves; 0 leaves the network as it is.
        ridges: tried at the first, relative to the mean square of an equation's slopes; held-out images choose.
        refits_kept: plain layers behind converted ones are changed too.
        seed: of the order and the changes of the images, and of the sums of outputs drawn.
    """

    count: int = 8
    ridges: tuple[float, ...] = (30.0, 3.0, 1.0, 0.3, 0.1)
    refits_kept: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What the solves did.

    Attributes:
        losses: on held-out images, before the first solve and after each that was kept; the mean's at last.
        unknowns: numbers that were solved for.
        left: layers whose filters stayed as they were.
        problem: why there was no further solve, where one could not be computed.
    """

    losses: tuple[float, ...]
    unknowns: int
    left: tuple[str, ...]
    problem: str = ""


@torch.no_grad()
def solve_outputs_(pair: Pair, solves: Solves, progress: Callable[[str], None] = lambda name: None) -> Solved | None:
    """Bring the student's outputs nearer to the donor's by linear solves over everything that can be changed.

    At each, the student's outputs are linearised in all scales and offsets and the filters of small layers, and the
    least squares towards the donor's outputs solved with a ridge, for images that are mirrored and moved anew each
    time: all of them, as long as equations times unknowns fit. The ridge that serves the held-out images best is
    taken, and only where it lowers their loss. At the end the mean of the last two, four, ... states is taken where it
    has less loss than the last one.

    Returns:
        What was done, or why nothing was; None where outputs are no numbers image by image.

    Source: the linearisation is a Gauss-Newton step with Levenberg's damping; means of states, Polyak and Juditsky
    1992, Acceleration of stochastic approximation by averaging.
    """
    if solves.count < 1 or not has_comparable_outputs(pair):
        return None
    if problem := too_few(pair):
        return Solved(losses=(), unknowns=0, left=(), problem=problem)
    outputs = Outputs(pair, torch.Generator().manual_seed(solves.seed))
    unknowns, left = unknowns_of(pair.student.recorded, MOST_NUMBERS, kept=solves.refits_kept)
    axes = image_axes(outputs, {position for unknown in unknowns for position in unknown.positions})
    unknowns = [unknown for unknown in unknowns if all(position in axes for position in unknown.positions)]
    size = sum(unknown.size for unknown in unknowns)
    sums, images = shape_of_group(sum(len(pair.student.batches[seen]) for seen in outputs.seen), outputs.width, size)
    ridges, losses, problem = solves.ridges, [outputs.loss()], ""
    states: list[list[Tensor]] = []
    for number in range(solves.count if unknowns else 0):
        progress(f"outputs {number + 1}")
        group = drawn_group(outputs, images)
        try:
            changes = changes_of(outputs, unknowns, axes, group, ridges, sums)
        except RuntimeError as error:  # a function without a derivative, which torch tells only when asked for it
            problem = one_line(error)
            break
        loss, chosen = best_of_(outputs, unknowns, changes, losses[-1])
        if chosen is None:
            break
        ridges = tuple(ridges[chosen] * factor for factor in NEXT_RIDGES)
        losses.append(loss)
        states.append([tensor.clone() for tensor in tensors_of(unknowns)])
        if loss > (1.0 - LEAST_GAIN) * losses[-2]:
            break
    if (loss := take_mean_(outputs, unknowns, states, losses[-1])) < losses[-1]:
        losses.append(loss)
    outputs.close()
    if len(losses) > 1:
        refresh_norms_(pair.student, {unknown.name for unknown in unknowns})
    return Solved(losses=tuple(losses), unknowns=size, left=tuple(left), problem=problem)


def shape_of_group(images: int, outputs: int, unknowns: int) -> tuple[int, int]:
    """(sums of the outputs of each image, images in a solve): the fewer images there are, the more sums of each."""
    equations = max(FEWEST_SUMS, min(MOST_EQUATIONS, FLOATS_KEPT // max(1, unknowns)))
    sums = min(outputs, max(FEWEST_SUMS, min(MOST_SUMS, equations // images)))
    return sums, max(1, equations // sums)


def drawn_group(outputs: Outputs, limit: int) -> list[int]:
    """Seen batches with at most so many images, at least one batch, in a random order, their images changed anew."""
    order = [outputs.seen[index] for index in torch.randperm(len(outputs.seen), generator=outputs.generator).tolist()]
    batches = outputs.pair.student.batches
    group = order[:1]
    for number in order[1:]:
        if sum(len(batches[chosen]) for chosen in [*group, number]) <= limit:
            group.append(number)
    outputs.draw(group)
    return group


def changes_of(
    outputs: Outputs,
    unknowns: Sequence[Unknown],
    axes: dict[int, int],
    group: list[int],
    ridges: Sequence[float],
    sums: int,
) -> list[list[Tensor]]:
    """For each ridge that rounding allows, the solution, one tensor an unknown; empty if slopes are infinite."""
    slopes, errors = equations_of(outputs, unknowns, axes, group, sums)
    sizes = [unknown.size for unknown in unknowns]
    squares = slopes.norm(dim=0).square().split(sizes)
    scales = [unknown.spread(of_it).clamp_min(1e-30).rsqrt() for unknown, of_it in zip(unknowns, squares, strict=True)]
    slopes *= torch.cat(scales)
    return [
        [change * scale for change, scale in zip(found.split(sizes), scales, strict=True)]
        for found in ridge_solutions(slopes, errors, ridges)
    ]


def ridge_solutions(slopes: Tensor, errors: Tensor, ridges: Sequence[float]) -> list[Tensor]:
    """The least squares of ``slopes @ x - errors`` for each ridge that rounding allows, the (U,) of (R, U) slopes.

    By normal equations in float64 where there are fewer unknowns than equations, else by the products of equations.

    Args:
        ridges: relative to the mean square of an equation's slopes.
    """
    is_tall = slopes.shape[1] < len(slopes)
    gram = (slopes.mT @ slopes).double() if is_tall else lower_products(slopes)
    wanted = slopes.mT @ errors if is_tall else errors
    if not bool(gram.isfinite().all()):  # a slope can be infinite where the value is not
        return []
    size, found = gram.diagonal().sum() / len(slopes), []
    for ridge in ridges:
        damped = gram.clone()
        damped.diagonal().add_(ridge * size)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            break
        solution = torch.cholesky_solve(wanted[:, None].to(factor), factor)[:, 0].to(slopes)
        found.append(solution if is_tall else solution @ slopes)
    return found


def lower_products(slopes: Tensor) -> Tensor:
    """The lower triangle of ``slopes @ slopes.mT``, which is all that is read of it."""
    gram = slopes.new_zeros(len(slopes), len(slopes))
    for first in range(0, len(gram), ROWS_AT_ONCE):
        end = first + ROWS_AT_ONCE
        gram[first:end, :end] = slopes[first:end] @ slopes[:end].mT
    return gram


def equations_of(
    outputs: Outputs, unknowns: Sequence[Unknown], axes: dict[int, int], group: list[int], count: int
) -> tuple[Tensor, Tensor]:
    """For some sums of each image's outputs: how they change with all unknowns, (sums, size), and their errors."""
    images = sum(len(outputs.pair.student.batches[number]) for number in group)
    slopes = torch.empty(0)
    errors: list[Tensor] = []
    filled = 0
    for number in group:
        played, answer, sums = play(outputs, unknowns, axes, number, count)
        difference = outputs.truths[number].float() - answer
        errors.append((sums * difference).flatten(2).sum(2).flatten())
        if not filled:
            slopes = answer.new_empty(len(sums) * images, sum(unknown.size for unknown in unknowns))
        end = filled + len(errors[-1])
        torch.cat([unknown.rows(played).flatten(0, 1) for unknown in unknowns], 1, out=slopes[filled:end])
        filled = end
        played.world.values[number] = {0: played.world.batches[number]}
    return slopes, torch.cat(errors)


def play(
    outputs: Outputs, unknowns: Sequence[Unknown], axes: dict[int, int], number: int, count: int
) -> tuple[Played, Tensor, Tensor]:
    """A batch through the student with its graph: values, slopes of the drawn sums, outputs, and the sums."""
    world = outputs.pair.student
    places = sorted({position for unknown in unknowns for position in unknown.positions})
    with frozen(world.recorded.model):
        answer = with_slopes(world, number, steps_to(world, outputs.output), places)
    values = world.values[number]
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


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No slopes by Parameters: only those by values are asked for."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


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
