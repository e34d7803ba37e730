"""A saved folder put to the test: ``spherify evaluate`` on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spherify.data.batches import loader_of
from spherify.data.preprocess import Preprocessing, check_classes, preprocessing_for
from spherify.data.sources import open_data
from spherify.train.classifier import classes_of
from spherify.train.evaluate import Evaluation, evaluate
from spherify.train.loaders import Checked
from spherify.train.plain import load_trained
from spherify.train.recipe import Recipe
from spherify.train.run import make_accelerator

MOST_ROWS = 20  # of the table of classes; of more classes, the worst


def examine(
    folder: str | Path,
    data: str,
    *,
    data_dir: str | Path | None = None,
    split: str = "test",
    image_size: int | None = None,
    batch_size: int = 128,
    workers: int = 0,
    amp: bool = False,
    channels_last: bool = False,
) -> tuple[Evaluation | None, list[str]]:
    """Test a folder on a split of a data set, in every process that was launched; notes on the data.

    Returns:
        The result; None in all processes but the first.

    Raises:
        OptionError: there is no such folder or data, or the model answers for other classes.
        FileError: one of them is damaged.
    """
    model, _ = load_trained(folder)
    images = open_data(data, data_dir=data_dir)
    trained = Preprocessing.read(folder)
    outputs = classes_of(model) or images.num_classes
    check_classes(images, outputs, str(folder), trained.classes if trained is not None else ())
    how = preprocessing_for(model, images, folder=folder, image_size=image_size)
    accelerator = make_accelerator(Recipe(epochs=1, amp=amp))
    chosen = images.split(split)
    own = range(accelerator.process_index, len(chosen), accelerator.num_processes)
    found = evaluate(
        model.to(accelerator.device),
        Checked(loader_of(chosen, how, batch_size, own, workers=workers)),
        classes=images.classes,
        device=accelerator.device,
        channels_last=channels_last,
        autocast=accelerator.autocast,
    )
    return (found if accelerator.is_main_process else None), list(images.notes)


def print_evaluation(found: Evaluation, console: Console, notes: list[str]) -> None:
    """The sums in a line, and a table of the classes: of many, those recognised worst."""
    rows = sorted(found.per_class(), key=lambda row: -1.0 if row["top1"] is None else row["top1"])
    if len(rows) <= MOST_ROWS:
        rows = found.per_class()
    table = Table(box=None, pad_edge=False)
    for name, side in (("class", "left"), ("images", "right"), ("top-1 %", "right"), ("mostly taken for", "left")):
        table.add_column(name, justify="left" if side == "left" else "right")
    for row in rows[:MOST_ROWS]:
        share = "" if row["top1"] is None else f"{row['top1']:.2f}"
        table.add_row(row["class"], str(row["images"]), share, mistaken_for(found, row))
    console.print(table, markup=False)
    if len(found.classes) > MOST_ROWS:
        console.print(f"({MOST_ROWS} classes of {len(found.classes)}, the worst ones)", markup=False, highlight=False)
    console.print(
        f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f}, {found.images} images, "
        f"{found.images_per_second:.0f} images/s",
        markup=False,
        highlight=False,
    )
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def mistaken_for(found: Evaluation, row: dict[str, Any]) -> str:
    """The class that images of this one are most often taken for, and how often."""
    number = [entry["class"] for entry in found.per_class()].index(row["class"])
    wrong = found.confusion[number].copy()
    wrong[number] = 0
    return f"{found.classes[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.max() else ""
