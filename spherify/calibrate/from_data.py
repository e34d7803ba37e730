"""Calibration as the command line does it: images by the name of their data, accuracy before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spherify.calibrate.calibrate import Progress, calibrate
from spherify.calibrate.donor import donor_of, has_gains
from spherify.calibrate.report import Report
from spherify.data.batches import loader_of
from spherify.data.dataset import DataSet
from spherify.data.preprocess import preprocessing_for
from spherify.data.sources import open_data
from spherify.rewrite.apply import is_untouched

MOST_TESTED = 1000
BATCH = 50


def calibrate_with(
    model: nn.Module,
    data: str,
    method: str,
    *,
    donor: nn.Module | None = None,
    images: int | None = None,
    seed: int = 0,
    folder: str | None = None,
    data_dir: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """``calibrate`` on the training images of some data, with the accuracy on test images at every stage.

    Where the data have one split, the images that were not used for calibration are the test images.

    Args:
        data: as ``spherify.data.sources.open_data`` takes it.
        images: drawn for calibration; default 500.
        folder: where the model was loaded from; it may say how its images are normalised.
        The others, ``options`` too, are those of ``calibrate``.

    Raises:
        As ``calibrate`` and ``open_data``.
    """
    opened = open_data(data, data_dir=data_dir)
    how = preprocessing_for(model, opened, folder=folder)
    wanted = 500 if images is None else images
    order = np.random.default_rng(seed).permutation(len(opened.train))
    chosen, rest = order[:wanted], order[wanted:]
    test_order = rest if opened.test is opened.train else np.arange(len(opened.test))
    test = loader_of(opened.test, how, BATCH, test_order[:MOST_TESTED].tolist())
    if donor is None and (
        method != "statistics" or has_gains(model) or is_untouched(model) or options.get("keep_worst")
    ):
        donor = donor_of(model)
    comparable, notes = can_be_scored(model, opened, len(test_order))
    accuracy = {}
    if comparable:
        stages = {"swapped": model} if donor is None else {"donor": donor, "swapped": model}
        accuracy = {stage: top1(network, test) for stage, network in stages.items()}
    loader = loader_of(opened.train, how, BATCH, chosen.tolist())
    report = calibrate(model, loader, method, donor=donor, seed=seed, progress=progress, **options)
    if comparable:
        accuracy["calibrated"] = top1(model, test)
    return replace(report, accuracy=accuracy or None, notes=(*report.notes, *opened.notes, *notes))


def can_be_scored(model: nn.Module, data: DataSet, tested: int) -> tuple[bool, tuple[str, ...]]:
    if tested == 0:
        return False, ("All images went into the calibration, so no accuracy was measured.",)
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes < data.num_classes:
        return False, (f"The model has {classes} classes and the data {data.num_classes}: no accuracy was measured.",)
    return True, (f"Accuracy on {min(tested, MOST_TESTED)} test images.",)


@torch.no_grad()
def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """In percent; the model's modes are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    right = total = 0
    try:
        model.eval()
        for inputs, labels in batches:
            right += int((model(inputs.to(device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    finally:
        for module, mode in modes:
            module.training = mode
    return 100.0 * right / max(total, 1)
