"""Taking the costliest layers of a conversion back: planned again without them, on the donor's weights."""

from __future__ import annotations

import copy
import glob
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from spherify.calibrate.effects import Effects
from spherify.convert import plan
from spherify.errors import OptionError, RewriteError
from spherify.plan.decision import Decision
from spherify.plan.plan import Plan
from spherify.rewrite.apply import CONVERSION, apply_, conversion_of, undo_


def check_keep_worst(model: nn.Module, count: int) -> None:
    """Raises OptionError unless so many layers of the body can be taken back and one is left."""
    conversion = conversion_of(model)
    most = len(conversion.converted) - 1
    if not 0 <= count <= most:
        raise OptionError(f"keep_worst={count} is out of range; {most + 1} layers are converted, choose 0 to {most}.")
    if count and (conversion.heads or any(decision.new_classes is not None for decision in conversion.decisions)):
        raise OptionError(
            "keep_worst converts the donor anew and would lose the model's new classifier; convert with head=keep and "
            "the donor's number of classes, or name the layers with exclude=..."
        )


def converted_without(model: nn.Module, donor: nn.Module, effects: Effects, count: int, example: Tensor) -> nn.Module:
    """The donor converted anew as ``model`` was, but for the layers with the largest errors; ``model`` stays as it is.

    Raises:
        RewriteError: what the conversion removed was not saved with the folder that ``model`` was loaded from; or
            planned again, another layer would be decided upon otherwise.
    """
    old = conversion_of(model)
    names = effects.worst(count)
    fresh = copy.deepcopy(model).eval()
    undo_(fresh)
    fresh.load_state_dict(donor.state_dict())
    options = replace(old.options, exclude=(*old.options.exclude, *(glob.escape(name) for name in names)))
    report = plan(fresh, example_input=example, **options.to_dict())
    check_the_rest(old, report, names)
    report.apply(inplace=True)
    errors = {layer.name: layer.error for layer in effects.layers}
    note = f"Kept plain by keep_worst={count}: {', '.join(names)}."
    noted = replace(
        conversion_of(fresh),
        model=old.model,
        decisions=tuple(with_reason(decision, errors, names, count) for decision in report.decisions),
        notes=(*report.notes, note),
    )
    setattr(fresh, CONVERSION, noted)
    return fresh


def check_the_rest(old: Plan, new: Plan, names: Sequence[str]) -> None:
    before = {decision.site.name for decision in old.converted}
    after = {decision.site.name for decision in new.converted}
    if others := sorted((before - after) ^ set(names) | (after - before)):
        raise RewriteError(
            f"keep_worst: planned again without {', '.join(names)}, {others[0]} is decided upon otherwise than before; "
            "convert the donor with exclude=... instead."
        )


def with_reason(decision: Decision, errors: dict[str, float], names: Sequence[str], count: int) -> Decision:
    name = decision.site.name
    if name not in names:
        return decision
    return replace(decision, reason=f"keep_worst={count}: alone it costs {100 * errors[name]:.3g} % of the outputs")


def become_(model: nn.Module, other: nn.Module) -> None:
    """Give ``model`` the conversion and all values of ``other``, in place: its plain Parameters stay the same objects.

    Modes of modules and flags of Parameters stay as they are.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    undo_(model)
    apply_(model, conversion_of(other))
    model.load_state_dict(other.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    for module, mode in modes:
        module.training = mode
