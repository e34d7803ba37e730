"""The plan: for each site what happens to it, as data that prints, goes to JSON, and is applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from spherify.errors import SpherifyError
from spherify.graph.site import Site
from spherify.heads.kinds import HeadSettings
from spherify.plan.decision import Decision
from spherify.plan.heads import HeadPlan
from spherify.plan.notes import notes_on, notes_on_sharing
from spherify.plan.options import Options
from spherify.plan.removals import NOWHERE_ELSE, RunsAfter, activations_in_other_use, norms_in_other_use, removals
from spherify.plan.rules import RULES, Question, Rule, Verdict
from spherify.plan.selectors import check_selectors
from spherify.plan.table import as_text

NO_HEADS = HeadPlan()
SUMMARY_KEYS = {"convert": "converted", "keep": "kept", "unsupported": "unsupported"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will do. Nothing is changed until it is applied.

    Attributes:
        model: what the model is called, ``timm:resnet18`` or the name of its class.
        decisions: one for each site, in the order of the model's modules.
        removed_norms, removed_activations: paths of modules that become the identity.
        notes: what the user should know and no layer's row says.
    """

    model: str
    options: Options
    decisions: tuple[Decision, ...]
    removed_norms: tuple[str, ...] = ()
    removed_activations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    carry_out: Callable[..., nn.Module] | None = field(default=None, repr=False, compare=False)

    @property
    def redirected(self) -> tuple[str, ...]:
        """Paths of modules that multiply by a converted layer's weight and will call the layer instead.

        Without those that are converted themselves: their twins call it anyway.
        """
        converted = {decision.site.name for decision in self.converted}
        owners = dict.fromkeys(path for decision in self.converted for path in decision.site.stood_in_by)
        return tuple(path for path in owners if path not in converted)

    @property
    def converted(self) -> tuple[Decision, ...]:
        """The layers of the body that become angular layers; a head of its own kind is among ``heads``."""
        return tuple(d for d in self.decisions if d.action == "convert" and d.head is None)

    @property
    def heads(self) -> tuple[Decision, ...]:
        """The classifiers that become angular heads."""
        return tuple(decision for decision in self.decisions if decision.head is not None)

    def summary(self) -> dict[str, int]:
        """How many sites are converted, kept, unsupported."""
        counts = Counter(decision.action for decision in self.decisions)
        return {key: counts[action] for action, key in SUMMARY_KEYS.items()}

    def to_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "model": self.model,
            "options": self.options.to_dict(),
            "summary": self.summary(),
            "layers": [decision.to_dict() for decision in self.decisions],
        }

    def to_record(self) -> dict[str, Any]:
        """Everything but the hand that carries it out, for ``config.json``."""
        return {
            "model": self.model,
            "options": self.options.to_dict(),
            "layers": [decision.to_record() for decision in self.decisions],
            "removed_norms": list(self.removed_norms),
            "removed_activations": list(self.removed_activations),
            "notes": list(self.notes),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], type_of: Callable[[str], type[nn.Module]]) -> Plan:
        """The plan a folder holds.

        Args:
            type_of: the class of a layer, by its name, in the plain model.

        Raises:
            OptionError: an option this version does not know.
        """
        return cls(
            model=record["model"],
            options=Options.from_dict(record["options"]),
            decisions=tuple(Decision.from_record(layer, type_of) for layer in record["layers"]),
            removed_norms=tuple(record["removed_norms"]),
            removed_activations=tuple(record["removed_activations"]),
            notes=tuple(record["notes"]),
        )

    def apply(self, model: nn.Module | None = None, *, inplace: bool = False) -> nn.Module:
        """Carry the plan out on ``model`` (default: the one it was made for) and verify it.

        Returns:
            The converted copy, or the model itself with ``inplace``.

        Raises:
            SpherifyError: the plan was not made by ``spherify.plan``; and what ``spherify`` raises.
        """
        if self.carry_out is None:
            raise SpherifyError("this plan is bound to no model; make it with spherify.plan(model, ...).")
        return self.carry_out(model, inplace=inplace)

    def __str__(self) -> str:
        return as_text(self)


