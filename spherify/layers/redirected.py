"""Modules that multiplied by a layer's weight themselves, and now call the layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spherify.layers.linear import SphereLinear


class CallTheLayer(TorchFunctionMode):
    """While it is on, ``F.linear`` with the weight of a converted layer below ``owner`` is a call of that layer.

    Compiles and exports without a graph break. ``nn.TransformerEncoderLayer`` leaves out its fast path, which would
    read the weights itself, because a mode is on.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.layers = [part for part in owner.modules() if isinstance(part, SphereLinear)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            if weight is layer.weight:
                return layer(input, bias=bias)
        return F.linear(input, weight, bias)


class Redirected(nn.Module):
    """Mixed into the class of such a module by ``redirected_class``."""

    redirected_from: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with CallTheLayer(self):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return (new_redirected, (self.redirected_from,), *reduced[2:])


MADE: dict[type[nn.Module], type[Redirected]] = {}


def redirected_class(kind: type[nn.Module]) -> type[Redirected]:
    """A subclass of ``kind`` under its name, made once; it can be pickled though no module holds it."""
    if kind not in MADE:
        namespace = {"redirected_from": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
        MADE[kind] = type(kind.__name__, (Redirected, kind), namespace)
    return MADE[kind]


def new_redirected(kind: type[nn.Module]) -> Redirected:
    """An empty module for ``pickle`` and ``copy`` to fill."""
    made = redirected_class(kind)
    return made.__new__(made)
