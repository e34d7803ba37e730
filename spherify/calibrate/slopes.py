"""How much the donor's outputs depend on each position of its layers' answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from spherify.calibrate.outputs import has_comparable_outputs, products_of, random_sums, steps_to, too_few, with_slopes
from spherify.calibrate.pair import Pair
from spherify.calibrate.parts import Part
from spherify.calibrate.patches import output_rows
from spherify.calibrate.world import World
from spherify.graph.flow import CONV_FUNCTIONS

MOST_SUMS = 4  # of the outputs of an image
MOST_PRODUCTS = 2e12  # multiplications for all slopes, about: with more images or larger ones, fewer sums of each


@torch.no_grad()
def row_weights(
    pair: Pair, parts: Iterable[Part], seed: int, progress: Callable[[str], None] = lambda name: None
) -> dict[int, list[Tensor]]:
    """For each answer of the parts, by its position in the student's run: a weight for each row of each batch.

    An error at a position changes the outputs by about its product with their slope there, so that errors where the
    slope is small cost little. The weight is the length of the slope, not its square: it is the donor's, on images
    at hand, and only near to that of the converted network on others.

    Returns:
        (rows,) in bfloat16 for each batch. Nothing where outputs are no numbers image by image, where there are fewer
        images than classes, or where a function has no derivative.

    Source: weighting by gradient magnitude as Li et al. 2021, BRECQ, arXiv:2102.05426, do for blocks.
    """
    if not has_comparable_outputs(pair) or too_few(pair):
        return {}
    progress("slopes of the donor's outputs")
    places: dict[int, tuple[int, bool]] = {}  # in the donor's run, where it is in the student's, and whether of a conv
    for part in parts:
        for call, answer in zip(part.calls, part.answers, strict=True):
            is_conv = pair.student.recorded.nodes[call].target in CONV_FUNCTIONS
            places[pair.twin[answer]] = (answer, is_conv)
    output = pair.twin[pair.student.recorded.outputs[0]]
    steps = steps_to(pair.donor, output)
    places = {place: places[place] for place in places if place in steps}
    images = sum(map(len, pair.donor.batches))
    sums = int(MOST_PRODUCTS / (2.0 * images * products_of(pair.donor.recorded)))
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, list[Tensor]] = {answer: [] for answer, _ in places.values()}
    for number in range(len(pair.donor.batches)):
        try:
            slopes = slopes_at(pair.donor, number, steps, list(places), max(1, min(sums, MOST_SUMS)), generator)
        except RuntimeError:  # a function without a derivative, which torch tells only when asked for it
            return {}
        for (answer, is_conv), squares in zip(places.values(), slopes, strict=True):
            lengths = output_rows(squares, is_conv).sum(1).sqrt()
            found[answer].append(lengths.nan_to_num(0.0, 0.0, 0.0).bfloat16())
    return found


def slopes_at(
    world: World, number: int, steps: list[int], places: list[int], count: int, generator: torch.Generator
) -> list[Tensor]:
    """The squares of the slopes of some random sums of each image's outputs, added up, at each place."""
    try:
        answer = with_slopes(world, number, steps, places)
        found = [world.values[number][place] for place in places]
        totals = [torch.zeros_like(value, requires_grad=False) for value in found]
        for direction in random_sums(answer.detach(), count, generator):
            slopes = torch.autograd.grad(answer, found, direction, retain_graph=True, materialize_grads=True)
            for total, slope in zip(totals, slopes, strict=True):
                total.addcmul_(slope, slope)
        return totals
    finally:
        world.values[number].clear()  # with the graph
        world.values[number] = {0: world.batches[number]}
