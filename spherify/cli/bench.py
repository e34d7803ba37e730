"""``spherify bench``: what a conversion costs on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from spherify.cli.terminal import terminal


def bench(
    model: Annotated[str, typer.Argument(help="resnet18, timm:resnet18, torchvision:resnet18.")],
    operator: Annotated[str, typer.Option(help="cosine, linear, sigmoid, learnable.")] = "cosine",
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    size: Annotated[int | None, typer.Option(help="Side of an image in pixels [default: the model's].")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 (autocast).")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Images in channels-last memory.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile every form with torch.compile.")] = False,
    repeats: Annotated[int, typer.Option(help="Rounds; the forms take turns within each.")] = 11,
    threads: Annotated[int | None, typer.Option(help="Of torch on the CPU.")] = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count this process's own work, for a busy machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Time and memory of a model: plain, converted and folded, in training and at inference."""
    from rich.table import Table

    from spherify.bench.compare import Settings, compare, machine, number_of_threads

    settings = Settings(
        batch=batch,
        size=size,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        compiled=compiled,
        repeats=repeats,
        threads=threads,
        cpu_time=cpu_time,
    )
    rows = compare(model, settings, operator=operator)
    with number_of_threads(threads):
        here = machine()
    folded = next(row.folded for row in rows if row.form == "converted folded")
    assert folded is not None
    if as_json:
        found = {
            "model": model,
            "operator": operator,
            "machine": here,
            "rows": [row.to_dict() for row in rows],
            "folded": folded.to_dict(),
        }
        print(json.dumps(found, indent=1))
        return
    title = f"{model}, {operator}, batch {batch}, {dtype}, {here['gpu'] if device == 'cuda' else here['processor']}"
    table = Table(title=title, title_justify="left")
    for column in ("phase", "form", "ms", "quartiles", "images/s", "ratio", "ratio of least", "peak MB", "memory"):
        table.add_column(column, justify="left" if column in ("phase", "form") else "right")
    for row in rows:
        low, high = row.timing.spread
        table.add_row(
            row.phase,
            row.form,
            f"{row.timing.median * 1e3:.1f}",
            f"{low * 1e3:.1f}-{high * 1e3:.1f}",
            f"{row.images_per_second:.1f}",
            f"{row.ratio:.2f}",
            f"{row.ratio_of_least:.2f}",
            f"{row.bytes / 1e6:.1f}",
            f"{row.memory_ratio:.2f}",
        )
    terminal().print(table)
    terminal().print("Ratios are to plain, those of folded forms to plain folded; memory is the step's own peak.")
    if device == "cpu":
        terminal().print(f"CPU kernels: {here['cpu_kernels']}.", markup=False, highlight=False)
    terminal().print(str(folded), markup=False, highlight=False)
