"""The table of heads, and the settings of one: kind, operator, margin, scale, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spherify.errors import OptionError
from spherify.functional.cosine import DEFAULT_EPS
from spherify.functional.margins import ANGULAR_RESPONSES, K_MIN_WITH_MARGIN, MARGINS
from spherify.functional.responses import checked_k

LOSS_FLOOR = 0.01  # of the default scale: what the loss of s-softmax cannot fall below


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """One kind of head.

    Attributes:
        margin: its entry in ``MARGINS``.
        operators: the responses it may have, the default first.
        default_margin: m where the user gives none.
        is_scaled: the feature is normalised and the logits are ``scale * g(theta)``; else ``|x| g(theta)``.
        default_scale: None is the scale whose loss floor is below 0.01.
        source: where it comes from.
    """

    name: str
    summary: str
    margin: str = "none"
    operators: tuple[str, ...] = tuple(ANGULAR_RESPONSES)
    default_margin: float = 1.0
    is_scaled: bool = False
    default_scale: float | None = None
    source: str


DEEP_HYPERSPHERICAL = "Liu et al. 2017, Deep Hyperspherical Learning"

HEAD_KINDS: dict[str, HeadKind] = {
    entry.name: entry
    for entry in (
        HeadKind(
            name="w-softmax",
            summary="|x| g(theta): normalised class weights, no bias, no margin",
            source=f"{DEEP_HYPERSPHERICAL}, eq. 10",
        ),
        HeadKind(
            name="a-softmax",
            summary="|x| cos(theta), trained with the margin cos(m theta) (m = 4)",
            margin="multiplied",
            operators=("cosine",),
            default_margin=4.0,
            source="Liu et al. 2017, SphereFace, eq. 7",
        ),
        HeadKind(
            name="ga-softmax",
            summary="|x| g(theta), trained with the margin g(m theta) (m = 4)",
            margin="multiplied",
            operators=("linear", "cosine", "sigmoid"),  # linear first: the paper's GA-Softmax; cosine is A-Softmax
            default_margin=4.0,
            source=f"{DEEP_HYPERSPHERICAL}, eq. 11",
        ),
        HeadKind(
            name="s-softmax",
            summary="scale g(theta): the feature normalised too; scale by the number of classes",
            is_scaled=True,
            source=f"{DEEP_HYPERSPHERICAL}, section 2.4",
        ),
        HeadKind(
            name="cosface",
            summary="scale cos(theta), trained with cos(theta) - m (m = 0.35, scale 64)",
            margin="response-reduced",
            operators=("cosine",),
            default_margin=0.35,
            is_scaled=True,
            default_scale=64.0,
            source="Wang et al. 2018, CosFace, eq. 4",
        ),
        HeadKind(
            name="arcface",
            summary="scale cos(theta), trained with cos(theta + m) (m = 0.5, scale 64)",
            margin="angle-added",
            operators=("cosine",),
            default_margin=0.5,
            is_scaled=True,
            default_scale=64.0,
            source="Deng et al. 2019, ArcFace, eq. 3",
        ),
        HeadKind(
            name="sphereface-r-v1",
            summary="scale cos(theta), trained with cos(min(m theta, pi)) (m = 1.5, scale 30)",
            margin="multiplied-to-pi",
            operators=("cosine",),
            default_margin=1.5,
            is_scaled=True,
            default_scale=30.0,
            source="Liu et al. 2022, SphereFace Revived",
        ),
        HeadKind(
            name="sphereface-r-v2",
            summary="scale cos(theta), trained with cos(theta / m) for the wrong classes (m = 1.5, scale 30)",
            margin="others-divided",
            operators=("cosine",),
            default_margin=1.5,
            is_scaled=True,
            default_scale=30.0,
            source="Liu et al. 2022, SphereFace Revived",
        ),
    )
}


def scale_for(num_classes: int, floor: float = LOSS_FLOOR) -> float:
    """The smallest whole scale at which the cross-entropy over ``scale * cos(theta)`` can fall to ``floor``.

    With C classes as far apart as they can be (a simplex) and every feature on its class's weight, the loss is
    ``ln(1 + (C - 1) exp(-s C / (C - 1)))``.
    """
    others = max(num_classes - 1, 1)
    return float(math.ceil(others / (others + 1) * math.log(others / math.expm1(floor))))


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What one angular head computes, every number resolved.

    Attributes:
        kind: an entry of ``HEAD_KINDS``.
        operator: cosine, linear, sigmoid.
        k: softness of the sigmoid, else None.
        margin: m.
        scale: of the normalised logits; None where the logits have the length of the feature.
        eps: added to squared norms, inside the root.

    Raises:
        OptionError: what is wrong, in one line.
    """

    kind: str
    operator: str = "cosine"
    k: float | None = None
    margin: float = 1.0
    scale: float | None = None
    eps: float = DEFAULT_EPS

    def __post_init__(self) -> None:
        if self.kind not in HEAD_KINDS:
            raise OptionError(f"head {self.kind!r} is unknown; choose one of: {', '.join(HEAD_KINDS)}.")
        kind = HEAD_KINDS[self.kind]
        if self.operator not in kind.operators:
            raise OptionError(
                f"head_operator {self.operator!r} does not go with head {self.kind!r}; "
                f"choose one of: {', '.join(kind.operators)}."
            )
        object.__setattr__(self, "k", checked_k(self.operator, self.k))
        self.check_margin(kind)
        if (self.scale is not None) != kind.is_scaled:
            raise OptionError(f"head {self.kind!r} has {'a' if kind.is_scaled else 'no'} scale.")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise OptionError(f"scale={self.scale!r} is no positive number.")
        if not 0 < self.eps < math.inf:
            raise OptionError(f"eps={self.eps!r} is no positive number; without it a feature of zeros has no angle.")

    def check_margin(self, kind: HeadKind) -> None:
        """Raises OptionError for a margin out of range, or one that leaves no angle to read back."""
        entry = MARGINS[kind.margin]
        if not entry.low <= self.margin <= entry.high:
            if kind.margin == "none":
                raise OptionError(f"head {self.kind!r} has no margin; leave margin out, or choose ga-softmax.")
            raise OptionError(
                f"margin={self.margin!r} is out of range for head {self.kind!r}; "
                f"choose a number in [{entry.low:g}, {entry.high:.4g}]."
            )
        if self.has_margin and self.operator == "sigmoid" and self.k is not None and self.k < K_MIN_WITH_MARGIN:
            raise OptionError(
                f"head_k={self.k:g} is too steep for a margin: no angle can be read back from the response; "
                f"choose {K_MIN_WITH_MARGIN:g} or more."
            )

    @property
    def has_margin(self) -> bool:
        """Whether training differs from the margin-free cross-entropy."""
        return self.margin != MARGINS[HEAD_KINDS[self.kind].margin].neutral

    @property
    def gives_norm(self) -> bool:
        """Whether the head's output has one more channel in train mode, from which the loss reads ``|x|``."""
        return self.has_margin and self.scale is None

    def __str__(self) -> str:
        parts = [self.kind, f"operator={self.operator}"]
        parts += [f"k={self.k:g}"] if self.k is not None else []
        parts += [f"margin={self.margin:g}"] if self.has_margin else []
        parts += [f"scale={self.scale:g}"] if self.scale is not None else []
        parts += [f"eps={self.eps:g}"] if self.eps != DEFAULT_EPS else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadSettings:
        return cls(**values)


def settings_for(
    kind: str,
    num_classes: int,
    *,
    operator: str | None = None,
    k: float | None = None,
    margin: float | None = None,
    scale: float | None = None,
    eps: float = DEFAULT_EPS,
) -> HeadSettings:
    """Settings with every None replaced by the kind's default.

    Args:
        num_classes: decides on the default scale of ``s-softmax``.

    Raises:
        OptionError: unknown kind, or a value that does not go with it.
    """
    if kind not in HEAD_KINDS:
        raise OptionError(f"head {kind!r} is unknown; choose one of: {', '.join(HEAD_KINDS)}.")
    entry = HEAD_KINDS[kind]
    if entry.is_scaled and scale is None:
        scale = entry.default_scale or scale_for(num_classes)
    return HeadSettings(
        kind=kind,
        operator=entry.operators[0] if operator is None else operator,
        k=k,
        margin=entry.default_margin if margin is None else float(margin),
        scale=None if scale is None else float(scale),
        eps=eps,
    )
