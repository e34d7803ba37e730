"""``calibrate``: the public function, its checks, and the order of the work."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spherify.calibrate.distil import Schedule
from spherify.calibrate.donor import donor_of, has_gains
from spherify.calibrate.images import collected, is_large
from spherify.calibrate.keep import become_, check_keep_worst, converted_without
from spherify.calibrate.pair import Pair, Runs
from spherify.calibrate.reconstruct import reconstruct_
from spherify.calibrate.replay import departure
from spherify.calibrate.report import LayerFit, Report, compared, layer_fits
from spherify.calibrate.sensitivity import measured
from spherify.calibrate.solve import Solved, Solves, solve_outputs_
from spherify.calibrate.statistics import average_norms_, match_statistics_, norms_of
from spherify.calibrate.transplant import Settings, transplant_
from spherify.errors import ModelError, OptionError
from spherify.rewrite.apply import is_untouched

BATCHES_TO_SOLVE = 3  # that a batch is cut into, since slopes for each image take memory
FEW_IMAGES = 100
METHODS = ("statistics", "transplant", "reconstruct")

Progress = Callable[[str], None]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "transplant",
    *,
    donor: nn.Module | None = None,
    images: int | None = None,
    refit_kept: bool = True,
    output_solves: int = 8,
    sensitivity: bool = False,
    keep_worst: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Bring a converted network near its donor again, without labels; the model is changed in place.

    - ``statistics``: BatchNorm statistics from the images; gains and biases with which every channel of a layer
      without a BatchNorm has the donor's mean and spread. Needs no donor where BatchNorms follow all layers.
    - ``transplant``: layer by layer the filters whose angular answers are nearest to the donor's, by least squares;
      then a few linear solves of the network's outputs over all layers at once.
    - ``reconstruct``: the transplant, then a short training on what the donor makes of these images, mirrored, shifted
      and patched with one another anew each time: its answers and the outputs of its blocks.

    Every module's mode and flags are as before afterwards; on an error the weights are too.

    Args:
        model: what ``spherify`` returned.
        batches: of input tensors (N, ...) or of (inputs, targets); targets are not looked at.
        method: statistics, transplant, reconstruct.
        donor: the network before its conversion. Without it, it is taken from ``model`` itself as long as nothing has
            changed its weights since the conversion.
        images: use so many at most.
        refit_kept: fit plain layers behind converted ones too, the classifier among them.
        output_solves: at the end of a transplant, at most so many linear solves of the network's outputs over all
            layers at once; 0 for none.
        sensitivity: measure first what each converted layer costs alone (``spherify.calibrate.sensitivity``); the
            report's ``sensitivity`` holds it.
        keep_worst: so many converted layers, those that cost most alone, are plain layers again: the donor is
            converted anew without them and calibrated. The model's plan, its folder and the report say so.
        seed: of the positions and images drawn, and of how these are changed.
        progress: called with the name of each layer before it is worked on.

    Returns:
        A report that prints as a table, has ``to_dict()`` and ``save_picture(path)``.

    Raises:
        OptionError: unknown method, ``output_solves`` negative, too few images, of several sizes, or not finite;
            ``keep_worst`` takes back every layer, or the conversion gave the model a new classifier.
        ModelError: the donor is needed and cannot be had, the model does not run on the images, calls other functions
            for some of them than for others, or makes numbers of them that are not finite.
        RewriteError: ``model`` was not converted, or ``donor`` is another network.
    """
    if method not in METHODS:
        raise OptionError(f"calibration method {method!r} is unknown; choose one of: {', '.join(METHODS)}.")
    if output_solves < 0:
        raise OptionError(f"output_solves={output_solves} is negative; choose 0 for none, or how many.")
    check_keep_worst(model, keep_worst)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    parts = collected(batches, images, device)
    started = time.perf_counter()
    needs_donor = method != "statistics" or has_gains(model) or sensitivity or keep_worst > 0
    if donor is None and (needs_donor or is_untouched(model)):
        donor = donor_of(model)
    effects, target = None, model
    if sensitivity or keep_worst:
        assert donor is not None
        effects = measured(model, donor, parts, seed=seed, progress=progress)
    if effects is not None and donor is not None and keep_worst:
        target = converted_without(model, donor, effects, keep_worst, parts[0][:2])
    settings = Settings(seed=seed, refits_kept=refit_kept, output_solves=output_solves)
    report = carried_out(target, donor, parts, method, settings, progress or (lambda name: None))
    if effects is not None and target is not model:
        become_(model, target)
        kept = effects.worst(keep_worst)
        report = replace(report, kept=kept, notes=(f"Taken back to plain layers: {', '.join(kept)}.", *report.notes))
    return replace(report, seconds=time.perf_counter() - started, sensitivity=effects)


