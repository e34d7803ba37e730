"""The rules that decide about a site, in the order in which they are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from spherify.graph.site import Site
from spherify.heads.kinds import HeadSettings
from spherify.plan.options import PLAIN_HEADS, Options
from spherify.plan.selectors import matches

Action = Literal["convert", "keep", "unsupported"]


@dataclass(frozen=True)
class Verdict:
    """What happens to a site, by which rule, and the reason in words."""

    action: Action
    rule: str
    reason: str


@dataclass(frozen=True)
class Question:
    """One site, the user's options, whether a class of layers can be converted, and the head it becomes."""

    site: Site
    options: Options
    converts: Callable[[type[nn.Module]], bool]
    head: HeadSettings | None = None


Rule = Callable[[Question], Verdict | None]  # None: no opinion


def make_it_an_angular_head(question: Question) -> Verdict | None:
    # First, since include speaks of the body; that nothing stands in its way was seen before (plan/heads.py).
    if question.head is None:
        return None
    bias = "; its bias is taken off" if question.site.has_bias else ""
    return Verdict("convert", "head", f"the classifier: {question.head}{bias}")


def keep_what_is_excluded(question: Question) -> Verdict | None:
    for selector in question.options.exclude:
        if matches(selector, question.site):
            return Verdict("keep", "exclude", f"excluded by {selector}")
    return None


def keep_what_is_not_included(question: Question) -> Verdict | None:
    include = question.options.include
    if include and not any(matches(selector, question.site) for selector in include):
        return Verdict("keep", "include", "not among those included")
    return None


def keep_the_head(question: Question) -> Verdict | None:
    if "@head" in question.site.roles and question.options.head in PLAIN_HEADS:
        return Verdict("keep", "head", f"the classifier; head={question.options.head}")
    return None


def keep_shortcuts(question: Question) -> Verdict | None:
    if "@shortcut" in question.site.roles and question.options.skip_shortcuts:
        return Verdict("keep", "shortcut", "1x1 projection on the short side of a residual add")
    return None


def keep_linear_layers(question: Question) -> Verdict | None:
    if question.site.kind == "linear" and not question.options.linear:
        return Verdict("keep", "linear", "a linear layer; linear=false")
    return None


def refuse_weights_read_elsewhere(question: Question) -> Verdict | None:
    site = question.site
    if not site.read_by or site.stood_in_by or site.kind == "other":
        return None
    readers = ", ".join(repr(path) if path else "the model itself" for path in site.read_by[:2])
    more = f" and {len(site.read_by) - 2} more" if len(site.read_by) > 2 else ""
    return Verdict("unsupported", "functional", f"its weight is read by {readers}{more}, past its own forward")


def keep_what_never_runs(question: Question) -> Verdict | None:
    site = question.site
    if site.calls_eval == site.calls_train == 0 and not site.stood_in_by:
        return Verdict("keep", "unused", "runs neither in eval nor in train mode")
    return None


def refuse_objects_with_obstacles(question: Question) -> Verdict | None:
    if question.site.obstacle is not None:
        return Verdict("unsupported", "obstacle", question.site.obstacle)
    return None


def refuse_unknown_types(question: Question) -> Verdict | None:
    site = question.site
    if question.converts(site.source_type):
        return None
    if issubclass(site.source_type, nn.modules.conv._ConvTransposeNd):
        return Verdict("unsupported", "type", f"{site.type} has no patch: each input is spread over many outputs")
    if site.kind == "other":
        return Verdict("unsupported", "type", f"{site.type} multiplies by its weight in a forward of its own")
    return Verdict("unsupported", "type", f"{site.type} may compute something else than its parent class")


def keep_single_numbers(question: Question) -> Verdict | None:
    if question.site.fan_in <= 1:
        return Verdict("keep", "fan-in", "fan-in 1: every angle would be 0 or pi")
    return None


def convert_the_body(question: Question) -> Verdict:
    return Verdict("convert", "body", "")


RULES: tuple[Rule, ...] = (  # the first verdict stands
    make_it_an_angular_head,
    keep_what_is_excluded,
    keep_what_is_not_included,
    keep_the_head,
    keep_shortcuts,
    keep_linear_layers,
    refuse_weights_read_elsewhere,
    keep_what_never_runs,
    refuse_objects_with_obstacles,
    refuse_unknown_types,
    keep_single_numbers,
    convert_the_body,
)
