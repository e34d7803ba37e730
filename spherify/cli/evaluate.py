"""``spherify evaluate``: how good a trained folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    folder: Annotated[Path, typer.Argument(help="A folder that spherify wrote.", metavar="DIR")],
    data: Annotated[str, typer.Option(help="digits, cifar10, ..., a folder, a file.npz; see `spherify list data`.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Where torchvision's sets are [default: ~/.cache/spherify].", metavar="DIR")
    ] = None,
    split: Annotated[str, typer.Option(help="test, train.")] = "test",
    img_size: Annotated[int | None, typer.Option(help="Pixels of a side [default: as trained].")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 128,
    workers: Annotated[int, typer.Option("--workers", "-j", help="Processes that read images.", min=0)] = 0,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory layout.")] = False,
    confusion: Annotated[
        Path | None, typer.Option(help="Picture of the confusion matrix [default: DIR/confusion.png].", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Accuracy, loss, every class, confusions and speed of a trained model."""
    from rich.console import Console

    from spherify.cli.terminal import terminal
    from spherify.train.examine import examine, print_evaluation
    from spherify.train.pictures import try_to_draw_confusion

    found, notes = examine(
        folder,
        data,
        data_dir=data_dir,
        split=split,
        image_size=img_size,
        batch_size=batch_size,
        workers=workers,
        amp=amp,
        channels_last=channels_last,
    )
    if found is None:  # another process than the first
        return
    notes += try_to_draw_confusion(found, confusion or folder / "confusion.png")
    if as_json:
        for note in notes:
            Console(stderr=True, soft_wrap=True).print(f"note: {note}", markup=False, highlight=False)
        print(json.dumps(found.to_dict(), indent=1))
    else:
        print_evaluation(found, terminal(), notes)
