"""``spherify export``: a saved model as one file for other runtimes."""

from __future__ import annotations

import json
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a saved model as one file: ONNX, torch.export, or weights alone."""
    from spherify.export.fold import fold as folded_form
    from spherify.export.fold_report import fold_report
    from spherify.export.folder import load
    from spherify.export.formats import EXTENSIONS, checked_format
    from spherify.export.formats import export as write
    from spherify.graph.folding import FOLD

    checked_format(format)
    model = load(folder)
    if fold and FOLD not in model.__dict__:
        model = folded_form(model, inplace=True)
    stem = "exported" if format == "safetensors" else "model"  # model.safetensors is the folder's own
    path = write(model, output or folder / f"{stem}{EXTENSIONS[format]}", format=format)
    size, report = path.stat().st_size, fold_report(model) if FOLD in model.__dict__ else None
    if as_json:
        folded = None if report is None else report.to_dict()
        print(json.dumps({"file": str(path), "format": format, "bytes": size, "folded": folded}, indent=1))
        return
    lines = [f"Wrote {path} ({size / 1e6:.1f} MB){'' if report is None else ', folded'}"]
    terminal().print("\n".join(lines if report is None else [*lines, str(report)]), markup=False, highlight=False)
