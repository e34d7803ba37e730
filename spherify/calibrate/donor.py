"""The donor: the network that was converted, taken out of the converted one where that is possible."""

from __future__ import annotations

import copy

from torch import nn

from spherify.errors import ModelError
from spherify.layers.angular import AngularLayer
from spherify.rewrite.apply import is_untouched, undo_


def has_gains(model: nn.Module) -> bool:
    return any(isinstance(part, AngularLayer) and part.gain is not None for part in model.modules())


def donor_of(model: nn.Module) -> nn.Module:
    """The donor inside a model that is as it was converted.

    Raises:
        ModelError: its weights have changed since, or it was loaded from a folder.
    """
    if not is_untouched(model):
        raise ModelError(
            "the donor is needed: this model's weights are not those it was converted with (or it was loaded from a "
            "folder); pass donor=..., the network before its conversion."
        )
    donor = copy.deepcopy(model)
    undo_(donor)
    return donor.eval()
