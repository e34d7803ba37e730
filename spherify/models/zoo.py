"""What the sweep over the zoo found, by model: read from ``zoo.csv``, which ``python -m benchmarks.zoo`` writes."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("zoo.csv")


@dataclass(frozen=True)
class ZooRow:
    """Counts of one model's conv and linear layers, as converted with the default options.

    Attributes:
        layers: converted + kept + unsupported.
        shortcuts: dense 1x1 convolutions with the role ``@shortcut``.
    """

    layers: int
    converted: int
    kept: int
    unsupported: int
    shortcuts: int

    def __str__(self) -> str:
        parts = [f"{self.layers} layers", f"{self.converted} converted"]
        parts += [
            f"{count} {word}" for word, count in (("kept", self.kept), ("unsupported", self.unsupported)) if count
        ]
        parts += [f"{self.shortcuts} {'shortcut' if self.shortcuts == 1 else 'shortcuts'}"] if self.shortcuts else []
        return ", ".join(parts)


@cache
def zoo() -> Mapping[str, ZooRow]:
    """Rows by ``library:name``; empty where the file was not shipped."""
    if not TABLE.exists():
        return {}
    lines = TABLE.read_text().splitlines()[1:]  # the first says of which versions
    return {
        row.pop("model"): ZooRow(**{key: int(value) for key, value in row.items()}) for row in csv.DictReader(lines)
    }


@cache
def zoo_versions() -> str:
    """The libraries' versions at the time of the sweep."""
    return TABLE.read_text().splitlines()[0].lstrip("# ") if TABLE.exists() else "no sweep"
