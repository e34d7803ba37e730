"""What the user should know and no layer's row says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spherify.plan.options import Options

if TYPE_CHECKING:
    from spherify.plan.decision import Decision

MOST_NAMED = 3  # of many, in one line


def notes_on(decisions: Sequence[Decision], options: Options) -> tuple[str, ...]:
    """Options that had nothing to act on, and a model without a classifier: said, not passed over."""
    sites = [decision.site for decision in decisions]
    converted = [decision.site for decision in decisions if decision.action == "convert" and decision.head is None]
    notes = []
    if options.skip_shortcuts and not any("@shortcut" in site.roles for site in sites):
        notes.append("skip_shortcuts: this model has no 1x1 shortcut.")
    if not any("@head" in site.roles for site in sites):
        notes.append("No classifier was found: the model ends without one, and every layer counts as body.")
    if not options.linear and not any(site.kind == "linear" for site in sites):
        notes.append("linear=false: this model has no linear layer.")
    if options.bias == "drop" and not any(site.has_bias for site in converted):
        notes.append("bias=drop: no converted layer has a bias.")
    if options.norm == "remove" and not any(site.norm for site in converted):
        notes.append("norm=remove: no converted layer is followed by a BatchNorm.")
    if options.activation == "remove" and not any(site.activation for site in converted):
        notes.append("activation=remove: no converted layer is followed by an activation module.")
    return tuple(notes)


def notes_on_sharing(
    options: Options, norms: Mapping[str, Sequence[str]], activations: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """What the user should know of modules that stand behind several layers; those alike in one line."""
    notes = [
        f"norm=remove: {paths} also {runs} after {others} and {stays}."
        for paths, others, runs, stays in in_lines(norms, ("runs", "stays"), ("run", "stay"))
    ]
    if options.activation == "remove":
        notes += [
            f"activation=remove: {paths} also {runs} elsewhere (after {others}) and {removed} removed there too."
            for paths, others, runs, removed in in_lines(activations, ("runs", "is"), ("run", "are"))
        ]
    return tuple(notes)


def in_lines(
    uses: Mapping[str, Sequence[str]], one: tuple[str, str], many: tuple[str, str]
) -> list[tuple[str, str, str, str]]:
    """Paths that run after the same, together: their names, what they run after, and two verbs."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, others in uses.items():
        groups.setdefault(tuple(others), []).append(path)
    return [
        (in_words(paths), in_words(others), *(one if len(paths) == 1 else many)) for others, paths in groups.items()
    ]


def in_words(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b, c and 4 more``."""
    if len(names) > MOST_NAMED:
        return f"{', '.join(names[:MOST_NAMED])} and {len(names) - MOST_NAMED} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
