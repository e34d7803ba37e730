"""Blocks of a recorded network: between two places where a single tensor carries everything."""

from __future__ import annotations

from dataclasses import dataclass

from spherify.calibrate.parts import Part
from spherify.calibrate.recorded import Recorded
from spherify.graph.flow import bits


@dataclass(frozen=True)
class Block:
    """A stretch of the run with one input and one output.

    Attributes:
        start, end: positions of the input and of the output.
        steps: the activations between, the output included, in order.
        parts: the layers inside.
    """

    start: int
    end: int
    steps: tuple[int, ...]
    parts: tuple[Part, ...]


def cuts_of(recorded: Recorded) -> list[int]:
    """Positions whose value alone is needed by everything after them, in order; the input and the output are such."""
    order = [position for position in bits(recorded.activations) if recorded.nodes[position].op != "output"]
    last_use = {position: max(recorded.users[position], default=position) for position in order}
    cuts, reach = [], -1
    for index, position in enumerate(order):
        following = order[index + 1] if index + 1 < len(order) else position
        if reach <= position or index == 0:
            cuts.append(position)
        reach = max(reach, last_use[position] if following <= last_use[position] else -1)
    return cuts


def blocks_of(recorded: Recorded, parts: list[Part]) -> list[Block]:
    """Stretches between cuts, each with at least one converted layer, and as short as that allows.

    A cut counts where a layer takes its input, so that a block ends behind its activation.
    """
    calls = {call: part for part in parts for call in part.calls}
    inputs = {recorded.position[source] for call in calls for source in recorded.flow.sources(recorded.nodes[call])}
    end = recorded.outputs[0] if recorded.outputs else len(recorded.nodes) - 1
    ends = [cut for cut in cuts_of(recorded) if cut in inputs and cut > 0]
    blocks, start = [], 0
    for cut in [*ends, end]:
        steps = steps_between(recorded, start, cut)
        inside = tuple(dict.fromkeys(calls[step] for step in steps if step in calls))
        if cut != end and not any(part.is_angular for part in inside):
            continue
        if inside:
            blocks.append(Block(start, cut, steps, inside))
        start = cut
    return blocks


def steps_between(recorded: Recorded, start: int, end: int) -> tuple[int, ...]:
    """What is computed from ``start`` on the way to ``end``."""
    needed = recorded.ancestors[end] & recorded.activations
    return tuple(step for step in bits(needed) if step > start and recorded.depends_on(step, start))
