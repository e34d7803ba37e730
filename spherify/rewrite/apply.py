"""Carrying out a plan, and taking it back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from spherify.errors import RewriteError
from spherify.heads.angular import AngularHead
from spherify.heads.loss import HEADS_OF_MODEL
from spherify.layers.angular import AngularLayer
from spherify.layers.folded import Folded
from spherify.layers.redirected import Redirected, redirected_class
from spherify.layers.removed import Removed
from spherify.plan.decision import Decision
from spherify.plan.plan import Plan
from spherify.rewrite.classifiers import RESIZED, resize_, resize_back_, swap_head_, swap_head_back_
from spherify.rewrite.swaps import ORIGIN, put_back_, remove_, swap_, swap_back_

MOST_NAMED = 3  # problems spelt out in one line
REPLACED = "replaced"  # the rule of a layer that is another one than the plan's since the conversion
CONVERSION = "spherify_conversion"  # attribute of a converted model: the plan that was carried out on it
DEVICES_AGREE = 1e-12  # relative: each sums up in an order of its own, in float64
PIECE = 1 << 18  # numbers
CHECKSUM = "_spherify_checksum"  # attribute of a converted model: of its weights as they were then


def misfits(model: nn.Module, plan: Plan) -> list[str]:
    """In words, the layers of a plan that do not stand in a plain model as the plan has them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for decision in plan.decisions:
        site = decision.site
        module = modules.get(site.name)
        weight = getattr(module, "weight", None)
        name = site.name or "the model"
        if module is None or any(modules.get(alias) is not module for alias in site.aliases):
            found.append(f"{name} is missing")
        elif type(module) is not site.source_type:
            found.append(f"{name} is a {type(module).__name__}, not a {site.type}")
        elif isinstance(weight, Tensor) and not fits(tuple(weight.shape), decision):
            found.append(f"{name} has shape {tuple(weight.shape)}, not {site.shape}")
    found += [
        f"{name} is missing"
        for name in (*plan.removed_norms, *plan.removed_activations, *plan.redirected)
        if name not in modules
    ]
    return found


def fits(shape: tuple[int, ...], decision: Decision) -> bool:
    """Whether a weight has the shape of the plan; a classifier that gets a new size may have any."""
    start = 0 if decision.new_classes is None else 1
    return len(shape) == len(decision.site.shape) and shape[start:] == decision.site.shape[start:]


def in_short(problems: list[str]) -> str:
    """The first few of many."""
    more = f" and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
    return "; ".join(problems[:MOST_NAMED]) + more


def apply_(model: nn.Module, plan: Plan) -> None:
    """Convert the plan's layers in place and note the plan on the model.

    Raises:
        RewriteError: the plan is another model's; nothing is changed then.
    """
    if problems := misfits(model, plan):
        raise RewriteError(f"the plan for {plan.model} does not fit this {type(model).__name__}: {in_short(problems)}.")
    for decision in plan.decisions:
        if decision.new_classes is not None:
            resize_(model, decision.site.name, decision.new_classes)
    for decision in plan.heads:
        swap_head_(model.get_submodule(decision.site.name), decision)
    shared: AngularLayer | None = None
    for decision in plan.converted:
        layer = swap_(model.get_submodule(decision.site.name), decision, plan.options)
        if plan.options.k_shared == "network" and layer.k_logit is not None:
            shared = shared or layer
            layer.k_logit = shared.k_logit
    for name in (*plan.removed_norms, *plan.removed_activations):
        remove_(model.get_submodule(name), name)
    for name in plan.redirected:
        owner = model.get_submodule(name)
        owner.__class__ = redirected_class(type(owner))
    setattr(model, CONVERSION, replace(plan, carry_out=None))
    if plan.options.has_angular_head:
        setattr(model, HEADS_OF_MODEL, tuple(decision.site.name for decision in plan.decisions if was_head(decision)))
    setattr(model, CHECKSUM, checksum(model))


