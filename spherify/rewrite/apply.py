"""Carrying out a plan, and taking it back."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from spherify.errors import RewriteError
from spherify.layers.angular import AngularLayer
from spherify.layers.folded import Folded
from spherify.layers.redirected import Redirected, redirected_class
from spherify.layers.removed import Removed
from spherify.plan.plan import Plan
from spherify.rewrite.swaps import ORIGIN, put_back_, remove_, swap_, swap_back_

MOST_NAMED = 3  # problems spelt out in one line
CONVERSION = "spherify_conversion"  # attribute of a converted model: the plan that was carried out on it
CHECKSUM = "_spherify_checksum"  # attribute of a converted model: of its weights as they were then


def misfits(model: nn.Module, plan: Plan) -> list[str]:
    """In words, the layers of a plan that do not stand in a plain model as the plan has them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for site in (decision.site for decision in plan.decisions):
        module = modules.get(site.name)
        weight = getattr(module, "weight", None)
        name = site.name or "the model"
        if module is None or any(modules.get(alias) is not module for alias in site.aliases):
            found.append(f"{name} is missing")
        elif type(module) is not site.source_type:
            found.append(f"{name} is a {type(module).__name__}, not a {site.type}")
        elif isinstance(weight, Tensor) and tuple(weight.shape) != site.shape:
            found.append(f"{name} has shape {tuple(weight.shape)}, not {site.shape}")
    found += [
        f"{name} is missing"
        for name in (*plan.removed_norms, *plan.removed_activations, *plan.redirected)
        if name not in modules
    ]
    return found


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
    setattr(model, CHECKSUM, checksum(model))


def checksum(model: nn.Module) -> float:
    """A number that changes with the weights and buffers; nan while they have no data."""
    values = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    if any(value.is_meta for value in values):
        return math.nan
    kinds = (value.double() for value in values if not value.is_complex())
    return sum(float(value.sum() + value.square().sum()) for value in kinds)


def is_untouched(model: nn.Module) -> bool:
    """The weights of a converted model are still those that it was converted with."""
    return bool(model.__dict__.get(CHECKSUM, math.nan) == checksum(model))


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
    removed = [(name, part) for name, part in model.named_modules() if isinstance(part, Removed)]
    check_that_all_was_saved(model, converted, removed)
    for part in model.modules():
        if isinstance(part, Redirected):
            part.__class__ = part.redirected_from  # type: ignore[assignment]
    for _, norm in removed:
        put_back_(norm, model)
    for _, layer in converted:
        swap_back_(layer)
    model.__dict__.pop(CONVERSION, None)
    model.__dict__.pop(CHECKSUM, None)
    return len(converted) + len(removed)


def check_that_all_was_saved(
    model: nn.Module, converted: list[tuple[str, AngularLayer]], removed: list[tuple[str, Removed]]
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
