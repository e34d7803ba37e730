"""How much of the network's error each converted layer causes by itself: as data and as a table."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One converted layer, converted alone.

    Attributes:
        name: its path.
        error: ``|outputs - donor's| / |donor's|`` of the network's outputs; nan where they are not finite or all 0.
        cosine: between these outputs and the donor's, as one vector.
    """

    name: str
    error: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Effects:
    """All converted layers, each converted alone. Prints as a table, the largest error first.

    Attributes:
        layers: in the order of the model's modules.
        images: how many were seen.
        seconds: how long it took.
    """

    layers: tuple[Effect, ...]
    images: int
    seconds: float

    def worst(self, count: int) -> tuple[str, ...]:
        """The names of the layers with the largest errors, largest first; what is not finite is worst."""
        return tuple(layer.name for layer in self.ranked()[:count])

    def ranked(self) -> list[Effect]:
        return sorted(self.layers, key=lambda layer: layer.error if math.isfinite(layer.error) else math.inf)[::-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON; None where there is no number."""
        rows = [
            {
                "name": layer.name,
                "error": layer.error if math.isfinite(layer.error) else None,
                "cosine": layer.cosine if math.isfinite(layer.cosine) else None,
            }
            for layer in self.layers
        ]
        return {"layers": rows, "images": self.images, "seconds": self.seconds}

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100).print(self.table())
        return text.getvalue().rstrip()

    def table(self) -> Any:
        """As rich prints it."""
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for heading in ("converted alone", "error of outputs", "cosine"):
            table.add_column(heading, justify="left" if heading == "converted alone" else "right")
        for layer in self.ranked():
            table.add_row(layer.name, f"{layer.error:.3f}", f"{layer.cosine:.4f}")
        return Group(table, f"sensitivity: {self.images} images, {self.seconds:.1f} s")
