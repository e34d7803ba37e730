"""``fit``: train a model on batches by a recipe, and lose nothing on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from spherify.calibrate.anneal import Annealing
from spherify.errors import OptionError, SpherifyError
from spherify.train.checkpoint import Checkpoint, has_checkpoint, newest_checkpoint, read_checkpoint
from spherify.train.conduct import Conduct, Fitted
from spherify.train.loaders import Loaders
from spherify.train.loop import Loop
from spherify.train.recipe import Recipe, resolved
from spherify.train.run import make_accelerator, released, start_run
from spherify.train.sync_bn import with_synchronised_norms


def fit(
    model: nn.Module,
    loaders: Loaders | tuple[Any, Any],
    recipe: str | Recipe = "fast",
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    objective: nn.Module | None = None,
    on_step: Sequence[Callable[[int, int], None]] = (),
    conduct: Conduct | None = None,
    accelerator: Any = None,
    donor: nn.Module | None = None,
) -> Fitted:
    """Train a model in place.

    Args:
        model: any module that returns logits, converted or not.
        loaders: ``Loaders``, or a tuple of training and test batches; None for no tests.
        recipe: a name of ``RECIPES``, or a ``Recipe``.
        output: folder for checkpoints and log.csv; None: nothing is written.
        resume: ``auto`` goes on from the newest whole checkpoint in ``output``, if there is one; a path, from that
            checkpoint or that run; None begins anew, and refuses a folder that holds a run.
        objective: ``(outputs, targets) -> loss``, instead of the one that belongs to the model's head. Its
            state_dict is kept in checkpoints; a method ``step()`` is called after each step, a method
            ``see(inputs)`` before each forward.
        on_step: each is called as ``f(step, total)`` before each step, step counting from 0.
        accelerator: your own ``accelerate.Accelerator``, instead of one made by the recipe.
        donor: the plain network whose class probabilities are wanted, for ``Recipe.distill``; it stays as it is.

    Returns:
        The trained model, the log, and why the run ended.

    Raises:
        OptionError: recipe, folder and call do not go together.
        NotFiniteError: the loss is no number; the message names the layer, the last checkpoint is kept.
        FileError: the disk refused, or images cannot be read.
    """
    recipe = resolved(recipe)
    if recipe.distill and donor is None:
        raise OptionError("distill needs the donor; give fit(..., donor=...), the network before its conversion.")
    loaders = loaders if isinstance(loaders, Loaders) else Loaders(train=loaders[0], test=loaders[1])
    conduct = conduct or Conduct()
    folder = Path(output) if output is not None else None
    checkpoint, notes = checkpoint_to_resume(folder, resume)
    accelerator = accelerator or make_accelerator(recipe)
    if not any(module.training for module in model.modules()):
        model.train()
    with with_synchronised_norms(model) if recipe.sync_bn else nullcontext():
        batches = length_of(loaders.train, recipe)
        run = start_run(model, recipe, batches, accelerator, objective, len(loaders.classes), donor)
        annealing = annealing_of(model, recipe)
        if checkpoint is not None:
            notes += run.set_up_again(checkpoint, accelerator.process_index)
            notes.append(f"Going on from step {run.step} of {run.total}.")
        if annealing is not None:
            annealing.on_step(max(run.step - 1, 0), run.total)  # a test may come before the next step
            on_step = (*on_step, annealing.on_step)
        rows = checkpoint.state["rows"] if checkpoint is not None else []
        try:
            with nullcontext() if annealing is None else annealing:
                return Loop(run, loaders, conduct, folder, on_step, rows, notes).to_the_end()
        finally:
            released(run)


def annealing_of(model: nn.Module, recipe: Recipe) -> Annealing | None:
    return None if recipe.anneal == "none" else Annealing(model, schedule=recipe.anneal, until=recipe.anneal_until)


def checkpoint_to_resume(folder: Path | None, resume: str | Path | None) -> tuple[Checkpoint | None, list[str]]:
    """Raises OptionError where the folder holds a run that nobody asked to resume, or the path holds none."""
    if resume is None:
        if folder is not None and has_checkpoint(folder):
            raise OptionError(f"{folder} holds a run already; go on with --resume auto, or give another --output.")
        return None, []
    if str(resume) != "auto":
        path = Path(resume)
        if not has_checkpoint(path):
            return read_checkpoint(path), []
        folder = path
    if folder is None:
        raise OptionError("resume='auto' needs the output folder of the run.")
    found, notes = newest_checkpoint(folder)
    if found is None and notes:
        raise SpherifyError(f"no checkpoint in {folder} is whole; begin again in another --output. {' '.join(notes)}")
    return found, notes


def length_of(batches: Any, recipe: Recipe) -> int:
    """Training batches an epoch, of which every step gets as many as the recipe accumulates."""
    try:
        count = len(batches)
    except TypeError:
        raise OptionError(
            "the training batches have no length; give a DataLoader, or any iterable with len()."
        ) from None
    if count < recipe.grad_accum_steps:
        raise OptionError(f"{count} training batches are too few for grad_accum_steps={recipe.grad_accum_steps}.")
    return count // recipe.grad_accum_steps * recipe.grad_accum_steps
