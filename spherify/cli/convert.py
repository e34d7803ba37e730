"""``spherify MODEL``: convert and write a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from spherify.cli.calibrate import progress_bar
from spherify.cli.terminal import terminal


def convert(
    model: Annotated[str, typer.Argument(help="resnet18, timm:resnet18, torchvision:resnet18.")],
    operator: Annotated[str, typer.Option(help="cosine, linear, sigmoid, learnable.")] = "cosine",
    k: Annotated[float | None, typer.Option(help="Softness of sigmoid (0.3) and learnable (0.5 at first).")] = None,
    k_shared: Annotated[str, typer.Option(help="What shares a learned k: filter, layer, network.")] = "filter",
    eps: Annotated[float, typer.Option(help="Added to squared norms, inside the root.")] = 1e-4,
    skip_shortcuts: Annotated[
        bool, typer.Option("--skip-shortcuts", help="Keep the 1x1 projections of residual blocks.")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Convert these alone: a glob on names, @role, type:Class, re:... (repeatable)."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Keep these; selectors as for --include.")] = None,
    linear: Annotated[bool, typer.Option(help="Convert linear layers too.")] = True,
    head: Annotated[
        str,
        typer.Option(help="The classifier: keep, convert, w-softmax, a-softmax, ... (see `spherify list heads`)."),
    ] = "keep",
    head_operator: Annotated[
        str | None, typer.Option(help="Response of an angular head: cosine, linear, sigmoid [default: the head's].")
    ] = None,
    head_k: Annotated[float | None, typer.Option(help="Softness of its sigmoid (0.3).")] = None,
    margin: Annotated[float | None, typer.Option(help="m of its margin (4 for a-softmax and ga-softmax).")] = None,
    scale: Annotated[float | None, typer.Option(help="Of its logits, where it normalises the feature.")] = None,
    norm: Annotated[str, typer.Option(help="BatchNorms behind converted layers: keep, remove.")] = "keep",
    activation: Annotated[str, typer.Option(help="Activations behind converted layers: keep, remove.")] = "keep",
    gain: Annotated[
        str, typer.Option(help="Learned gain and bias: auto (where no BatchNorm follows), none, learned.")
    ] = "auto",
    bias: Annotated[str, typer.Option(help="Biases of converted layers: keep, drop.")] = "keep",
    num_classes: Annotated[int | None, typer.Option(help="Size of the classifier.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the library's weights.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Start from this file: .safetensors, .pth, .th.", metavar="FILE")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help="Calibrate with these images: cifar10, ..., a folder, a file.npz.", metavar="DATA"),
    ] = None,
    calibration: Annotated[str, typer.Option(help="statistics, transplant, reconstruct.")] = "transplant",
    calibration_images: Annotated[int, typer.Option(help="How many of them.")] = 500,
    output_solves: Annotated[
        int, typer.Option(help="At most so many solves of the outputs after a transplant; 0 for none.", metavar="N")
    ] = 8,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write [default: MODEL-OPERATOR].", metavar="DIR")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    seed: Annotated[int, typer.Option(help="Of the initial weights.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert a model and write it to a folder (the default command)."""
    from rich.console import Console

    from spherify.convert import plan
    from spherify.export.folder import check_target, save
    from spherify.plan.table import print_plan

    folder = output or Path(re.sub(r"[^\w.-]+", "-", f"{model}-{operator}"))
    if not dry_run:
        check_target(folder)
    report = plan(
        model,
        operator=operator,
        k=k,
        k_shared=k_shared,
        eps=eps,
        skip_shortcuts=skip_shortcuts,
        include=include or (),
        exclude=exclude or (),
        linear=linear,
        head=head,
        head_operator=head_operator,
        head_k=head_k,
        margin=margin,
        scale=scale,
        norm=norm,
        activation=activation,
        gain=gain,
        bias=bias,
        num_classes=num_classes,
        pretrained=pretrained,
        checkpoint=checkpoint,
        seed=seed,
    )
    converted = report.apply(inplace=True)
    calibrated = None
    if calibrate is not None and not dry_run:
        from spherify.calibrate.from_data import calibrate_with

        with progress_bar() as step:
            calibrated = calibrate_with(
                converted,
                calibrate,
                calibration,
                images=calibration_images,
                seed=seed,
                progress=step,
                output_solves=output_solves,
            )
    messages = Console(stderr=True, soft_wrap=True)
    if not dry_run:  # before anything is printed: `| head` must not keep it from being written
        save(converted, folder)
    if as_json:
        for note in report.notes:
            messages.print(f"note: {note}", markup=False)
    else:
        print_plan(report, terminal())
        if calibrated is not None:
            terminal().print(calibrated.table())
    if not dry_run:
        size = (folder / "model.safetensors").stat().st_size / 1e6
        place = messages if as_json else terminal()
        place.print(f"Wrote {folder}: model.safetensors ({size:.1f} MB), config.json", markup=False, highlight=False)
    if as_json:
        found = {} if calibrated is None else {"calibration": calibrated.to_dict()}
        print(json.dumps({**report.to_dict(), **found}, indent=1))
