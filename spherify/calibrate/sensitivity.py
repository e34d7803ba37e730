"""``sensitivity``: what each converted layer costs when it alone is converted and transplanted."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spherify.calibrate.donor import donor_of
from spherify.calibrate.effects import Effect, Effects
from spherify.calibrate.images import collected, is_large
from spherify.calibrate.pair import Pair, Runs
from spherify.calibrate.replay import departure
from spherify.calibrate.report import compared
from spherify.calibrate.transplant import Settings, transplant_
from spherify.errors import ModelError
from spherify.plan.decision import Decision
from spherify.plan.plan import Plan
from spherify.rewrite.apply import apply_, conversion_of


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    donor: nn.Module | None = None,
    *,
    images: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Effects:
    """For each converted layer, the error of the network's outputs when that layer alone is converted.

    The layer stands in the donor, is transplanted on the donor's activations, and all else stays the donor's. So the
    errors do not hold what layers do to each other, nor what later layers make up for; they do not add up to the error
    of the whole model. The other way round, one layer put back in the calibrated model, would measure little: its
    neighbours were fitted to its errors. The cost is about one transplant and two recorded runs for each layer.

    Args:
        model: what ``spherify`` returned; it is not changed, and of its weights only the donor's matter.
        batches: of input tensors (N, ...) or of (inputs, targets); targets are not looked at.
        donor: the network before its conversion. Without it, it is taken from ``model`` as in ``calibrate``.
        images: use so many at most; the outputs are compared on the first 128 or so, fewer in large networks.
        seed: of the positions drawn.
        progress: called with the name of each layer before it is worked on.

    Raises:
        As ``calibrate``.
    """
    conversion_of(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    parts = collected(batches, images, device)
    return measured(model, donor_of(model) if donor is None else donor, parts, seed=seed, progress=progress)


def measured(
    model: nn.Module,
    donor: nn.Module,
    parts: Sequence[Tensor],
    *,
    seed: int,
    progress: Callable[[str], None] | None,
) -> Effects:
    """``sensitivity`` on images that were collected."""
    started = time.perf_counter()
    if (problem := departure(model, donor, parts)) is not None:
        remedy = "have its forward call the same functions for every image"
        raise ModelError(f"{type(model).__name__}: {problem}; {remedy}.")
    plan = conversion_of(model)
    effects = []
    for decision in plan.converted:
        name = decision.site.name
        if progress is not None:
            progress(name)
        single = copy.deepcopy(donor).eval()
        apply_(single, with_one_layer(plan, name))
        settings = Settings(seed=seed, refits_kept=False, weighs_rows=False)
        runs = Runs(single, donor)
        with Pair(single, donor, parts, half=is_large(parts), runs=runs) as pair:
            transplant_(pair, settings)
        error, cosine = compared(single, donor, parts, runs)[""]
        effects.append(Effect(name=name, error=error, cosine=cosine))
    count = sum(len(part) for part in parts)
    return Effects(layers=tuple(effects), images=count, seconds=time.perf_counter() - started)


def with_one_layer(plan: Plan, name: str) -> Plan:
    """The plan with a single layer converted; norms and activations behind others, and the classifier, stay."""
    others = [decision for decision in plan.converted if decision.site.name != name]
    still_used = {decision.site.norm for decision in others} | {decision.site.activation for decision in others}

    def alone(decision: Decision) -> Decision:
        decision = replace(decision, new_classes=None)
        if decision.site.name == name:
            return decision
        return replace(decision, action="keep", has_gain=False, adds_bias=False, drops_bias=False, head=None)

    return replace(
        plan,
        decisions=tuple(alone(decision) for decision in plan.decisions),
        removed_norms=tuple(path for path in plan.removed_norms if path not in still_used),
        removed_activations=tuple(path for path in plan.removed_activations if path not in still_used),
    )
