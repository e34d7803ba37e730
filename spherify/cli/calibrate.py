"""``spherify calibrate DIR``: bring a converted model near its donor again, without training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from spherify.cli.terminal import terminal


def calibrate(
    folder: Annotated[Path, typer.Argument(help="A converted model, as spherify wrote it.", metavar="DIR")],
    data: Annotated[str, typer.Option(help="digits, cifar10, ..., a folder with train/ and val/, a file.npz.")],
    method: Annotated[str, typer.Option(help="statistics, transplant, reconstruct.")] = "transplant",
    images: Annotated[int, typer.Option(help="Calibration images, drawn from the training split.")] = 500,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The donor's weights: .safetensors, .pth, .th.", metavar="FILE")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="The donor has the library's weights.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder to write [default: DIR].", metavar="DIR")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the layers' errors: .png, .svg, .pdf.", metavar="FILE")
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Show what each layer costs when it alone is converted.")
    ] = False,
    keep_worst: Annotated[
        int, typer.Option(help="Take so many layers, those that cost most alone, back to plain ones.", metavar="N")
    ] = 0,
    output_solves: Annotated[
        int, typer.Option(help="At most so many solves of the outputs after a transplant; 0 for none.", metavar="N")
    ] = 8,
    data_dir: Annotated[Path | None, typer.Option(help="Where named data are kept.", metavar="DIR")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    seed: Annotated[int, typer.Option(help="Of the images and positions drawn.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Calibrate a converted model on unlabelled images; the donor is rebuilt from its name and weights."""
    from spherify.calibrate.from_data import calibrate_with
    from spherify.export.folder import check_target, load, save
    from spherify.models.rebuild import plain_donor

    target = output or folder
    check_target(target)
    model = load(folder).eval()
    donor = plain_donor(model, checkpoint=checkpoint, pretrained=pretrained)
    with progress_bar() as step:
        report = calibrate_with(
            model,
            data,
            method,
            donor=donor,
            images=images,
            seed=seed,
            folder=str(folder),
            data_dir=None if data_dir is None else str(data_dir),
            progress=step,
            sensitivity=sensitivity,
            keep_worst=keep_worst,
            output_solves=output_solves,
        )
    save(model, target)
    show(report, picture, as_json)
    if not as_json:
        terminal().print(f"Wrote {target}", markup=False, highlight=False)


def show(report: Any, picture: Path | None, as_json: bool) -> None:
    if picture is not None:
        report.save_picture(picture)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        terminal().print(report.table())


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str], None]]:
    """A line on standard error that names the layer being worked on; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def step(name: str) -> None:
            bar.update(task, advance=1, description=name)

        yield step
