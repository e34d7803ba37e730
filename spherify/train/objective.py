"""What is minimised and by which parameters: the one place where training meets heads and regularisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from spherify.layers.angular import AngularLayer
from spherify.train.recipe import Recipe


class CrossEntropy(nn.Module):
    """Cross-entropy against labels or, behind mixup, shares of classes."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing  # mixup has smoothed already
        return F.cross_entropy(logits_of(outputs), targets, label_smoothing=smoothing)


def logits_of(outputs: Any) -> Tensor:
    """(N, classes), out of what a model returns: a tensor, or a tuple that begins with it."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def objective_for(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The loss that belongs to the model's head."""
    return CrossEntropy(recipe.smoothing)


def penalty_for(model: nn.Module, recipe: Recipe) -> Callable[[], Tensor] | None:
    """What is added to the loss for the filters' sake; None where the recipe asks for nothing."""
    return None


def groups_for(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups: no decay on vectors, nor on filters of which only the direction counts."""
    free = {id(own) for layer in model.modules() if isinstance(layer, AngularLayer) for own in layer.parameters(False)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim <= 1 or id(parameter) in free else decayed).append(parameter)
    return [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, recipe.weight_decay), (kept, 0.0))
        if group
    ]


def total_loss(loss: Tensor, penalty: Callable[[], Tensor] | None) -> Tensor:
    return loss if penalty is None else loss + penalty().to(loss.dtype)
