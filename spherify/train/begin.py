"""From what the command line says to a model, its data and a folder: ``spherify train`` on one page."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spherify.convert import build_plain, plan
from spherify.data.dataset import DataSet
from spherify.data.preprocess import PREPROCESSING, Preprocessing, check_classes, preprocessing_for
from spherify.data.sources import open_data
from spherify.errors import FileError, OptionError
from spherify.export.atomic import replacing_folder
from spherify.export.folder import CONFIG, save
from spherify.models.resolve import SOURCE, Source, resolve
from spherify.plan.options import Options
from spherify.train.checkpoint import CHECKPOINTS, has_checkpoint
from spherify.train.classifier import classes_of, fit_classifier
from spherify.train.conduct import Conduct, Fitted
from spherify.train.distill import donor_for
from spherify.train.fit import fit
from spherify.train.history import LOG
from spherify.train.loaders import loaders_for
from spherify.train.objective import has_angles
from spherify.train.pictures import draw_all
from spherify.train.plain import PLAIN, load_trained, save_plain
from spherify.train.recipe import Recipe
from spherify.train.run import make_accelerator

NO_OPERATOR = "none"  # train the plain twin
RECIPE = "recipe.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What is trained.

    Attributes:
        model: converted, or plain.
        label: what messages call it.
        source: how a plain model is built; None for a converted one.
        from_scratch: it has no trained weights yet.
        folder: where it was loaded from, or None.
        donor: the plain network to distil from, or None.
    """

    model: nn.Module
    label: str
    source: Source | None
    from_scratch: bool
    folder: Path | None = None
    donor: nn.Module | None = None


def train(
    model: str,
    data: str,
    recipe: Recipe,
    *,
    options: Mapping[str, Any],
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    output: str | Path,
    resume: str | None = None,
    data_dir: str | Path | None = None,
    workers: int = 0,
    conduct: Conduct | None = None,
    on_step: tuple[Callable[[int, int], None], ...] = (),
    say: Say = lambda text: None,
) -> Fitted:
    """Convert or load a model, train it on a data set, and write a folder: what ``spherify train`` does.

    Args:
        model: a name, or a folder that ``spherify`` or a run wrote.
        data: as for ``open_data``.
        options: fields of ``spherify.Options``; ``operator="none"`` trains the plain twin.
        pretrained, checkpoint: weights to begin with, for a name; those of the donor, where the recipe distils.
        output: the folder of the run.
        resume, conduct, on_step: as for ``fit``.
        workers: processes that read images.
        say: is told what was chosen, a line each.

    Raises:
        SpherifyError: in one line, whatever is wrong.
    """
    output = Path(output)
    check_output(output, resume)
    images = open_data(data, data_dir=data_dir)
    accelerator = make_accelerator(recipe)
    say = say if accelerator.is_main_process else lambda text: None
    start = begin(model, images, recipe, options, pretrained, checkpoint)
    how = preprocessing_for(
        start.model, images, folder=start.folder, image_size=recipe.img_size, from_scratch=start.from_scratch
    )
    how = replace(how, classes=images.classes)
    recipe = replace(recipe, img_size=how.input_size[1])
    tell(say, start, images, how, recipe, output, accelerator.num_processes)
    loaders = loaders_for(
        how,
        images,
        recipe,
        workers=workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )
    if accelerator.is_main_process:
        prepare_output(output, recipe)
    accelerator.wait_for_everyone()
    fitted = fit(
        start.model,
        loaders,
        recipe,
        output=output,
        resume=resume,
        on_step=on_step,
        conduct=conduct,
        accelerator=accelerator,
        donor=start.donor,
    )
    if accelerator.is_main_process and fitted.stopped_by is None:
        write_model(fitted.model, start.source, how, output)
        for line in draw_all(fitted, output):
            say(line)
        say(f"Wrote {output}: {summary_of(fitted)}")
    return fitted


def begin(
    model: str,
    data: DataSet,
    recipe: Recipe,
    options: Mapping[str, Any],
    pretrained: bool,
    checkpoint: str | Path | None,
) -> Beginning:
    """A name is built and converted, a folder is loaded; either way for the classes of the data."""

    def donor_of(source: Source | None) -> nn.Module | None:
        if not recipe.distill:
            return None
        classes, seed = data.num_classes, recipe.seed
        return donor_for(source, pretrained=pretrained, checkpoint=checkpoint, classes=classes, seed=seed)

    if Path(model).is_dir():
        has_weights = (pretrained or checkpoint is not None) and not recipe.distill
        start = begin_from_folder(Path(model), data, options, has_weights)
        return replace(start, donor=donor_of(start.source or start.model.__dict__.get(SOURCE)))
    chosen = {**options, "num_classes": options.get("num_classes") or data.num_classes}
    arguments = builder_arguments(recipe, chosen["num_classes"])
    is_trained = pretrained or checkpoint is not None
    plain, source = build_with(model, arguments, pretrained, checkpoint, recipe.seed, chosen["num_classes"])
    check_classes(data, classes_of(plain) or data.num_classes, source.label)
    donor = donor_of(source)
    if chosen["operator"] == NO_OPERATOR:
        label = f"{source.label} (plain)"
        return Beginning(model=plain, label=label, source=source, from_scratch=not is_trained, donor=donor)
    del chosen["num_classes"]
    converted = plan(plain, **chosen).apply(inplace=True)
    setattr(converted, SOURCE, source)
    label = f"{source.label} on angles ({chosen['operator']})"
    return Beginning(model=converted, label=label, source=None, from_scratch=not is_trained, donor=donor)


