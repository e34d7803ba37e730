"""Student and donor side by side: both runs recorded, their values matched, rows and targets gathered."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from spherify.calibrate.chain import bounds_after
from spherify.calibrate.parts import Part, bits_of
from spherify.calibrate.patches import Call, output_rows, patch_rows, sampled, unit_rows
from spherify.calibrate.recorded import Recorded, aligned, sizes_of
from spherify.calibrate.regression import Samples
from spherify.calibrate.store import Store, most_held
from spherify.calibrate.world import World
from spherify.errors import ModelError, RewriteError
from spherify.functional.sphere import sphere_conv, sphere_linear
from spherify.layers.angular import AngularLayer
from spherify.layers.timm_convs import StandardisedFilters
from spherify.plan.options import Options
from spherify.rewrite.apply import apply_, conversion_of

LEAST_WEIGHT = 1e-2  # of a row on which no output depends; the mean is 1
FLOATS_KEPT = 100_000_000  # rows and targets of one layer: 400 MB in float32


class Runs:
    """Recorded runs of a converted network and its donor on images of one shape: each size of batch runs once.

    Attributes:
        written: bytes of the largest file in which values waited.
    """

    written = 0

    def __init__(self, model: nn.Module, donor: nn.Module) -> None:
        self.model, self.donor = model, as_recordable(donor, model)
        self.graphs: dict[int, fx.Graph] = {}
        self.donor_graphs: dict[int, fx.Graph] = {}

    def over(self, batches: Sequence[Tensor]) -> tuple[Recorded, Recorded]:
        """Of both networks, ready for these batches."""
        both = Recorded(self.model, batches[0], self.graphs), Recorded(self.donor, batches[0], self.donor_graphs)
        for batch in sizes_of(batches).values():
            for recorded in both:
                recorded.prepare(batch)
        return both


class Pair:
    """A converted network and its donor, advanced layer by layer over the same batches.

    Args:
        half: hold values in float16 where they fit.
        runs: of the same two networks, where there are some.

    Attributes:
        student, donor: the two runs.
        twin: for a position of the student's run, that of the donor's.
        store: of both runs' values that do not fit in memory; ``with`` closes it.
    """

    def __init__(
        self, model: nn.Module, donor: nn.Module, batches: Sequence[Tensor], *, half: bool, runs: Runs | None = None
    ) -> None:
        self.runs = runs or Runs(model, donor)
        student_run, donor_run = self.runs.over(batches)
        self.store, most = Store(), most_held(batches[0].device) // 2
        self.student = World(student_run, batches, half=half, store=self.store, most_held=most)
        self.donor = World(donor_run, batches, half=half, store=self.store, most_held=most)
        self.twin = aligned(student_run, donor_run)
        for call in student_run.layer_calls():
            if call not in self.twin:
                raise ModelError(
                    f"{student_run.path(call)}: the donor does not call it in the same place; give the network that "
                    "was converted, one that calls the same functions for every image."
                )

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *error: object) -> None:
        self.runs.written = max(self.runs.written, self.store.end)
        self.store.close()

    def answer_in_donor(self, part: Part, number: int) -> int:
        """Where the donor's answer to a part's call stands: behind its norm, be the student's there or not."""
        return self.twin[part.answers[number]]


