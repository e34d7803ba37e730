"""Pictures and tables of a run: curves, learned k, angles between filters, confusions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherify.errors import SpherifyError
from spherify.layers.angular import AngularLayer
from spherify.train.conduct import Fitted
from spherify.train.evaluate import Evaluation
from spherify.train.history import Row

MOST_FILTERS = 1024  # of a layer that angles are taken between: all pairs are looked at
ANGLE_COLUMNS = ("layer", "filters", "fan_in", "mean_degrees", "smallest_degrees", "mean_length", "k_min", "k_max")
BLUE, ORANGE, GREY = "#1f6fb4", "#d95f02", "#8a8a8a"


def draw_all(fitted: Fitted, folder: Path) -> list[str]:
    """Everything there is to see of a finished run; a line on what is missing, and why."""
    write_angles(fitted.model, folder / "angles.csv")
    try:
        import_pyplot()
    except SpherifyError as error:
        return [f"No pictures: {error}"]
    draw_curves(fitted.rows, folder / "curves.png")
    draw_k(fitted.model, folder / "k.png")
    draw_angles(fitted.model, folder / "angles.png")
    if fitted.evaluation is not None:
        draw_confusion(fitted.evaluation, folder / "confusion.png")
    return []


def import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SpherifyError("matplotlib is not installed; install it with: pip install 'spherify[plot]'.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Loss, accuracy and learning rate over the steps."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    panels: tuple[tuple[str, dict[str, str]], ...] = (
        ("loss", {"train_loss": BLUE, "test_loss": ORANGE}),
        ("accuracy, %", {"train_top1": BLUE, "test_top1": ORANGE, "average_top1": GREY}),
        ("learning rate", {"lr": BLUE}),
    )
    for axis, (title, columns) in zip(axes, panels, strict=True):
        for name, colour in columns.items():
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                mark = "o" if len(points) < 40 else None
                axis.plot(*zip(*points, strict=True), color=colour, label=name.replace("_", " "), marker=mark, ms=3)
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
        if axis.has_data() and len(columns) > 1:
            axis.legend(frameon=False)
    finish(pyplot, figure, path)


def angular_layers(model: nn.Module) -> dict[str, AngularLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AngularLayer)}


def draw_k(model: nn.Module, path: Path) -> None:
    """A histogram of the learned k of each layer, one above the other; nothing where no k is learned."""
    values = {name: k_of(layer) for name, layer in angular_layers(model).items() if layer.k_logit is not None}
    if not values:
        return
    pyplot = import_pyplot()
    chosen = spread(values, 24)
    figure, axes = pyplot.subplots(
        len(chosen), 1, figsize=(7, 0.55 * len(chosen) + 1.2), sharex=True, squeeze=False, layout="constrained"
    )
    together = np.concatenate(list(chosen.values()))
    low, high = float(together.min()), float(together.max())
    margin = max(0.05 * (high - low), 0.01)
    bins = np.linspace(low - margin, high + margin, 60)
    for axis, (name, k) in zip(axes[:, 0], chosen.items(), strict=True):
        axis.hist(k, bins=bins, color=BLUE)
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axes[0, 0].set_title(f"learned k, of {len(values)} layers{'' if len(chosen) == len(values) else ' a selection'}")
    axes[-1, 0].set_xlabel("k")
    finish(pyplot, figure, path)


def k_of(layer: AngularLayer) -> np.ndarray:
    k = layer.k
    assert isinstance(k, Tensor)
    return k.detach().float().cpu().numpy()


def spread(values: dict[str, Any], count: int) -> dict[str, Any]:
    """At most ``count`` entries, evenly from first to last."""
    names = list(values)
    chosen = sorted({round(place) for place in np.linspace(0, len(names) - 1, min(count, len(names)))})
    return {names[place]: values[names[place]] for place in chosen}


@torch.no_grad()
def angles_between(filters: Tensor) -> Tensor:
    """(pairs,) degrees between the filters of one layer, each pair once; of many filters, between the first ones."""
    unit = F.normalize(filters[:MOST_FILTERS].flatten(1).float(), dim=1)
    row, column = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit @ unit.T)[row, column].clamp(-1, 1).acos().rad2deg().cpu()


@torch.no_grad()
def write_angles(model: nn.Module, path: Path) -> None:
    """A table of the converted layers: angles between their filters, lengths, range of k."""
    rows: list[tuple[Any, ...]] = []
    for name, layer in angular_layers(model).items():
        filters = layer.filters().flatten(1)
        angles = angles_between(filters)
        mean, smallest = (f"{angles.mean():.3f}", f"{angles.min():.3f}") if len(angles) else ("", "")
        k = layer.k if layer.k is not None else ""
        ends = (f"{k.min():.4g}", f"{k.max():.4g}") if isinstance(k, Tensor) else (k, k)
        length = f"{filters.float().norm(dim=1).mean():.4g}"
        rows.append((name, len(filters), filters.shape[1], mean, smallest, length, *ends))
    if rows:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([ANGLE_COLUMNS, *rows])


def draw_angles(model: nn.Module, path: Path) -> None:
    """For each converted layer, how the angles between its filters are spread."""
    angles = {name: angles_between(layer.filters()) for name, layer in angular_layers(model).items()}
    angles = {name: value for name, value in angles.items() if len(value)}
    if not angles:
        return
    pyplot = import_pyplot()
    chosen = spread(angles, 40)
    figure, axis = pyplot.subplots(figsize=(7, 0.22 * len(chosen) + 1.4), layout="constrained")
    shares = np.array([0.0, 0.05, 0.5, 0.95, 1.0])
    for place, value in enumerate(chosen.values()):
        ends = np.quantile(value.numpy(), shares)
        axis.plot([ends[0], ends[4]], [place, place], color=GREY, lw=1)
        axis.plot([ends[1], ends[3]], [place, place], color=BLUE, lw=5, solid_capstyle="butt")
        axis.plot(ends[2], place, "o", color=ORANGE, ms=4)
    axis.axvline(90, color="black", lw=0.6)
    axis.set_yticks(range(len(chosen)), list(chosen), fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="degrees", title="angles between filters: all, 5 to 95 %, median")
    axis.grid(axis="x", alpha=0.3)
    finish(pyplot, figure, path)


def draw_confusion(evaluation: Evaluation, path: Path) -> None:
    """Answers by true class, in percent of the class."""
    pyplot = import_pyplot()
    counts = evaluation.confusion
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    many = len(counts) > 30
    side = 9 if many else 0.5 * len(counts) + 2.5
    figure, axis = pyplot.subplots(figsize=(side + 0.8, side), layout="constrained")
    picture = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, ax=axis, label="% of the true class", shrink=0.8)
    axis.set(xlabel="answer", ylabel="true class")
    axis.set_title(f"top-1 {evaluation.top1:.2f} % of {evaluation.images} images")
    if not many:
        axis.set_xticks(range(len(counts)), evaluation.classes, rotation=45 if longest(evaluation) > 3 else 0)
        axis.set_yticks(range(len(counts)), evaluation.classes)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 60 else "black"
            axis.text(column, row, int(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    finish(pyplot, figure, path)


def try_to_draw_confusion(evaluation: Evaluation, path: Path) -> list[str]:
    """A line where the picture could be drawn, or why it could not."""
    try:
        draw_confusion(evaluation, path)
    except (SpherifyError, OSError) as error:
        return [f"no picture of the confusions: {error}"]
    return [f"confusion matrix in {path}"]


def longest(evaluation: Evaluation) -> int:
    return max(map(len, evaluation.classes))


def finish(pyplot: Any, figure: Any, path: Path) -> None:
    """Written under another name first, so that nobody sees half a picture."""
    try:
        part = path.with_name(f".{path.name}.part")
        figure.savefig(part, dpi=130, format="png")
        part.replace(path)
    finally:
        pyplot.close(figure)
