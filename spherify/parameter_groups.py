"""Parameter groups for the optimiser: which parameters weight decay may touch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from spherify.errors import OptionError
from spherify.heads.angular import AngularHead
from spherify.layers.angular import AngularLayer


def parameter_groups(
    model: nn.Module,
    weight_decay: float = 0.05,
    lr: float | None = None,
    no_weight_decay: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Every trainable parameter once, in a group with weight decay and one without.

    Without: the weights of converted layers and of angular heads, whose length means nothing (decay would only make
    their effective learning rate grow, until ``eps`` counts); k, gains, biases and all that has one dimension or
    none; what the model's own ``no_weight_decay()`` names, as timm's models have it; and what the user names.

    Args:
        model: converted or not, also inside DDP or ``torch.compile``.
        weight_decay: of the first group.
        lr: of both groups; None leaves it to the optimiser.
        no_weight_decay: names or globs of further parameters.

    Returns:
        Dicts with ``params``, ``weight_decay`` and, if given, ``lr``, for any of torch's optimisers and for timm's
        ``create_optimizer_v2``; a group without parameters is left out.

    Raises:
        OptionError: the decay or learning rate is negative, a name matches no parameter, or nothing is trainable.
    """
    if weight_decay < 0 or (lr is not None and lr < 0):
        raise OptionError(f"weight_decay={weight_decay!r}, lr={lr!r}: neither may be negative.")
    spared = angular_weights(model) | named_by_model(model) | named_by_user(model, tuple(no_weight_decay))
    with_decay: list[nn.Parameter] = []
    without: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (without if parameter.dim() <= 1 or id(parameter) in spared else with_decay).append(parameter)
    if not with_decay and not without:
        raise OptionError(f"{type(model).__name__} has no trainable parameter.")
    common = {} if lr is None else {"lr": lr}
    groups: list[dict[str, Any]] = [
        {"params": with_decay, "weight_decay": weight_decay, **common},
        {"params": without, "weight_decay": 0.0, **common},
    ]
    return [group for group in groups if group["params"]]


def angular_weights(model: nn.Module) -> set[int]:
    """Ids of every parameter that an angular layer or head itself holds."""
    angular = (module for module in model.modules() if isinstance(module, (AngularLayer, AngularHead)))
    return {id(parameter) for module in angular for parameter in module.parameters(recurse=False)}


def named_by_model(model: nn.Module) -> set[int]:
    """What ``no_weight_decay()`` of the model, or of a part of it, names."""
    found: set[int] = set()
    for module in model.modules():
        ask = getattr(module, "no_weight_decay", None)
        if callable(ask):
            names = set(ask())
            found |= {id(parameter) for name, parameter in module.named_parameters() if name in names}
    return found


def named_by_user(model: nn.Module, patterns: tuple[str, ...]) -> set[int]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for pattern in patterns:
        names = [name for name in parameters if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise OptionError(f"no_weight_decay {pattern!r} matches no parameter of {type(model).__name__}.")
        found |= {id(parameters[name]) for name in names}
    return found
