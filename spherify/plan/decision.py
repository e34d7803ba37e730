"""A decision: what happens to one site, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from spherify.graph.site import Site
from spherify.heads.kinds import HeadSettings


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to one site.

    Attributes:
        has_gain: the converted layer learns a gain.
        adds_bias: it is given a bias that it did not have.
        drops_bias: its bias is taken away.
        head: what it computes where it becomes an angular head; None for every other layer.
        new_classes: the size it gets where it is a classifier of another one.
    """

    site: Site
    action: str
    rule: str
    reason: str
    has_gain: bool = False
    adds_bias: bool = False
    drops_bias: bool = False
    head: HeadSettings | None = None
    new_classes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """One entry of ``layers`` in the JSON object."""
        return {
            "name": self.site.name,
            "aliases": list(self.site.aliases),
            "type": self.site.type,
            "shape": list(self.site.shape),
            "fan_in": self.site.fan_in,
            "roles": sorted(self.site.roles),
            "action": self.action,
            "rule": self.rule,
            "reason": self.reason,
        }

    def to_record(self) -> dict[str, Any]:
        """``to_dict`` and every other fact, for ``config.json``."""
        site = self.site
        return {
            **self.to_dict(),
            "kind": site.kind,
            "groups": site.groups,
            "has_bias": site.has_bias,
            "calls": [site.calls_eval, site.calls_train],
            "read_by": list(site.read_by),
            "stood_in_by": list(site.stood_in_by),
            "norm": site.norm,
            "activation": site.activation,
            "obstacle": site.obstacle,
            "has_gain": self.has_gain,
            "adds_bias": self.adds_bias,
            "drops_bias": self.drops_bias,
            "head": None if self.head is None else self.head.to_dict(),
            "new_classes": self.new_classes,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], type_of: Callable[[str], type[nn.Module]]) -> Decision:
        site = Site(
            name=record["name"],
            aliases=tuple(record["aliases"]),
            source_type=type_of(record["name"]),
            kind=record["kind"],
            shape=tuple(record["shape"]),
            fan_in=record["fan_in"],
            groups=record["groups"],
            has_bias=record["has_bias"],
            calls_eval=record["calls"][0],
            calls_train=record["calls"][1],
            read_by=tuple(record["read_by"]),
            stood_in_by=tuple(record["stood_in_by"]),
            norm=record["norm"],
            activation=record["activation"],
            roles=frozenset(record["roles"]),
            obstacle=record["obstacle"],
        )
        head = record.get("head")
        return cls(
            site=site,
            head=None if head is None else HeadSettings.from_dict(head),
            new_classes=record.get("new_classes"),
            **{key: record[key] for key in ("action", "rule", "reason", "has_gain", "adds_bias", "drops_bias")},
        )
