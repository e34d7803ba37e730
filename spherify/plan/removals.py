"""Norms and activations that the options take away, and those that other layers need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spherify.plan.options import Options

if TYPE_CHECKING:
    from spherify.plan.decision import Decision

RunsAfter = Mapping[str, Sequence[str]]  # path of a norm or an activation -> what it runs after (graph/uses.py)
NOWHERE_ELSE: RunsAfter = {}


def removals(
    decisions: Sequence[Decision], options: Options, shared_norms: Mapping[str, Sequence[str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the BatchNorms and of the activations that the options take away, each once."""
    sites = [decision.site for decision in decisions if decision.action == "convert" and decision.head is None]
    norms = [site.norm for site in sites if site.norm is not None and options.norm == "remove"]
    activations = [site.activation for site in sites if site.activation is not None and options.activation == "remove"]
    return tuple(path for path in dict.fromkeys(norms) if path not in shared_norms), tuple(dict.fromkeys(activations))


def norms_in_other_use(
    decisions: Sequence[Decision], options: Options, runs_after: RunsAfter
) -> dict[str, tuple[str, ...]]:
    """The BatchNorms behind converted layers that run after something else too, and what; {} with norm=keep."""
    if options.norm == "keep":
        return {}
    behind: dict[str, set[str]] = {}
    for decision in decisions:
        if decision.site.norm is not None and decision.action == "convert":
            behind.setdefault(decision.site.norm, set()).add(decision.site.name)
    others: dict[str, list[str]] = {norm: list(runs_after.get(norm, ())) for norm in behind}
    for decision in decisions:
        if decision.site.norm in others:
            others[decision.site.norm].append(decision.site.name)
    found = {
        norm: [name for name in dict.fromkeys(names) if name not in behind[norm]] for norm, names in others.items()
    }
    return {norm: tuple(names) for norm, names in found.items() if names}


def activations_in_other_use(decisions: Sequence[Decision], runs_after: RunsAfter) -> dict[str, tuple[str, ...]]:
    """The activations behind converted layers that run after something else too, and what."""
    behind: dict[str, set[str]] = {}
    for decision in decisions:
        if decision.site.activation is not None and decision.action == "convert":
            behind.setdefault(decision.site.activation, set()).add(decision.site.name)
    found = {
        path: tuple(other for other in runs_after.get(path, ()) if other not in names) for path, names in behind.items()
    }
    return {path: others for path, others in found.items() if others}
