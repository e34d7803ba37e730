"""What a calibration did: per layer, how near its outputs are to the donor's, as a table, as data, as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spherify.calibrate.effects import Effects
from spherify.calibrate.outputs import products_of
from spherify.calibrate.pair import Pair, Runs, angular_call
from spherify.calibrate.parts import parts_of
from spherify.errors import SpherifyError

IMAGES_COMPARED = 128
PRODUCTS_COMPARED = 1.5e11  # multiplications of one network; of larger ones, fewer images are compared
SUMMED_AT_ONCE = 65_536  # squares in float32, before they are added in float64


@dataclass(frozen=True, kw_only=True)
class LayerFit:
    """One converted layer.

    Attributes:
        name: its path.
        error_before, error: ``|student - donor| / |donor|`` of its outputs, behind a BatchNorm that follows.
        cosine_before, cosine: between the student's and the donor's outputs, all positions as one vector.
    """

    name: str
    error_before: float
    cosine_before: float
    error: float
    cosine: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a calibration did. Prints as a table.

    Attributes:
        method: statistics, transplant, reconstruct.
        images: how many it saw.
        seconds: how long it took.
        layers: converted layers in graph order; empty without a donor.
        logits: the same figures for the network's output, else None.
        notes: what the user should know.
        accuracy: top-1 in percent, by stage (donor, swapped, calibrated), where labels were given.
        sensitivity: what each converted layer costs alone, where it was asked for; before any was taken back.
        kept: layers that were taken back to plain ones because they cost most.
    """

    method: str
    images: int
    seconds: float
    layers: tuple[LayerFit, ...] = ()
    logits: LayerFit | None = None
    notes: tuple[str, ...] = ()
    accuracy: dict[str, float] | None = None
    sensitivity: Effects | None = None
    kept: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON; None where there is no number."""
        rows = [without_nan(asdict(layer)) for layer in self.layers]
        logits = None if self.logits is None else without_nan(asdict(self.logits))
        effects = None if self.sensitivity is None else self.sensitivity.to_dict()
        lists = {"notes": list(self.notes), "kept": list(self.kept), "layers": rows}
        return {**asdict(self), **lists, "logits": logits, "sensitivity": effects}

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
        for heading in ("layer", "error before", "after", "cosine before", "after"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        rows = [*self.layers, *([self.logits] if self.logits else [])]
        for row in rows:
            errors = (shown(value, 3) for value in (row.error_before, row.error))
            table.add_row(row.name, *errors, *(shown(value, 4) for value in (row.cosine_before, row.cosine)))
        lines = [f"{self.method}: {self.images} images, {self.seconds:.1f} s", *self.notes]
        if any(math.isnan(row.error) for row in rows):
            lines.insert(0, "-: there the donor answers 0 alone, as behind a norm whose weights are 0.")
        if self.accuracy:
            lines.append("top-1: " + ", ".join(f"{stage} {value:.2f} %" for stage, value in self.accuracy.items()))
        effects = [] if self.sensitivity is None else [self.sensitivity.table()]
        return Group(*([table] if self.layers else []), *lines, *effects)

    def save_picture(self, path: str | Path) -> Path:
        """Write a bar chart of the errors, before and after, to a PNG, SVG or PDF file.

        Raises:
            SpherifyError: matplotlib is not installed, or there is nothing to draw.
        """
        if not self.layers:
            raise SpherifyError("there are no layers to draw: the calibration had no donor to compare with.")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise SpherifyError("a picture needs matplotlib; install spherify[plot].") from None
        figure = Figure(figsize=(8, 1.2 + 0.18 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        places = range(len(self.layers))
        names = [layer.name for layer in self.layers]
        axes.barh([place + 0.2 for place in places], [layer.error_before for layer in self.layers], 0.4, label="before")
        axes.barh([place - 0.2 for place in places], [layer.error for layer in self.layers], 0.4, label="after")
        axes.set_yticks(list(places), names, fontsize=6)
        axes.invert_yaxis()
        axes.set_xlim(
            0, min(2.0, max([0.1, *(layer.error_before for layer in self.layers if layer.error_before >= 0)]) * 1.05)
        )
        axes.set_xlabel("relative error of the output against the donor")
        axes.set_title(f"{self.method}, {self.images} images")
        axes.legend()
        figure.savefig(str(path))
        return Path(path)


def compared(
    model: nn.Module, donor: nn.Module, parts: Sequence[Tensor], runs: Runs | None = None
) -> dict[str, tuple[float, float]]:
    """Relative error and cosine of each converted layer's outputs, the network's under "", over the first images.

    Batch by batch, so that memory does not grow with the images.
    """
    runs, images = runs or Runs(model, donor), 0
    sums: dict[str, Tensor] = {}
    for part in parts:
        with Pair(model, donor, [part], half=False, runs=runs) as pair:
            add_products(sums, pair)
        images += len(part)
        if images >= min(IMAGES_COMPARED, PRODUCTS_COMPARED / products_of(pair.student.recorded)):
            break
    return {name: (relative_error(total), cosine(total)) for name, total in sums.items()}


@torch.no_grad()
def add_products(sums: dict[str, Tensor], pair: Pair) -> None:
    """Add <s, s>, <s, d> and <d, d> of the student's and the donor's values, layer by layer."""
    student, donor = pair.student, pair.donor
    places: dict[str, list[int]] = {}
    for part in parts_of(student.recorded, kept=False):
        for call in part.calls:
            student.overrides[call] = angular_call(part, student.recorded.nodes[call].target)
        places.setdefault(part.name, []).extend(part.answers)
    places[""] = student.recorded.outputs
    student.want([len(student.recorded.nodes) - 1])
    donor.want([len(donor.recorded.nodes) - 1])
    values: list[Tensor] = []
    for name, positions in places.items():
        total = sums.setdefault(name, torch.zeros(3, dtype=torch.float64))
        for position in positions:
            student.advance([position], lambda number, found: values.extend(found))
            donor.advance([pair.twin[position]], lambda number, found: values.extend(found))
            total += products(values.pop(0), values.pop())


def products(own: Tensor, theirs: Tensor) -> Tensor:
    """<s, s>, <s, d> and <d, d>, by way of <s - d, s - d>, which may be much smaller."""
    own, theirs = own.float().flatten(), theirs.float().flatten()
    mine, donors, apart = (
        torch.stack([part.dot(part) for part in value.split(SUMMED_AT_ONCE)]).double().sum().cpu()
        for value in (own, theirs, own - theirs)
    )
    return torch.stack([mine, (mine + donors - apart) / 2, donors])


def shown(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def relative_error(total: Tensor) -> float:
    """nan where the donor answers 0 alone, as behind a norm whose weights are 0."""
    own, mixed, theirs = total.tolist()
    return math.sqrt(max(own - 2 * mixed + theirs, 0.0) / theirs) if theirs > 1e-30 else math.nan


def cosine(total: Tensor) -> float:
    own, mixed, theirs = total.tolist()
    return mixed / math.sqrt(own * theirs) if own * theirs > 1e-60 else math.nan


def layer_fits(
    before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]
) -> tuple[tuple[LayerFit, ...], LayerFit]:
    rows = [
        LayerFit(
            name=name or "(output)",
            error_before=before[name][0],
            cosine_before=before[name][1],
            error=error,
            cosine=near,
        )
        for name, (error, near) in after.items()
    ]
    return tuple(rows[:-1]), rows[-1]
