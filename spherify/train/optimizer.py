"""timm's optimisers and schedules, over our parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from spherify.errors import OptionError
from spherify.models.resolve import only_errors_of
from spherify.train.objective import groups_for
from spherify.train.recipe import Recipe


def optimizer_for(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's, over our groups; with ``layer_decay``, over timm's."""
    groups = (
        groups_for(model, recipe) if recipe.layer_decay is None else with_layer_decay(model, recipe, recipe.layer_decay)
    )
    try:
        return create_optimizer_v2(groups, opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum, weight_decay=0.0)
    except Exception as error:  # timm asserts, and its optimisers refuse in their own ways
        text = " ".join(str(error).split())[:160]
        raise OptionError(f"optimiser {recipe.opt!r} could not be made ({text}); timm.optim lists its names.") from None


def with_layer_decay(model: nn.Module, recipe: Recipe, share: float) -> list[dict[str, Any]]:
    """timm's groups; Raises OptionError where timm would put all layers into one without effect."""
    with only_errors_of("timm.optim._param_groups"):
        groups = param_groups_layer_decay(model, recipe.weight_decay, layer_decay=share)
    if len({group["lr_scale"] for group in groups}) < 2:
        raise OptionError(f"layer_decay needs a model of timm that knows its stages; {type(model).__name__} does not.")
    return groups


def scheduler_for(optimizer: torch.optim.Optimizer, recipe: Recipe, updates: int, total: int) -> Any:
    """timm's, moved by every step; None for ``sched="none"``.

    Raises:
        OptionError: timm has no such schedule, or it needs test results.
    """
    if recipe.sched == "plateau":
        raise OptionError("sched 'plateau' waits for test results, and schedules here move with every step.")
    # timm counts a milestone as reached one step before it
    places = [round(place * (total if place < 1 else updates)) + 1 for place in recipe.decay_milestones]
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            recipe.sched,
            num_epochs=max(total - round(recipe.cooldown_epochs * updates), 1),
            warmup_epochs=min(round(recipe.warmup_epochs * updates), total),
            decay_epochs=max(round(recipe.decay_epochs * updates), 1),
            decay_milestones=places,
            decay_rate=recipe.decay_rate,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            step_on_epochs=False,
            updates_per_epoch=1,  # all of it is counted in steps already
        )
    except Exception as error:  # timm asserts and raises as it comes
        raise OptionError(f"schedule {recipe.sched!r} could not be made ({' '.join(str(error).split())}).") from None
    if scheduler is None and recipe.sched != "none":
        raise OptionError(f"schedule {recipe.sched!r} is unknown; timm has cosine, tanh, step, multistep, poly.")
    if scheduler is not None:
        scheduler.step_update(0)
    return scheduler
