"""``spherify train``: convert or load a model, train it on data, write a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spherify.cli.conversion_flags import conversion_flags, with_parameters
from spherify.cli.recipe_flags import KINDS, recipe_flags


def train(
    model: Annotated[str, typer.Argument(help="A name as for converting, or a folder to go on training.")],
    *,
    data: Annotated[str, typer.Option(help="digits, cifar10, ..., a folder, a file.npz; see `spherify list data`.")],
    recipe: Annotated[str, typer.Option(help="fast, finetune, paper-cifar, paper-imagenet, or a file.json.")] = "fast",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the library's weights.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Start from this file: .safetensors, .pth, .th.", metavar="FILE")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run [default: runs/MODEL-OPERATOR-DATA].", metavar="DIR")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Subfolder of --output, and of runs/ without it.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="auto: go on from the newest checkpoint in the folder, if any; or a path.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where torchvision's sets are [default: ~/.cache/spherify].", metavar="DIR")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "-j", help="Processes that read images.", min=0)] = 0,
    log_interval: Annotated[int, typer.Option(help="Steps between rows of log.csv.")] = 50,
    val_interval: Annotated[int, typer.Option(help="Epochs between tests.")] = 1,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 10.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    **flags: Any,
) -> None:
    """Train a model on angles, or with --operator none its plain twin."""
    from spherify.cli.terminal import terminal
    from spherify.train.begin import default_output, train
    from spherify.train.conduct import Conduct
    from spherify.train.recipe import resolved

    values = {name: value for name, value in flags.items() if name in KINDS}
    options = {name: value for name, value in flags.items() if name not in KINDS}
    options = {
        name: () if value is None and name in ("include", "exclude") else value for name, value in options.items()
    }
    operator = "" if Path(model).is_dir() else options["operator"]
    folder = output or (Path("runs") if experiment else default_output(model, operator, data))
    place = terminal()
    train(
        model,
        data,
        resolved(recipe, **values),
        options=options,
        pretrained=pretrained,
        checkpoint=checkpoint,
        output=folder / experiment if experiment else folder,
        resume=resume,
        data_dir=data_dir,
        workers=workers,
        conduct=Conduct(
            log_interval=log_interval,
            val_interval=val_interval,
            checkpoint_steps=checkpoint_steps,
            checkpoint_minutes=checkpoint_minutes,
            tensorboard=tensorboard,
            quiet=quiet,
        ),
        say=lambda text: place.print(text, markup=False, highlight=False, soft_wrap=True),
    )


with_parameters(train, conversion_flags(), recipe_flags())
