"""When the loss is no number any more: which layer it began in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spherify.errors import SpherifyError


class NotFiniteError(SpherifyError):
    """The loss became infinite or no number; training cannot go on from here."""


def is_finite(loss: Tensor) -> bool:
    return bool(torch.isfinite(loss.detach()).all())


@torch.no_grad()
def first_non_finite(model: nn.Module, inputs: Tensor) -> str | None:
    """The layer that first gives something not finite for these inputs, in words; None where none does."""
    if not torch.isfinite(inputs).all():
        return "the inputs themselves"
    found: list[str] = []
    hooks = [
        module.register_forward_hook(noting(name, found))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def noting(name: str, found: list[str]) -> Any:
    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if all(torch.isfinite(value).all() for value in tensors_in(outputs)):
            return
        own = [key for key, value in module.named_parameters(recurse=False) if not torch.isfinite(value).all()]
        why = f", whose {' and '.join(own)} is not finite" if own else ""
        found.append(f"{name or 'the model'} ({type(module).__name__}{why})")

    return note


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)


def has_finite_weights(model: nn.Module) -> bool:
    """Of everything that a checkpoint would hold."""
    return all(bool(torch.isfinite(value).all()) for value in model.state_dict().values() if value.is_floating_point())