def was_head(decision: Decision) -> bool:
    """Whether a classifier is an angular head, or was one before it was replaced (``reset_classifier``)."""
    return decision.head is not None or (decision.rule == REPLACED and "@head" in decision.site.roles)


def checksum(model: nn.Module) -> float:
    """A number that changes with the weights and buffers; nan while they have no data."""
    values = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    if any(value.is_meta for value in values):
        return math.nan
    parts = (part for value in values if not value.is_complex() for part in sums_and_lengths(value.detach()))
    return math.fsum(filter(math.isfinite, parts))  # bounds of a clamp may be -inf and inf


def sums_and_lengths(value: Tensor) -> Iterator[float]:
    """In float64, piece by piece: on the CPU torch makes a copy of what it adds up in a wider type.

    Numbers, not tensors: each tensor kept would stand behind a copy in memory, and keep its room from being used again.
    """
    for piece in value.reshape(-1).split(PIECE):
        yield float(piece.sum(dtype=torch.float64))
        if value.is_floating_point():
            yield float(torch.linalg.vector_norm(piece, dtype=torch.float64))


def is_untouched(model: nn.Module) -> bool:
    """The weights of a converted model are still those that it was converted with, on whatever device they are now."""
    return math.isclose(model.__dict__.get(CHECKSUM, math.nan), checksum(model), rel_tol=DEVICES_AGREE)


def undo_(model: nn.Module) -> int:
    """Take back whatever was converted in ``model``; its outputs are those of the plain network bit for bit.

    Returns:
        The number of layers and modules restored.

    Raises:
        RewriteError: something removed was not saved with the folder that the model was loaded from. Nothing is
            changed then.
    """
    if any(isinstance(part, Folded) for part in model.modules()):
        raise RewriteError(
            f"{type(model).__name__} is folded: its plain weights are gone; take back the unfolded model."
        )
    converted = [
        (name, part) for name, part in model.named_modules() if isinstance(part, AngularLayer) and hasattr(part, ORIGIN)
    ]
    heads = [
        (name, part) for name, part in model.named_modules() if isinstance(part, AngularHead) and hasattr(part, ORIGIN)
    ]
    resized = [part for part in model.modules() if hasattr(part, RESIZED)]
    removed = [(name, part) for name, part in model.named_modules() if isinstance(part, Removed)]
    check_that_all_was_saved(model, [*converted, *heads], removed)
    for part in model.modules():
        if isinstance(part, Redirected):
            part.__class__ = part.redirected_from  # type: ignore[assignment]
    for _, norm in removed:
        put_back_(norm, model)
    for _, layer in converted:
        swap_back_(layer)
    for _, head in heads:
        swap_head_back_(head)
    for classifier in resized:
        resize_back_(model, classifier)
    for mark in (CONVERSION, CHECKSUM, HEADS_OF_MODEL):
        model.__dict__.pop(mark, None)
    return len(converted) + len(heads) + len(resized) + len(removed)


def check_that_all_was_saved(
    model: nn.Module, converted: Sequence[tuple[str, nn.Module]], removed: list[tuple[str, Removed]]
) -> None:
    """Raises RewriteError where a dropped bias or a removed norm stayed behind on meta when a folder was loaded."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    biases = [(name, [getattr(part, ORIGIN).dropped_bias]) for name, part in converted]
    norms = [(name, [*part.stored_state[0].values(), *part.stored_state[1].values()]) for name, part in removed]
    for name, tensors in biases + norms:
        if any(tensor is not None and tensor.is_meta for tensor in tensors):
            raise RewriteError(
                f"{name}: the conversion removed a bias or norm here, and the folder the model was loaded from does "
                "not hold it; convert the plain model again instead."
            )


def conversion_of(model: nn.Module) -> Plan:
    """The plan that was carried out on a converted model.

    Raises:
        RewriteError: the model was not converted by ``spherify``.
    """
    plan = model.__dict__.get(CONVERSION)
    if plan is None:
        raise RewriteError(f"{type(model).__name__} is not a converted model; convert it with spherify(model) first.")
    return plan
