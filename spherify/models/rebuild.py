"""The plain network behind a converted one, built again with its weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from spherify.errors import OptionError
from spherify.models.checkpoint import load_checkpoint_
from spherify.models.resolve import SOURCE, Source, build


def plain_donor(model: nn.Module, *, checkpoint: str | Path | None, pretrained: bool) -> nn.Module | None:
    """The library's network of the same name, with the weights of a file or the library's own.

    Returns:
        None where neither is asked for.

    Raises:
        OptionError: no library builds the model.
        FileError: the checkpoint does not fit.
    """
    if checkpoint is None and not pretrained:
        return None
    source = model.__dict__.get(SOURCE)
    if not isinstance(source, Source):
        raise OptionError("this model is your own; calibrate it in Python with donor=..., the plain network.")
    donor = build(source, pretrained=pretrained)
    if checkpoint is not None:
        load_checkpoint_(donor, checkpoint)
    return donor.eval()