def carried_out(
    model: nn.Module, donor: nn.Module | None, parts: list[Tensor], method: str, settings: Settings, progress: Progress
) -> Report:
    """The calibration itself, with what is measured before and after it."""
    notes = notes_on(parts)
    with unharmed(model):
        layers: tuple[LayerFit, ...] = ()
        logits: LayerFit | None = None
        runs = Runs(model, donor) if donor is not None else None
        problem = departure(model, donor, parts, runs) if donor is not None else None
        if problem is not None:
            refuse_what_needs_the_replay(model, method, problem)
            donor, runs, notes = None, None, (*notes, f"Not compared with the donor: {problem}.")
        before = compared(model, donor, parts, runs) if donor is not None else None
        solved = carry_out(model, donor, parts, method, settings, progress, runs)
        notes = (*notes, *notes_on_solves(solved))
        if donor is not None and before is not None:
            if (problem := departure(model, donor, parts, runs)) is not None:  # with the new weights
                refuse_what_needs_the_replay(model, method, problem)
            layers, logits = layer_fits(before, compared(model, donor, parts, runs))
            notes = (*notes, *notes_on_output(logits))
        notes = (*notes, *notes_on_file(runs))
    count = sum(len(part) for part in parts)
    return Report(method=method, images=count, seconds=0.0, layers=layers, logits=logits, notes=notes)


def refuse_what_needs_the_replay(model: nn.Module, method: str, problem: str) -> None:
    """Raises ModelError but for the plain averages of BatchNorm statistics, which run the model itself."""
    if method == "statistics" and not has_gains(model):
        return
    remedy = (
        "have its forward call the same functions for every image"
        if has_gains(model)
        else 'use method="statistics", which runs the model itself, or have its forward call the same for every image'
    )
    raise ModelError(f"{type(model).__name__}: {problem}; {remedy}.")


def carry_out(
    model: nn.Module,
    donor: nn.Module | None,
    parts: list[Tensor],
    method: str,
    settings: Settings,
    progress: Progress,
    runs: Runs | None,
) -> Solved | None:
    """Returns what the solves of the outputs did, None where there were none."""
    if method == "statistics":
        if donor is not None and has_gains(model):
            with Pair(model, donor, parts, half=is_large(parts), runs=runs) as pair:
                match_statistics_(pair, progress)
        elif norms_of(model):
            average_norms_(model, parts)
        return None
    assert donor is not None
    with Pair(model, donor, parts, half=is_large(parts), runs=runs) as pair:
        transplant_(pair, settings, progress)
    solved = None
    if settings.output_solves:
        batches = [batch for part in parts for batch in part.split(math.ceil(len(part) / BATCHES_TO_SOLVE))]
        solves = Solves(count=settings.output_solves, refits_kept=settings.refits_kept, seed=settings.seed)
        with Pair(model, donor, batches, half=False, runs=runs) as pair:
            solved = solve_outputs_(pair, solves, progress)
    if method == "reconstruct":
        reconstruct_(model, donor, parts, Schedule(seed=settings.seed), progress, runs)
    return solved


def notes_on(parts: Sequence[Tensor]) -> tuple[str, ...]:
    count = sum(len(part) for part in parts)
    few = f"{count} images are few for a least-squares fit; give {FEW_IMAGES} or more for what the method can do."
    return (few,) if count < FEW_IMAGES else ()


def notes_on_solves(solved: Solved | None) -> tuple[str, ...]:
    if solved is None:
        return ()
    if solved.problem:
        return (f"The outputs were not solved for: {solved.problem}.",)
    if len(solved.losses) == 1:
        return ("A solve of the outputs did not bring held-out images nearer to the donor, and was dropped.",)
    losses = " -> ".join(f"{loss:.3g}" for loss in solved.losses)
    left = f" (filters of {len(solved.left)} layers, the largest, stayed)" if solved.left else ""
    return (f"Outputs solved for {solved.unknowns} numbers{left}: loss on held-out images {losses}.",)


def notes_on_output(logits: LayerFit) -> tuple[str, ...]:
    if math.isfinite(logits.error):
        return ()
    return ("The outputs were not compared: they hold NaN or infinite numbers, or the donor's are 0 throughout.",)


def notes_on_file(runs: Runs | None) -> tuple[str, ...]:
    if runs is None or not runs.written:
        return ()
    return (f"{runs.written / 1e9:.1f} GB of activations waited in a temporary file; TMPDIR names its folder.",)


@contextlib.contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """Modes of all modules as before afterwards; on an error, weights and buffers too."""
    modes = [(module, module.training) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in state:
                    value.copy_(state[name])
        raise
    finally:
        for module, mode in modes:
            module.training = mode
