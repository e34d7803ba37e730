"""What is minimised, and by which parameters: where training meets heads and regularisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spherify.heads.loss import criterion, outputs_in
from spherify.layers.angular import AngularLayer
from spherify.parameter_groups import parameter_groups
from spherify.regularizers import hyperspherical_energy, orthogonality
from spherify.train.recipe import Recipe

Penalty = Callable[[], Tensor]


def objective_for(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The loss that belongs to the model's head. Behind mixup the labels are smooth already."""
    smoothing = 0.0 if recipe.mixes else recipe.smoothing
    return criterion(model, label_smoothing=smoothing, schedule=recipe.margin_schedule)


def penalty_for(model: nn.Module, recipe: Recipe) -> Penalty | None:
    """What is added to the loss for the filters' sake; None where nothing is asked for, or no layer is angular."""
    if not has_angles(model) or not (recipe.orthogonality or recipe.energy):
        return None

    def penalty() -> Tensor:
        parts = []
        if recipe.orthogonality:
            parts.append(recipe.orthogonality * orthogonality(model))
        if recipe.energy:
            parts.append(recipe.energy * hyperspherical_energy(model))
        return torch.stack(parts).sum()

    return penalty


def has_angles(model: nn.Module) -> bool:
    return any(isinstance(module, AngularLayer) for module in model.modules())


def groups_for(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    return parameter_groups(model, weight_decay=recipe.weight_decay)


def total_loss(loss: Tensor, penalty: Penalty | None) -> Tensor:
    return loss if penalty is None else loss + penalty().to(loss.dtype)


def logits_of(outputs: Any, classes: int | None = None) -> Tensor:
    """(N, classes), out of what a model returns: the first of several, without what a head in train mode adds."""
    logits = next(outputs_in(outputs))
    return logits if classes is None else logits[:, :classes]