def as_recordable(donor: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of the donor in which every layer that the student converts is one call of a torch function.

    Raises:
        RewriteError: the donor is not the network that was converted.
    """
    plan = conversion_of(model)
    plain = [
        replace(decision, has_gain=False, adds_bias=False, drops_bias=False)
        if decision.action == "convert"
        else decision
        for decision in plan.decisions
    ]
    options = Options(operator="identity")
    plan = replace(plan, decisions=tuple(plain), options=options, removed_norms=(), removed_activations=())
    donor = copy.deepcopy(donor).eval().requires_grad_(False)
    try:
        apply_(donor, plan)
    except RewriteError as error:
        raise RewriteError(f"the donor is not the network that was converted: {error}") from error
    return donor


def angular_call(part: Part, function: Any) -> Any:
    """What a converted layer computes in the place of the recorded plain call."""

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        layer = part.module
        assert isinstance(layer, AngularLayer)
        given = Call.of(function, args, kwargs)
        gain = layer.output_gain()
        gain = None if gain is None else gain[part.rows]
        weight = layer.filters()[part.rows]
        if not given.is_conv:
            return sphere_linear(
                given.input, weight, given.bias, operator=layer.operator, k=part.k, eps=layer.eps, gain=gain
            )
        window = {**given.window(), "padding_mode": "zeros"}  # other modes were padded by a function of their own
        dims = weight.dim() - 2
        return sphere_conv(dims, given.input, weight, given.bias, layer.operator, part.k, layer.eps, gain, window)

    return call


class Gatherer:
    """Rows, targets and what stands beside them, for one part, sampled over all batches.

    Args:
        weights: of the rows, by answer and batch.
    """

    def __init__(
        self,
        pair: Pair,
        part: Part,
        *,
        rows_wanted: int,
        corrects: bool,
        seed: int,
        weights: dict[int, list[Tensor]] | None = None,
    ) -> None:
        self.pair, self.part, self.given_weights = pair, part, weights or {}
        self.generator = torch.Generator().manual_seed(seed)
        recorded = pair.student.recorded
        own = bits_of(part.calls)
        # a later call of a shared layer sees what its first call makes of it: there the donor's inputs serve
        self.by_donor = [bool(recorded.ancestors[call] & own & ~(1 << call)) for call in part.calls]
        images = sum(len(batch) for batch in pair.student.batches)
        self.share = rows_wanted / images / len(part.calls)
        self.corrects = corrects
        self.rows: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.truths: list[Tensor] = []
        self.beside: list[Tensor] = []
        self.weights: list[Tensor] = []

    def gather(self) -> None:
        student, donor, twin = self.pair.student, self.pair.donor, self.pair.twin
        run = student.recorded
        for index, call in enumerate(self.part.calls):
            answer, place = self.part.answers[index], self.part.sums[index] if self.corrects else None
            ahead = [] if self.by_donor[index] else inputs_of(run, call)
            ahead += [place[1]] if place else []
            student.advance(ahead)
            behind = [twin[answer], *([twin[place[0]]] if place else [])]
            before = inputs_of(donor.recorded, twin[call]) if self.by_donor[index] else []

            def visit(number: int, values: list[Tensor], index: int = index) -> None:
                self.take(number, index, values)

            donor.advance([*behind, *before], visit)

    def take(self, number: int, index: int, values: list[Tensor]) -> None:
        student, donor, part = self.pair.student, self.pair.donor, self.part
        position, place = part.calls[index], part.sums[index] if self.corrects else None
        world, at = (donor, self.pair.twin[position]) if self.by_donor[index] else (student, position)
        call = Call.of(student.recorded.nodes[position].target, *world.arguments(number, at))
        truth = values[0].float()
        check_finite(part.name, "its output in the donor", truth)
        check_finite(part.name, f"its input in {'the donor' if world is donor else 'the converted model'}", call.input)
        target, beside = truth, None
        if place is not None:
            check_finite(part.name, "the sum behind it in the donor", values[1])
            other = student.value(number, place[1]).float()
            check_finite(part.name, "what is added to it in the converted model", other)
            target, beside = self.corrected(number, index, truth, values[1].float(), other)
        truth = output_rows(truth, call.is_conv)
        count = max(1, round(self.share * len(student.batches[number])))
        chosen = sampled(len(truth), count, self.generator, truth.device)
        groups = call.groups if call.is_conv else 1
        rows = patch_rows(call, chosen)
        if isinstance(part.module, AngularLayer):
            rows = unit_rows(rows, part.module.eps)
            if isinstance(part.module, StandardisedFilters):
                rows = rows - rows.mean(2, keepdim=True)
        self.rows.append(rows)
        if part.answers[index] in self.given_weights:
            self.weights.append(self.given_weights[part.answers[index]][number][chosen].float())

        def split(values: Tensor) -> Tensor:
            return output_rows(values, call.is_conv)[chosen].unflatten(1, (groups, -1)).transpose(0, 1)

        self.truths.append(truth[chosen].unflatten(1, (groups, -1)).transpose(0, 1))
        if place is not None:
            self.targets.append(split(target))
        if beside is not None:
            self.beside.append(split(beside))

    def corrected(
        self, number: int, index: int, truth: Tensor, total: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The answer with which the student's sum is the donor's, and the summand beside it where they are alike."""
        student, part = self.pair.student, self.part
        answer, place = part.answers[index], part.sums[index]
        assert place is not None
        if answer in [student.recorded.position[node] for node in student.recorded.nodes[place[0]].all_input_nodes]:
            return total - other, other
        chain = chain_to(student.recorded, answer, place[0])
        with torch.enable_grad():
            start = truth.detach().requires_grad_()
            end = student.through(number, answer, start, chain)
            shifted = student.through(number, answer, start.detach() + 1.0, chain)
            error = (total - other - end).detach()
            pulled, size = (
                torch.autograd.grad(end, start, direction, retain_graph=True)[0]
                for direction in (error, (shifted - end).detach())
            )
        smallest = size.abs().amax() * 1e-6
        return truth + torch.where(size > smallest, pulled / size.clamp_min(1e-30), torch.zeros_like(pulled)), None

    def samples(self, one_sided: bool) -> tuple[Samples, Tensor]:
        """What to fit, and the donor's true answers to the same rows, which are given away and cannot be had again."""
        truths = torch.cat(self.truths, 1)
        targets = torch.cat(self.targets, 1) if self.targets else truths
        samples = Samples(torch.cat(self.rows, 1), targets)
        self.rows.clear()
        samples.weights = self.normalised_weights(samples.rows.shape[1])
        if one_sided and len(self.part.calls) == 1:
            run, place = self.pair.student.recorded, self.part.sums[0] if self.corrects else None
            behind = place[0] if place and self.beside else self.part.answers[0]
            if not place or self.beside:
                samples.low, samples.high = bounds_after(run, behind)
                samples.beside = torch.cat(self.beside, 1) if self.beside else None
        return samples, truths

    def normalised_weights(self, count: int) -> Tensor | None:
        """(count,) with a mean of 1, or None where there are none for every row, or all are 0."""
        weights = torch.cat(self.weights) if self.weights else torch.empty(0)
        mean = weights.mean() if len(weights) == count else 0.0
        if not mean > 0.0:
            return None
        return (weights / mean + LEAST_WEIGHT) / (1.0 + LEAST_WEIGHT)


def check_finite(name: str, what: str, values: Tensor) -> None:
    """Raises ModelError for NaN or infinity: the images are finite, so it arose in the network."""
    if values.sum().isfinite():  # many times as fast, and no sum with NaN or infinity is finite
        return
    if not bool(values.isfinite().all()):
        remedy = "check its weights" if "donor" in what else "keep the layers in front of it plain (exclude=...)"
        raise ModelError(
            f"{name or 'the model'}: {what} holds NaN or infinite numbers, though the images are finite; {remedy} "
            "and the functions in front of it."
        )


def inputs_of(recorded: Recorded, position: int) -> list[int]:
    """The activations that a call uses."""
    return [recorded.position[node] for node in recorded.flow.sources(recorded.nodes[position])]


def chain_to(recorded: Recorded, start: int, end: int) -> list[int]:
    """The positions strictly between a result and the addition it goes into."""
    chain, position = [], recorded.users[start][0]
    while position != end:
        chain.append(position)
        position = recorded.users[position][0]
    return chain


def rows_wanted(part: Part, limit: int) -> int:
    """As many rows as fit: a multiple of the fan-in, within the memory for one layer."""
    outputs, fan_in = part.filters.shape[0], part.filters[0].numel()
    groups = getattr(part.module, "groups", 1)
    width = groups * fan_in + 3 * outputs
    return max(min(limit, FLOATS_KEPT // width), 64)
