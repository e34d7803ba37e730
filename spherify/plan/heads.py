"""What becomes of the classifiers: which layers they are, their settings and size, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from spherify.errors import OptionError
from spherify.graph.after_heads import Change
from spherify.graph.site import Site
from spherify.heads.kinds import HeadSettings
from spherify.plan.options import Options
from spherify.plan.removals import NOWHERE_ELSE, RunsAfter
from spherify.plan.selectors import matches

ChangesAfter = Mapping[str, Sequence[Change]]  # name of a classifier -> what its logits go through (graph/after_heads)
NOTHING: ChangesAfter = {}
MOST_LISTED = 4  # of many classifiers, in one line


@dataclass(frozen=True)
class HeadPlan:
    """What becomes of the classifiers.

    Attributes:
        names: the layers that it speaks of.
        settings: of the angular heads that they become; None leaves them plain.
        new_classes: the size that they get; None leaves it.
        removed_activations: paths of activations behind them, which would cut off their signed logits.
        notes: what the user should know of it.
    """

    names: frozenset[str] = frozenset()
    settings: HeadSettings | None = None
    new_classes: int | None = None
    removed_activations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_heads(
    sites: Sequence[Site],
    options: Options,
    *,
    model: str,
    becomes_head: Callable[[type[nn.Module]], bool],
    changes: ChangesAfter = NOTHING,
    runs_after: RunsAfter = NOWHERE_ELSE,
    resizes: bool = False,
) -> HeadPlan:
    """The plan for the classifiers, or a refusal: what was asked for by name is done or said to be impossible.

    Args:
        becomes_head: whether there is an angular twin for a class of classifiers.
        changes: what the logits of each classifier go through on their way out.
        resizes: ``options.num_classes`` is of a model that is built already.

    Raises:
        OptionError: there is no classifier, or one that cannot be what the options say.
    """
    resizes = resizes and options.num_classes is not None
    if not options.has_angular_head and not resizes:
        return HeadPlan()
    wish = f"head={options.head!r}" if options.has_angular_head else f"num_classes={options.num_classes}"
    heads = [site for site in sites if "@head" in site.roles]
    width = common_width(heads, wish, model)
    new = options.num_classes if resizes and options.num_classes != width else None
    if problems := [text for site in heads for text in obstacles(site, options, becomes_head)]:
        raise OptionError(f"{wish}: {problems[0]}.")
    settings = options.head_settings(new or width) if options.has_angular_head else None
    removed: list[str] = []
    if settings is not None:
        for site in heads:
            removed += activations_to_remove(site, settings, changes.get(site.name, ()), runs_after, wish)
    removed = list(dict.fromkeys(removed))
    notes = [
        f"{wish}: the activation {path} behind the classifier would cut off logits and is removed." for path in removed
    ]
    if new is not None:
        names = " and ".join(site.name or "the model" for site in heads)
        notes.append(f"num_classes={new}: {names} had {width}; the class weights are new, drawn at random.")
    return HeadPlan(frozenset(site.name for site in heads), settings, new, tuple(removed), tuple(notes))


def common_width(heads: Sequence[Site], wish: str, model: str) -> int:
    """The number of classes that all classifiers of a model have."""
    if not heads:
        raise OptionError(f"{wish}: no classifier was found in {model}; give a model that ends in one, or head=keep.")
    widths = {site.name: site.shape[0] for site in heads}
    if len(set(widths.values())) > 1:
        more = f" and {len(widths) - MOST_LISTED} more" if len(widths) > MOST_LISTED else ""
        listed = ", ".join(f"{name} {width}" for name, width in [*widths.items()][:MOST_LISTED]) + more
        raise OptionError(
            f"{wish}: {model} predicts with layers of different widths ({listed}), so it is no classifier alone; "
            "use head=keep."
        )
    return next(iter(widths.values()))


def obstacles(site: Site, options: Options, becomes_head: Callable[[type[nn.Module]], bool]) -> list[str]:
    """In words, why a classifier cannot be what the options say."""
    name = f"the classifier {site.name or '(the model itself)'} ({site.type})"
    found = []
    if site.read_by:
        found.append(f"the weight of {name} is read by {site.read_by[0] or 'the model itself'}, past its own forward")
    if site.obstacle is not None:
        found.append(f"{name}: {site.obstacle}")
    if not becomes_head(site.source_type):
        found.append(f"{name} is no plain linear layer or convolution")
    if site.groups != 1:
        found.append(f"{name} has {site.groups} groups, so its classes see different features")
    if options.has_angular_head:
        found += [
            f"exclude={selector!r} keeps {name}; leave one of them out"
            for selector in options.exclude
            if matches(selector, site)
        ]
    return found


def activations_to_remove(
    site: Site, settings: HeadSettings, changes: Sequence[Change], runs_after: RunsAfter, wish: str
) -> list[str]:
    """Paths of the activation modules behind a classifier; whatever else spoils its logits is refused."""
    name = site.name or "the model"
    removed = []
    for change in changes:
        where = f"{change.function} in {change.module or 'the model itself'}"
        if change.module and change.module == site.activation:
            others = [other for other in runs_after.get(change.module, ()) if other != site.name]
            if others:
                raise OptionError(
                    f"{wish}: the logits of {name} go through the activation {change.module}, which also runs after "
                    f"{others[0]} and cannot be removed; use head=keep."
                )
            removed.append(change.module)
        elif change.is_activation or settings.gives_norm:
            remedy = "end the model with its logits"
            raise OptionError(f"{wish}: the logits of {name} go through {where}; {remedy}, or use head=keep.")
    return removed