def begin_from_folder(folder: Path, data: DataSet, options: Mapping[str, Any], has_weights: bool) -> Beginning:
    defaults = {field.name: field.default for field in fields(Options)}
    given = [name for name, value in options.items() if value not in (defaults.get(name), None, [], ())]
    if given or has_weights:
        name = given[0] if given else "pretrained or checkpoint"
        raise OptionError(f"{name} goes with a model's name; {folder} holds a model that is converted already.")
    model, source = load_trained(folder)
    if fit_classifier(model, data.num_classes) and source is not None:
        source = replace(source, arguments={**source.arguments, "num_classes": data.num_classes})
    return Beginning(model=model, label=str(folder), source=source, from_scratch=False, folder=folder)


def builder_arguments(recipe: Recipe, classes: int) -> dict[str, Any]:
    given = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    return {"num_classes": classes, **{name: value for name, value in given.items() if value is not None}}


def build_with(
    name: str,
    arguments: dict[str, Any],
    pretrained: bool,
    checkpoint: str | Path | None,
    seed: int,
    classes: int,
) -> tuple[nn.Module, Source]:
    """A plain model for these classes; weights made for others are loaded first, and get a new classifier."""
    source = resolve(name, arguments)
    if checkpoint is None and not (pretrained and source.library == "torchvision"):
        return build_plain(source, pretrained, None, seed), source
    try:
        return build_plain(source, pretrained, checkpoint, seed), source
    except (FileError, OptionError) as error:
        own = Source(source.library, source.name, source.version, without(arguments, "num_classes"))
        try:
            model = build_plain(own, pretrained, checkpoint, seed)
        except (FileError, OptionError):
            raise error from None
        fit_classifier(model, classes)
        return model, source


def without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}


def check_output(output: Path, resume: str | None) -> None:
    """Raises OptionError where the folder holds something that a new run would write over."""
    if output.exists() and not output.is_dir():
        raise OptionError(f"{output} is a file; give a folder to write to.")
    if resume is not None or not output.is_dir():
        return
    if has_checkpoint(output):
        raise OptionError(f"{output} holds a run already; go on with --resume auto, or give another --output.")
    ours = {CONFIG, PLAIN, RECIPE, LOG, CHECKPOINTS, PREPROCESSING, "tensorboard"}
    if others := sorted(entry.name for entry in output.iterdir() if entry.name not in ours - {CONFIG, PLAIN}):
        raise OptionError(f"{output} holds {others[0]}; give a new folder with --output.")


def prepare_output(output: Path, recipe: Recipe) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        recipe.write(output / RECIPE)
    except OSError as error:
        raise OptionError(f"{output} cannot be written to ({error.strerror or error}); give another folder.") from None


def write_model(model: nn.Module, source: Source | None, how: Preprocessing, output: Path) -> None:
    """The model and how it sees images, in one step; all else in the folder stays."""
    try:
        with replacing_folder(output) as new:
            if source is None:
                save(model, new)
            else:
                save_plain(model, source, new)
            how.write(new)
    except OSError as error:
        raise FileError(f"{output} could not be written ({error.strerror or error}); the run is unchanged.") from error


def tell(
    say: Say, start: Beginning, data: DataSet, how: Preprocessing, recipe: Recipe, output: Path, world: int
) -> None:
    channels, height, width = how.input_size
    batch = f"{world} x {recipe.images_a_step}" if world > 1 else f"{recipe.images_a_step}"
    length = f"{recipe.steps} steps" if recipe.steps is not None else f"{recipe.epochs:g} epochs"
    say(f"{start.label}: {sum(value.numel() for value in start.model.parameters()) / 1e6:.2f} M parameters")
    say(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images of {data.num_classes} classes, "
        f"shown as {height}x{width} pixels in {'colour' if channels == 3 else 'grey'}"
    )
    say(f"{recipe.opt}, lr {recipe.lr:g}, {recipe.sched}, {length}, batch {batch}, {where_it_runs()}; folder {output}")
    if (recipe.orthogonality or recipe.energy) and not has_angles(start.model):
        say("note: the model is plain, so the recipe's penalties on angular filters are left out")
    for note in data.notes:
        say(f"note: {note}")


def where_it_runs() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"CPU with {count} thread{'s' if count > 1 else ''}"


def summary_of(fitted: Fitted) -> str:
    if fitted.evaluation is None:
        return f"{fitted.step} steps"
    found = fitted.evaluation
    return f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, loss {found.loss:.4f} on {found.images} test images"


def default_output(model: str, operator: str, data: str) -> Path:
    """``runs/MODEL-OPERATOR-DATA``."""
    name = "-".join(Path(part.rstrip(os.sep)).name.replace(":", "-") for part in (model, operator, data) if part)
    return Path("runs", name.removesuffix(".npz"))
