"""What the user asked for, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from spherify.errors import OptionError
from spherify.functional.cosine import DEFAULT_EPS
from spherify.functional.responses import K_SHARED, checked_k

HEADS = {
    "keep": "the classifier stays as it is",
    "convert": "the classifier is converted like any other layer",
}
CHOICES: dict[str, tuple[str, ...]] = {
    "k_shared": K_SHARED,
    "head": tuple(HEADS),
    "norm": ("keep", "remove"),
    "activation": ("keep", "remove"),
    "gain": ("auto", "none", "learned"),
    "bias": ("keep", "drop"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a conversion, the same in Python, on the command line and on disk.

    Attributes:
        operator: cosine, linear, sigmoid, learnable.
        k: softness of sigmoid and learnable in [1e-3, 1e3]; None is the operator's default.
        k_shared: filter, layer, network: what shares one learned k.
        eps: added to squared norms, inside the root.
        skip_shortcuts: keep the 1x1 projections of residual blocks.
        include: selectors; given, nothing else is converted.
        exclude: selectors of layers to keep.
        linear: convert linear layers too.
        head: what becomes of the classifier: keep, or convert like any other layer.
        num_classes: size of the classifier of a model built by name; None is the library's own.
        norm: keep, or remove the BatchNorm behind each converted layer (SphereNorm in its place).
        activation: keep, or remove the activation behind each converted layer.
        gain: auto adds a learned gain and bias where no BatchNorm follows; none; learned adds them everywhere.
        bias: keep, or drop the biases of converted layers.

    Raises:
        OptionError: all that is wrong, in one line.
    """

    operator: str = "cosine"
    k: float | None = None
    k_shared: str = "filter"
    eps: float = DEFAULT_EPS
    skip_shortcuts: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    linear: bool = True
    head: str = "keep"
    num_classes: int | None = None
    norm: str = "keep"
    activation: str = "keep"
    gain: str = "auto"
    bias: str = "keep"

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_selectors(name, getattr(self, name)))
        object.__setattr__(self, "k", checked_k(self.operator, self.k))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} {getattr(self, name)!r} is unknown; choose one of: {', '.join(allowed)}.")
        if self.num_classes is not None and self.num_classes < 1:
            raise OptionError(f"num_classes={self.num_classes!r} is no number of classes; give 1 or more.")
        if not (isinstance(self.eps, (int, float)) and 0 < self.eps < math.inf):
            raise OptionError(f"eps={self.eps!r} is no positive number; without it a patch of zeros has no cosine.")

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Options:
        """Raises OptionError for a key this version does not know."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise OptionError(f"option {unknown[0]!r} is unknown; choose one of: {', '.join(sorted(known))}.")
        return cls(**values)


def as_selectors(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    selectors = (given,) if isinstance(given, str) else tuple(given)
    for selector in selectors:
        if not isinstance(selector, str) or not selector:
            raise OptionError(
                f"{name} {selector!r} is not a selector; give a name, a glob, @role, type:Class or re:..."
            )
    return selectors
