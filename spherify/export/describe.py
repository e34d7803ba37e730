"""What a converted model is now: how its base is built, and its plan as it stands."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from spherify.errors import OptionError
from spherify.heads.angular import AngularHead
from spherify.layers.angular import AngularLayer
from spherify.layers.removed import Removed
from spherify.models.resolve import CUSTOM, SOURCE, Source, build, source_of
from spherify.plan.decision import Decision
from spherify.plan.plan import Plan
from spherify.rewrite.apply import REPLACED
from spherify.rewrite.swaps import ORIGIN


def plan_as_it_stands(model: nn.Module, plan: Plan) -> Plan:
    """The plan without what was taken out since the conversion; ``reset_classifier`` makes a new layer, for one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    decisions = (decision_as_it_stands(decision, modules) for decision in plan.decisions)
    return replace(
        plan,
        decisions=tuple(decision for decision in decisions if decision is not None),
        removed_norms=tuple(name for name in plan.removed_norms if isinstance(modules.get(name), Removed)),
        removed_activations=tuple(name for name in plan.removed_activations if isinstance(modules.get(name), Removed)),
    )


def decision_as_it_stands(decision: Decision, modules: dict[str, nn.Module]) -> Decision | None:
    """The decision on the layer that stands there now; None where there is another kind of module or none."""
    module = modules.get(decision.site.name)
    is_converted = isinstance(module, (AngularLayer, AngularHead))
    if not is_converted and type(module) is not decision.site.source_type:
        return None
    assert module is not None
    aliases = tuple(alias for alias in decision.site.aliases if modules.get(alias) is module)
    site = replace(decision.site, aliases=aliases)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and tuple(weight.shape) != site.shape:
        site = replace(site, shape=tuple(weight.shape), fan_in=math.prod(weight.shape[1:]))
    if is_converted or decision.action != "convert":
        return replace(decision, site=site)
    return Decision(site=site, action="keep", rule=REPLACED, reason="a new plain layer since the conversion")


def source_for(model: nn.Module, arguments: dict[str, Any] | None) -> Source:
    """How the base is built, if building it so gives this very structure; else it is the user's own model."""
    source = model.__dict__.get(SOURCE) or source_of(model)
    given = {**source.arguments, **(arguments or {})}
    try:
        json.dumps(given)
    except TypeError as error:
        raise OptionError(f"arguments {given} cannot be written to config.json ({error}); give plain values.") from None
    classes = getattr(model, "num_classes", None)
    if source.library == "timm" and arguments is None and isinstance(classes, int):
        given["num_classes"] = classes
    source = Source(source.library, source.name, source.version, given)
    if source.library == CUSTOM:
        return source
    difference = first_difference(model, plain_base(source))
    if difference is None:
        return source
    warnings.warn(
        f"{source.label} built with {given} is not this model: {difference}. It is saved as a model of your own; "
        "pass arguments=... to save, or base=... to load.",
        stacklevel=3,
    )
    kind = type(model)
    return Source(CUSTOM, f"{kind.__module__}.{kind.__qualname__}", "")


def plain_base(source: Source) -> nn.Module:
    try:
        return build(source, device="meta")
    except OptionError:  # some builders compute with tensors
        return build(source)


def first_difference(model: nn.Module, base: nn.Module) -> str | None:
    """Where the structure of a converted model differs from that of a plain one, in words."""
    mine, theirs = dict(structure_of(model)), dict(structure_of(base))
    for path in [*mine, *theirs]:
        if mine.get(path) != theirs.get(path):
            return f"{path or 'the model'} is {mine.get(path, 'missing')}, not {theirs.get(path, 'missing')}"
    return None


def structure_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Path and printed form of each module as it is in the plain model, without its biases."""
    for path, module in model.named_modules():
        kind: type[nn.Module] = type(module)
        if isinstance(module, Removed):
            kind, words = module.source_type, module.source_words
        else:
            if isinstance(module, (AngularLayer, AngularHead)) and hasattr(module, ORIGIN):
                kind = getattr(module, ORIGIN).source_type
            words = kind.extra_repr(module)
        yield path, f"{kind.__name__}({re.sub(r',? ?bias=(True|False)', '', words)})"
