"""What slow functions return on tensors without data: their shape rules, for torch computes them in Python, slowly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Answer = Tensor | tuple[Tensor, ...] | None  # None: ask torch itself


def shape_of_input(x: Tensor, inplace: bool = False) -> Answer:
    """Activations: the shape and type of the input; in place, the input itself."""
    if not x.is_floating_point():
        return None
    return x if inplace else torch.empty_like(x)


def shape_of_gelu(x: Tensor, approximate: str = "none") -> Answer:
    return torch.empty_like(x) if x.is_floating_point() else None


def shape_of_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Answer:
    """Torch is asked where it would complain: one value a channel in training, another number of channels."""
    if x.dim() < 2 or (training and x.numel() == x.shape[1]):
        return None
    vectors = [vector for vector in (running_mean, running_var, weight, bias) if vector is not None]
    return torch.empty_like(x) if all(len(vector) == x.shape[1] for vector in vectors) else None


def shape_of_layer_norm(x: Tensor, normalized_shape: Any, *args: Any, **kwargs: Any) -> Answer:
    fits = tuple(x.shape[-len(normalized_shape) :]) == tuple(normalized_shape)
    return torch.empty_like(x) if fits and x.is_floating_point() else None


def shape_of_lstm(x: Any, state: Any, weights: Any, *flags: Any, **kwargs: Any) -> Answer:
    """A padded sequence, without projection; torch would go through it step by step."""
    if kwargs or len(flags) != 6 or not isinstance(state, tuple):
        return None
    _, layers, _, _, bidirectional, batch_first = flags
    hidden, cell = state
    directions = 2 if bidirectional else 1
    batch = x.shape[0 if batch_first else 1]
    sizes = (layers * directions, batch)
    if x.dim() != 3 or tuple(hidden.shape[:2]) != sizes or hidden.shape != cell.shape:
        return None
    if weights[0].shape[1] != x.shape[2]:
        return None
    out = x.new_empty(*x.shape[:2], directions * hidden.shape[2])
    return out, torch.empty_like(hidden), torch.empty_like(cell)


SHAPE_RULES: Mapping[Any, Callable[..., Answer]] = {
    F.batch_norm: shape_of_batch_norm,
    F.layer_norm: shape_of_layer_norm,
    F.relu: shape_of_input,
    F.relu6: shape_of_input,
    F.silu: shape_of_input,
    F.hardswish: shape_of_input,
    F.hardsigmoid: shape_of_input,
    F.gelu: shape_of_gelu,
    torch.lstm: shape_of_lstm,
}


def answer(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Answer:
    """The result of a function on meta tensors by its rule, or None where it has none or torch should be asked."""
    rule = SHAPE_RULES.get(function)
    if rule is None or not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
        return None
    try:
        return rule(*args, **kwargs)
    except (TypeError, ValueError, IndexError, AttributeError):
        return None  # called as no rule expects: torch will say what is wrong
