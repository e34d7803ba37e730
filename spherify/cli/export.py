"""``spherify export``: a saved model as one file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spherify.cli.terminal import terminal


def export(
    folder: Annotated[Path, typer.Argument(help="A folder that spherify wrote.", metavar="DIR")],
    format: Annotated[str, typer.Option(help="onnx, pt2 (torch.export), safetensors.")] = "onnx",
    fold: Annotated[bool, typer.Option("--fold", help="Fold for inference first.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="File to write [default: DIR/model.onnx, .pt2, or exported.safetensors].")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a saved model as one file: ONNX, torch.export, or weights alone."""
    from spherify.export.fold import FOLD
    from spherify.export.folder import load
    from spherify.export.formats import EXTENSIONS, checked_format
    from spherify.export.formats import export as write

    checked_format(format)
    model = load(folder)
    is_folded = fold and FOLD not in model.__dict__
    stem = "exported" if format == "safetensors" else "model"  # model.safetensors is the folder's own
    path = write(model, output or folder / f"{stem}{EXTENSIONS[format]}", format=format, folded=is_folded)
    size = path.stat().st_size / 1e6
    terminal().print(f"Wrote {path} ({size:.1f} MB){', folded' if fold else ''}", markup=False, highlight=False)
