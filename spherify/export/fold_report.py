"""What ``fold`` did to a model, and what it left, in words and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.graph.folding import FOLD, FoldPlan
from spherify.layers.angular import AngularLayer
from spherify.layers.folded import Folded

SHOWN = 5  # names in a line of words; the data has all


@dataclass(frozen=True)
class FoldReport:
    """What stands in a folded model.

    Attributes:
        layers: angular layers in their folded form.
        norms: BatchNorms folded into an angular layer.
        norms_of_plain_layers: BatchNorms folded into a layer that stayed plain.
        activations: activations that their layer computes now.
        shared: groups of layers that read one tensor and compute its patch norms once.
        left_unfolded: path and class of the angular layers that have no folded form; they run as they are.
        norms_left: paths of the BatchNorms that stand as they were: not alone behind one layer.
    """

    layers: int
    norms: int
    norms_of_plain_layers: int
    activations: int
    shared: tuple[tuple[str, ...], ...]
    left_unfolded: tuple[tuple[str, str], ...]
    norms_left: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "norms": self.norms,
            "norms_of_plain_layers": self.norms_of_plain_layers,
            "activations": self.activations,
            "shared": [list(group) for group in self.shared],
            "left_unfolded": [{"name": path, "type": kind} for path, kind in self.left_unfolded],
            "norms_left": list(self.norms_left),
        }

    def __str__(self) -> str:
        sharing = sum(map(len, self.shared))
        lines = [
            f"Folded: {counted(self.layers, 'layer')}, {counted(self.norms, 'BatchNorm')} into them and "
            f"{self.norms_of_plain_layers} into plain layers, {counted(self.activations, 'activation')}."
        ]
        if self.shared:
            lines.append(f"{sharing} layers share the patch norms of {counted(len(self.shared), 'tensor')}.")
        if self.left_unfolded:
            names = in_short([f"{path} ({kind})" for path, kind in self.left_unfolded])
            lines.append(f"Left unfolded, since their class has no folded form: {names}.")
        if self.norms_left:
            lines.append(f"BatchNorms left, not alone behind one layer: {in_short(list(self.norms_left))}.")
        return "\n".join(lines)


def fold_report(model: nn.Module) -> FoldReport:
    """What was folded in a model that ``fold`` returned or ``load`` read, and what was not."""
    plan: FoldPlan = model.__dict__.get(FOLD, FoldPlan())
    modules = dict(model.named_modules())
    folded = {path for path, part in modules.items() if isinstance(part, Folded)}
    into_angular = sum(path in folded for path in plan.norms)
    groups = (tuple(path for path in group if path in folded) for group in plan.shared)
    return FoldReport(
        layers=len(folded),
        norms=into_angular,
        norms_of_plain_layers=len(plan.norms) - into_angular,
        activations=len(plan.activations),
        shared=tuple(group for group in groups if len(group) > 1),
        left_unfolded=tuple(
            (path, type(part).__name__)
            for path, part in modules.items()
            if isinstance(part, AngularLayer) and path not in folded and part.operator != "identity"
        ),
        norms_left=tuple(path for path, part in modules.items() if isinstance(part, _BatchNorm)),
    )


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def in_short(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
