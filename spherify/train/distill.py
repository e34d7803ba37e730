"""Distillation: an objective that draws the class probabilities to those of the donor, on the very same inputs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spherify.calibrate.anneal import divergence_at
from spherify.convert import build_plain
from spherify.errors import FileError, OptionError
from spherify.heads.loss import outputs_in
from spherify.models.resolve import Source
from spherify.train.classifier import classes_of


class Distilled(nn.Module):
    """``(1 - share)`` times an objective, plus ``share`` times the divergence from the donor's class probabilities.

    The donor sees what the student sees, augmented and mixed; it is in eval mode and in no checkpoint.

    Args:
        objective: ``(outputs, targets) -> loss``; its state is this one's.
        donor: answers with logits (N, M).
        share: from 0 to 1.
        temperature: divides both logits, above 0.

    Raises:
        OptionError: when called, the donor answers for another number of classes.

    Source: Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531; Beyer et al.
    2022, Knowledge distillation: a good teacher is patient and consistent, arXiv:2106.05237.
    """

    def __init__(self, objective: nn.Module, donor: nn.Module, *, share: float, temperature: float) -> None:
        super().__init__()
        self.objective, self.share, self.temperature = objective, share, temperature
        self.donors = (copy.deepcopy(donor).eval(),)  # in a tuple: its weights are no state of this one
        self.wanted: Tensor | None = None

    @property
    def num_classes(self) -> int | None:
        return getattr(self.objective, "num_classes", None)

    def see(self, inputs: Tensor) -> None:
        """Ask the donor about the inputs of the next forward."""
        donor = self.donors[0].to(inputs.device)
        with torch.no_grad():
            self.wanted = next(outputs_in(donor(inputs)))
        if (own := getattr(self.objective, "see", None)) is not None:
            own(inputs)

    def step(self) -> None:
        if (own := getattr(self.objective, "step", None)) is not None:
            own()

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        assert self.wanted is not None, "see(inputs) comes before each forward"
        mine, wanted = next(outputs_in(outputs)), self.wanted
        mine = mine if self.num_classes is None else mine[:, : self.num_classes]
        if mine.shape != wanted.shape:
            raise OptionError(
                f"distill: the donor answers for {wanted.shape[-1]} classes and the model for {mine.shape[-1]}; "
                "give a donor of the same classes."
            )
        drawn = self.share * divergence_at(self.temperature, mine, wanted)
        return drawn if self.share == 1 else (1 - self.share) * self.objective(outputs, targets) + drawn


def donor_for(
    source: Source | None, *, pretrained: bool, checkpoint: str | Path | None, classes: int, seed: int
) -> nn.Module:
    """The plain network with the weights of a file or the library's own, its classifier among them.

    Raises:
        OptionError: no weights are named, the model is no library's, or the weights answer for other classes.
        FileError: the file does not fit.
    """
    if checkpoint is None and not pretrained:
        raise OptionError("distill needs the donor's weights; give --checkpoint FILE or --pretrained.")
    if source is None:
        raise OptionError("distill: this model is your own; call fit(..., donor=...) in Python with the plain network.")
    own = {key: value for key, value in source.arguments.items() if key != "num_classes"}
    if checkpoint is not None:
        own["num_classes"] = classes
    try:
        donor = build_plain(replace(source, arguments=own), pretrained, checkpoint, seed)
    except FileError as error:
        raise FileError(f"distill: the donor needs weights with a classifier for {classes} classes; {error}") from None
    if classes_of(donor) not in (classes, None):
        raise OptionError(f"distill: the donor answers for {classes_of(donor)} classes, and the data have {classes}.")
    return donor
