"""Models that are refused before anything is done, each with what to do instead."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from spherify.errors import ModelError
from spherify.heads.angular import AngularHead
from spherify.layers.angular import AngularLayer
from spherify.rewrite.swaps import ORIGIN

WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
QUANTISED_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torch.ao.nn.qat", "torch.nn.quantized")


def is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def check_model(model: object) -> nn.Module:
    """The model, if it is one that can be converted in this form.

    Raises:
        ModelError: it is wrapped, compiled, scripted, quantised, lazy, already converted, or no module at all.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"got a {type(model).__name__}; give a model's name or an nn.Module.")
    kind = type(model).__name__
    if kind in WRAPPERS:
        raise ModelError(f"{kind}: convert the model inside (model.module), then wrap the result.")
    compiled = [name or kind for name, module in model.named_modules() if is_compiled(module)]
    if compiled:
        raise ModelError(f"{compiled[0]} is compiled; convert the plain model, then call torch.compile on the result.")
    scripted = [name or kind for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise ModelError(f"{scripted[0]} is scripted; convert the Python model, then script or export the result.")
    for name, module in model.named_modules():
        if type(module).__module__.startswith(QUANTISED_MODULES):
            raise ModelError(
                f"{name} ({type(module).__name__}) is quantised; convert the floating-point model instead."
            )
        if type(module).__name__ in WRAPPERS:
            raise ModelError(f"{name} is a {type(module).__name__}; convert the model before it is wrapped.")
        if isinstance(module, AngularLayer) or (isinstance(module, AngularHead) and hasattr(module, ORIGIN)):
            raise ModelError(
                f"{kind} is already converted: {name or 'it'} is a {type(module).__name__}; "
                "call unspherify(model) first."
            )
        if any(is_lazy(tensor) for tensor in module._parameters.values()):
            raise ModelError(f"{name or kind} is lazy and has no shape yet; run one batch through the model first.")
    return model
