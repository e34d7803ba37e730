"""The check after a conversion: one more recorded run against what the plan said."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spherify.errors import ModelError, RewriteError, SpherifyError
from spherify.graph.readers import names_by_object, readers_of_weights
from spherify.graph.record import Inputs, Recording, record
from spherify.heads.angular import AngularHead
from spherify.layers.angular import AngularLayer
from spherify.layers.redirected import Redirected
from spherify.plan.decision import Decision
from spherify.plan.plan import Plan


def check_that_something_is_converted(plan: Plan) -> None:
    """Raises SpherifyError with the rules that kept every layer."""
    if plan.converted or plan.heads or any(decision.new_classes is not None for decision in plan.decisions):
        return
    if not plan.decisions:
        raise SpherifyError(f"{plan.model}: no conv or linear layer was found, so there is nothing to convert.")
    kept: dict[str, int] = {}
    for decision in plan.decisions:
        kept[decision.rule] = kept.get(decision.rule, 0) + 1
    rules = ", ".join(f"{count} by {rule}" for rule, count in kept.items())
    raise SpherifyError(f"{plan.model}: nothing would be converted ({rules}); loosen include, exclude, head or linear.")


def verify(model: nn.Module, plan: Plan, before: Sequence[Recording], inputs: Inputs) -> None:
    """Every converted layer runs, no converted weight is read outside, the outputs have the shapes they had.

    Args:
        model: the converted model; not run itself, not changed.
        before: recordings of the plain model; each is repeated in its mode.

    Raises:
        RewriteError: all that does not hold, in one line.
    """
    try:
        after = [record(model, inputs, training=recording.training) for recording in before]
    except ModelError as error:
        raise RewriteError(f"{plan.model}: the converted model does not run: {error}") from error
    problems = []
    for old, new in zip(before, after, strict=True):
        if old.device == new.device == "meta" and not are_as_expected(old, new, plan):
            mode = "train" if old.training else "eval"
            problems.append(f"in {mode} mode the outputs have shapes {new.output_shapes}, not {old.output_shapes}")
    readers = readers_of_weights(model, after, names_by_object(model))
    for decision in (*plan.converted, *plan.heads):
        name = decision.site.name
        if not isinstance(model.get_submodule(name), AngularLayer if decision.head is None else AngularHead):
            problems.append(f"{name} is a {type(model.get_submodule(name)).__name__}, not a converted layer")
        if not any(recording.calls.get(name) for recording in after):
            problems.append(f"{name} was converted but does not run")
        others = {path: uses for path, uses in readers.get(name, {}).items() if path != name}
        if outside := sorted(path for path, uses in others.items() if not is_harmless(model, path, uses)):
            problems.append(f"the weight of {name} is read by {outside[0] or 'the model itself'}")
    if problems:
        raise RewriteError(f"{plan.model}: the conversion does not hold: {'; '.join(problems)}.")


def are_as_expected(old: Recording, new: Recording, plan: Plan) -> bool:
    """Whether the outputs have the shapes they had, but for the number of classes and the channel of a margin."""
    pairs = [(d.site.shape[0], width_of(d, new.training)) for d in plan.decisions if d.site.shape]
    widths = {before: after for before, after in pairs if before != after}
    shapes = [
        tuple(widths.get(size, size) if size != given else given for size, given in zip(before, after, strict=False))
        for before, after in zip(old.output_shapes, new.output_shapes, strict=False)
    ]
    is_changed = old.output_shapes != new.output_shapes
    return tuple(shapes) == new.output_shapes and (is_changed or not widths) and len(shapes) == len(old.output_shapes)


def width_of(decision: Decision, training: bool) -> int:
    """How many channels a layer's output has after the conversion."""
    classes = decision.new_classes or decision.site.shape[0]
    return classes + int(training and decision.head is not None and decision.head.gives_norm)


def is_harmless(model: nn.Module, path: str, uses: set[str]) -> bool:
    """The fast path of ``nn.TransformerEncoderLayer`` is not taken once the layer is redirected."""
    return uses == {"fast path"} and isinstance(model.get_submodule(path), Redirected)