def draft(
    sites: Sequence[Site],
    options: Options,
    *,
    model: str,
    converts: Callable[[type[nn.Module]], bool],
    rules: Sequence[Rule] = RULES,
    runs_after: RunsAfter = NOWHERE_ELSE,
    heads: HeadPlan = NO_HEADS,
) -> Plan:
    """Ask the rules about every site.

    Args:
        converts: whether there is an angular twin for a class of layers.
        rules: asked in order; the first verdict stands.
        runs_after: for each norm and activation, all that it runs after (graph/uses.py).
        heads: what becomes of the classifiers (plan/heads.py).

    Raises:
        OptionError: a selector matches no site.
    """
    check_selectors((*options.include, *options.exclude), sites)

    def decided(kept_norms: Container[str | None]) -> tuple[Decision, ...]:
        norm_kept = replace(options, norm="keep")
        chosen = [norm_kept if site.norm in kept_norms else options for site in sites]
        questions = [
            Question(site, choice, converts, heads.settings if site.name in heads.names else None)
            for site, choice in zip(sites, chosen, strict=True)
        ]
        decisions = with_their_owners([decide(question, rules) for question in questions])
        return tuple(resized(d, heads.new_classes) if d.site.name in heads.names else d for d in decisions)

    shared_norms = norms_in_other_use(decided(()), options, runs_after)
    decisions = decided(shared_norms)
    norms, activations = removals(decisions, options, shared_norms)
    on_sharing = notes_on_sharing(options, shared_norms, activations_in_other_use(decisions, runs_after))
    return Plan(
        model=model,
        options=options,
        decisions=decisions,
        removed_norms=norms,
        removed_activations=tuple(dict.fromkeys((*activations, *heads.removed_activations))),
        notes=(*notes_on(decisions, options), *on_sharing, *heads.notes),
    )


def decide(question: Question, rules: Sequence[Rule]) -> Decision:
    verdict = next(verdict for rule in rules if (verdict := rule(question)) is not None)
    if verdict.action != "convert":
        return Decision(site=question.site, action=verdict.action, rule=verdict.rule, reason=verdict.reason)
    if question.head is not None:
        return angular_head(question.site, question.head, verdict)
    return conversion(question.site, question.options, verdict)


def angular_head(site: Site, head: HeadSettings, verdict: Verdict) -> Decision:
    return Decision(
        site=site,
        action=verdict.action,
        rule=verdict.rule,
        reason=verdict.reason,
        drops_bias=site.has_bias,
        head=head,
    )


def resized(decision: Decision, classes: int | None) -> Decision:
    if classes is None:
        return decision
    words = [*([decision.reason] if decision.reason else []), f"new, {classes} classes"]
    return replace(decision, new_classes=classes, reason="; ".join(words))


def with_their_owners(decisions: Sequence[Decision]) -> tuple[Decision, ...]:
    """An output projection can be converted only together with the attention that uses its weight."""
    left = {d.site.name: d for d in decisions if d.action != "convert"}

    def judged(decision: Decision) -> Decision:
        owners = [path for path in decision.site.stood_in_by if path in left]
        if decision.action != "convert" or not owners:
            return decision
        reason = f"its weight is used by {owners[0]}, which is not converted"
        return Decision(site=decision.site, action="unsupported", rule="functional", reason=reason)

    return tuple(judged(decision) for decision in decisions)


def conversion(site: Site, options: Options, verdict: Verdict) -> Decision:
    """A verdict to convert, completed by what becomes of gain, bias, norm and activation."""
    norm = site.norm if options.norm == "keep" else None
    has_gain = options.gain == "learned" or (options.gain == "auto" and norm is None)
    drops_bias = options.bias == "drop" and site.has_bias
    words = [verdict.reason] if verdict.reason else []
    if site.stood_in_by:
        owners = " and ".join(path or "the model" for path in site.stood_in_by)
        words.append(f"called by {owners} instead of using its weight")
    if norm is not None:
        words.append(f"BatchNorm {norm} follows")
    elif site.norm is not None:
        words.append(f"BatchNorm {site.norm} removed")
    else:
        words.append("no BatchNorm follows")
    can_add = site.kind != "other" and not site.stood_in_by
    adds_bias = has_gain and can_add and not site.has_bias and options.bias == "keep"
    if has_gain:
        words.append("gain and bias learned" if adds_bias or (site.has_bias and not drops_bias) else "gain learned")
    if drops_bias:
        words.append("bias dropped")
    if options.activation == "remove" and site.activation is not None:
        words.append(f"activation {site.activation} removed")
    return Decision(
        site=site,
        action=verdict.action,
        rule=verdict.rule,
        reason="; ".join(words),
        has_gain=has_gain,
        drops_bias=drops_bias,
        adds_bias=adds_bias,
    )
