"""One network run step by step on many batches at once: every function once a batch, values kept while needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spherify.calibrate.recorded import Recorded, is_in_place
from spherify.calibrate.store import MOST_HELD, Store, bytes_held, fetched
from spherify.graph.flow import bits

HALF_RANGE = 6e4  # larger numbers do not fit float16

Override = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]


class World:
    """The values of one network's run on all batches.

    Between two calls of ``advance``, so many bytes of values wait in memory at most; the others are in the store.

    Attributes:
        overrides: by position, what is computed in the place of the recorded function.
        values: for each batch, the values at hand by position, or where in the store they are.
        done: positions whose values were computed.
        wanted: positions that will be asked for, with all they depend on, as bits; the rest counts as done.
    """

    def __init__(
        self,
        recorded: Recorded,
        batches: Sequence[Tensor],
        *,
        half: bool = False,
        store: Store | None = None,
        most_held: int = MOST_HELD,
    ) -> None:
        self.recorded, self.batches, self.half = recorded, list(batches), half
        self.store, self.most_held = store or Store(), most_held
        self.device = batches[0].device
        self.overrides: dict[int, Override] = {}
        self.values: list[dict[int, Any]] = [{0: batch} for batch in batches]
        self.done = 1
        self.wanted = 0

    def want(self, positions: Iterable[int]) -> None:
        """Say what will be asked for; whatever nothing of it depends on is not kept."""
        self.wanted = 0
        for position in positions:
            self.wanted |= self.recorded.ancestors[position]

    def steps_to(self, targets: Iterable[int]) -> list[int]:
        """The activations still to be computed, in order."""
        todo = 0
        stack = [position for position in targets if not self.done >> position & 1]
        while stack:
            position = stack.pop()
            if todo >> position & 1:
                continue
            todo |= 1 << position
            stack += [
                source
                for node in self.recorded.nodes[position].all_input_nodes
                if self.recorded.is_activation(source := self.recorded.position[node]) and not self.done >> source & 1
            ]
        return list(bits(todo))

    def advance(self, targets: Sequence[int], visit: Callable[[int, list[Tensor]], None] | None = None) -> None:
        """Compute the targets on every batch; what no later step needs is dropped.

        Args:
            visit: called with the number of each batch and the values of the targets.
        """
        steps = self.steps_to(targets)
        done = self.done
        for step in steps:
            done |= 1 << step
        last_use = self.last_uses(steps, done, targets)
        held = sum(map(self.bytes_waiting, self.values))
        for number, values in enumerate(self.values):
            held -= self.bytes_waiting(values)
            stored = self.fetch(number, steps)
            self.run(number, steps, last_use)
            if visit is not None:
                visit(number, [self.value(number, target) for target in targets])
            values.update((position, place) for position, place in stored.items() if position in values)
            for position in [position for position in values if not self.is_needed(position, done)]:
                del values[position]
            held = self.put_away(values, held)
        self.done = done

    def fetch(self, number: int, steps: Iterable[int]) -> dict[int, Any]:
        """Read what these steps use of a batch into memory, and return where it was."""
        values, stored = self.values[number], {}
        for node in {source for step in steps for source in self.recorded.nodes[step].all_input_nodes}:
            position = self.recorded.position[node]
            if position in values and (value := fetched(values[position])) is not values[position]:
                stored[position], values[position] = values[position], value
        return stored

    def put_away(self, values: dict[int, Any], held: int) -> int:
        """Write to the store what does not fit in memory beside ``held`` bytes; returns the bytes held then."""
        for position, value in list(values.items()):
            size = bytes_held(value) if position else 0
            if size and held + size > self.most_held:
                values[position] = self.store.put(value)
                size = bytes_held(values[position])
            held += size
        return held

    @staticmethod
    def bytes_waiting(values: dict[int, Any]) -> int:
        """Of one batch; its images, at position 0, are held anyway."""
        return sum(bytes_held(value) for position, value in values.items() if position)

    def last_uses(self, steps: list[int], done: int, targets: Sequence[int]) -> dict[int, list[int]]:
        """For each step, the values that nothing needs after it."""
        order = {step: number for number, step in enumerate(steps)}
        final: dict[int, list[int]] = {}
        for position in {*steps, *self.values[0]}:
            if position in targets or self.is_needed(position, done):
                continue
            uses = [order[user] for user in self.recorded.users[position] if user in order]
            moment = max(uses, default=order.get(position))
            if moment is not None:
                final.setdefault(steps[moment], []).append(position)
        return final

    def is_needed(self, position: int, done: int) -> bool:
        """A wanted step that is not done uses its value."""
        return any(self.wanted >> user & 1 and not done >> user & 1 for user in self.recorded.users[position])

    def run(self, number: int, steps: list[int], last_use: dict[int, list[int]]) -> None:
        values = self.values[number]
        for step in steps:
            values[step] = self.call(number, step)
            for position in last_use.get(step, ()):
                values.pop(position, None)
        if self.half:
            for step in steps:
                if step in values:
                    values[step] = narrowed(values[step])

    def call(self, number: int, position: int) -> Any:
        """The result of one node on one batch, from values at hand."""
        args, kwargs = self.arguments(number, position)
        override = self.overrides.get(position)
        return override(args, kwargs) if override is not None else apply(self.node(number, position), args, kwargs)

    def value(self, number: int, position: int) -> Any:
        """A value at hand, read from the store if it is there; as wide as it was computed."""
        return self.widened(fetched(self.values[number][position]))

    def node(self, number: int, position: int) -> fx.Node:
        return self.recorded.by_size[len(self.batches[number])][position]

    def arguments(self, number: int, position: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the function is called with on one batch, from values at hand."""
        weights: dict[fx.Node, Any] = {}

        def value_of(source: fx.Node) -> Any:
            index = self.recorded.position[source]
            if self.recorded.is_activation(index):
                return self.value(number, index)
            if source not in weights:
                weights[source] = self.weight(source, value_of)
            return weights[source]

        return self.resolved(self.node(number, position), value_of)

    def resolved(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def leaf(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return value_of(value)
            return self.device if isinstance(value, torch.device) else value  # where a factory was told where

        return fx.node.map_aggregate(node.args, leaf), fx.node.map_aggregate(node.kwargs, leaf)

    def weight(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """What does not depend on the input: a Parameter, a constant, or something computed from them."""
        if node.op != "get_attr":
            return apply(node, *self.resolved(node, value_of))
        if "constant" in node.meta:
            return node.meta["constant"].to(self.device)
        return self.recorded.parameter(str(node.target))

    def through(self, number: int, start: int, value: Tensor, chain: Sequence[int]) -> Tensor:
        """What becomes of a value put in the place of a result, by the functions behind it; nothing is kept."""
        kept = self.values[number].get(start)
        self.values[number][start] = value
        try:
            return self.between(number, chain) if chain else value
        finally:
            if kept is None:
                del self.values[number][start]
            else:
                self.values[number][start] = kept

    def between(self, number: int, steps: Sequence[int]) -> Tensor:
        """The result of the last of these steps, from values at hand; nothing is kept."""
        values = self.values[number]
        kept = dict(values)
        try:
            for step in steps:
                values[step] = self.call(number, step)
            return values[steps[-1]]
        finally:
            values.clear()
            values.update(kept)

    def widened(self, value: Any) -> Any:
        return value.float() if self.half and isinstance(value, Tensor) and value.dtype == torch.float16 else value


def apply(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The recorded function, kept from writing into values that others may need."""
    target: Any = node.target
    if kwargs.get("inplace"):
        kwargs = {**kwargs, "inplace": False}
    elif is_in_place(node) and args and isinstance(args[0], Tensor):
        args = (args[0].clone(), *args[1:])
    return target(*args, **kwargs)


def narrowed(value: Any) -> Any:
    """In float16 where the numbers allow it."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.numel():
        return value
    least, most = value.aminmax()
    return value if most > HALF_RANGE or least < -HALF_RANGE else value.half()
