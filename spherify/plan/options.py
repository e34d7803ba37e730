"""What the user asked for, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from spherify.errors import OptionError
from spherify.functional.cosine import DEFAULT_EPS
from spherify.functional.responses import K_SHARED, checked_k
from spherify.heads.kinds import HEAD_KINDS, HeadSettings, settings_for

HEADS = {
    "keep": "the classifier stays as it is",
    "convert": "the classifier is converted like any other layer",
    "softmax": "the plain linear classifier, as it is (the same as keep)",
    **{name: kind.summary for name, kind in HEAD_KINDS.items()},
}
PLAIN_HEADS = ("keep", "softmax")
HEAD_OPTIONS = ("head_operator", "head_k", "margin", "scale")
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
        head: what becomes of the classifier: keep, convert like any other layer, softmax (keep), or an angular head:
            w-softmax, a-softmax, ga-softmax, s-softmax, cosface, arcface, sphereface-r-v1, sphereface-r-v2.
        head_operator: response of an angular head: cosine, linear, sigmoid; None is the head's default (linear for
            ga-softmax, else cosine).
        head_k: softness of its sigmoid in [1e-3, 1e3], with a margin from 0.1; None is 0.3.
        margin: m of its margin; None is the head's default (4 for a-softmax and ga-softmax).
        scale: of the logits of a head that normalises the feature; None is the head's default.
        num_classes: size of the classifier; a model that has another size gets a new one. None leaves it.
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
    head_operator: str | None = None
    head_k: float | None = None
    margin: float | None = None
    scale: float | None = None
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
        self.check_head()

    def check_head(self) -> None:
        """Raises OptionError where the head's options do not go with the head or with each other."""
        if self.has_angular_head:
            self.head_settings(self.num_classes or 2)
            return
        for name in HEAD_OPTIONS:
            if getattr(self, name) is not None:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} goes with an angular head, and head={self.head!r}; "
                    f"choose head from: {', '.join(HEAD_KINDS)}."
                )

    @property
    def has_angular_head(self) -> bool:
        """Whether the classifier becomes a head of the table ``HEAD_KINDS``."""
        return self.head in HEAD_KINDS

    def head_settings(self, num_classes: int) -> HeadSettings:
        """The angular head asked for, on so many classes. Raises OptionError for values that do not go together."""
        return settings_for(
            self.head,
            num_classes,
            operator=self.head_operator,
            k=self.head_k,
            margin=self.margin,
            scale=self.scale,
            eps=self.eps,
        )

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
