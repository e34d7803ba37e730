"""The check after a conversion: one more recorded run against what the plan said."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spherify.errors import ModelError, RewriteError, SpherifyError
from spherify.graph.readers import names_by_object, readers_of_weights
from spherify.graph.record import Inputs, Recording, record
from spherify.layers.angular import AngularLayer
from spherify.layers.redirected import Redirected
from spherify.plan.plan import Plan


def check_that_something_is_converted(plan: Plan) -> None:
    """Raises SpherifyError with the rules that kept every layer."""
    if plan.converted:
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
        if old.device == new.device == "meta" and old.output_shapes != new.output_shapes:
            mode = "train" if old.training else "eval"
            problems.append(f"in {mode} mode the outputs have shapes {new.output_shapes}, not {old.output_shapes}")
    readers = readers_of_weights(model, after, names_by_object(model))
    for decision in plan.converted:
        name = decision.site.name
        if not isinstance(model.get_submodule(name), AngularLayer):
            problems.append(f"{name} is a {type(model.get_submodule(name)).__name__}, not a converted layer")
        if not any(recording.calls.get(name) for recording in after):
            problems.append(f"{name} was converted but does not run")
        others = {path: uses for path, uses in readers.get(name, {}).items() if path != name}
        if outside := sorted(path for path, uses in others.items() if not is_harmless(model, path, uses)):
            problems.append(f"the weight of {name} is read by {outside[0] or 'the model itself'}")
    if problems:
        raise RewriteError(f"{plan.model}: the conversion does not hold: {'; '.join(problems)}.")


def is_harmless(model: nn.Module, path: str, uses: set[str]) -> bool:
    """The fast path of ``nn.TransformerEncoderLayer`` is not taken once the layer is redirected."""
    return uses == {"fast path"} and isinstance(model.get_submodule(path), Redirected)
