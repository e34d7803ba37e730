"""A copy of a model without its data, for trial runs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from spherify.errors import ModelError
from spherify.graph.blanks import PLAIN_TYPES, blank_like

HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONTAINERS = (dict, OrderedDict, list, set)
UNCHANGEABLE = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, type, FunctionType, BuiltinFunctionType),
        *(torch.dtype, torch.device, torch.Size),
    }
)
COPY_METHODS = ("__reduce_ex__", "__reduce__", "__getstate__")  # what ``copy.deepcopy`` asks for
LEFT_OUT = "_compiled_call_impl"  # by nn.Module.__getstate__


def copy_without_data(model: nn.Module, device: str) -> nn.Module:
    """A copy whose tensors stand on ``device`` (``meta`` costs no memory) and whose users' hooks are left out.

    Hooks that compute a weight (``weight_norm``, ``spectral_norm`` of ``torch.nn.utils``) stay. Equal to what
    ``copy.deepcopy`` gives, but faster for a tree of modules.

    Raises:
        ModelError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    plain: list[nn.Module] = []
    for module in model.modules():
        for table in HOOK_TABLES:
            if hooks := module.__dict__[table]:
                kept = [(key, hook) for key, hook in hooks.items() if isinstance(hook, (WeightNorm, SpectralNorm))]
                memo[id(hooks)] = OrderedDict(kept)
        for value in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                moved = moved_to(value, device)
                is_parameter = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved
        if has_plain_state(type(module)):
            memo[id(module)] = object.__new__(type(module))
            plain.append(module)
    try:
        for module in plain:
            fill(vars(memo[id(module)]), vars(module), memo)
            vars(memo[id(module)]).pop(LEFT_OUT, None)
        return copied(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied for a trial run ({one_line(error)}); "
            "keep what cannot be copied out of the module's attributes."
        ) from error


def has_plain_state(kind: type[nn.Module]) -> bool:
    """Whether ``copy.deepcopy`` would make an object of the class without a call and fill its ``__dict__``."""
    if hasattr(kind, "__deepcopy__") or any(vars(parent).get("__slots__") for parent in kind.__mro__):
        return False
    if kind.__new__ is not object.__new__ or any(
        getattr(kind, name) != getattr(nn.Module, name) for name in COPY_METHODS
    ):
        return False
    # torch's own add what old files lack; once torch.compile has run, that of nn.Module is torch._dynamo's
    return kind.__setstate__.__module__.startswith("torch.")


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(value, memo)``, faster for what modules are mostly made of."""
    kind = type(value)
    if kind in UNCHANGEABLE:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is tuple and all(type(item) in UNCHANGEABLE for item in value):
        return value
    if kind not in CONTAINERS:
        return copy.deepcopy(value, memo)
    twin: Any = kind()
    memo[id(value)] = twin
    if kind is list:
        twin.extend([copied(item, memo) for item in value])
    elif kind is set:
        twin.update([copied(item, memo) for item in value])
    elif value:
        fill(twin, value, memo)
    return twin


def fill(twin: dict, original: dict, memo: dict[int, Any]) -> None:
    for key, value in original.items():
        own_key = key if type(key) is str else copied(key, memo)
        twin[own_key] = value if type(value) in UNCHANGEABLE else copied(value, memo)


def moved_to(value: Tensor, device: str) -> Tensor:
    """A copy on ``device``; what has no data becomes zeros there."""
    if device == "meta":
        return blank_like(value) if type(value) in PLAIN_TYPES else torch.empty_like(value, device="meta")
    if value.is_meta:
        return torch.zeros_like(value, device=device)
    return value.detach().to(device, copy=True)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 160 else text[:157] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
