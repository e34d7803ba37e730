"""Which class becomes which, and the change itself: same object, same Parameters, another class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.errors import RewriteError
from spherify.layers.angular import AngularLayer
from spherify.layers.conv import SphereConv1d, SphereConv2d, SphereConv3d
from spherify.layers.linear import SphereLinear
from spherify.layers.removed import Removed
from spherify.plan.options import Options
from spherify.plan.plan import Decision

SWAPS: dict[type[nn.Module], type[AngularLayer]] = {  # exact types: a subclass may compute something else
    nn.Conv1d: SphereConv1d,
    nn.Conv2d: SphereConv2d,
    nn.Conv3d: SphereConv3d,
    nn.Linear: SphereLinear,
}
PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

ORIGIN = "_spherify_origin"  # attribute of a converted layer that says what it was


@dataclass(frozen=True)
class Origin:
    """What a converted layer was.

    Attributes:
        source_type: its class.
        dropped_bias: the bias that the conversion took away, the Parameter itself, else None.
        has_new_bias: the conversion gave it one.
    """

    source_type: type[nn.Module]
    dropped_bias: nn.Parameter | None
    has_new_bias: bool


def swap_(module: nn.Module, decision: Decision, options: Options) -> AngularLayer:
    """Change the class of ``module`` to its angular twin; its Parameters stay the very same objects.

    With a gain comes a bias, zero at first: together they are the paper's rescaled SphereNorm.

    Raises:
        RewriteError: there is no twin for its type.
    """
    source_type = type(module)
    if source_type not in SWAPS:
        known = ", ".join(kind.__name__ for kind in SWAPS)
        raise RewriteError(f"{decision.site.name} ({source_type.__name__}): nothing converts it, only {known}.")
    is_plain = options.operator == "identity"
    old_bias = module._parameters["bias"]
    module.__class__ = SWAPS[source_type]
    assert isinstance(module, AngularLayer)
    module.set_operator(
        options.operator,
        k=options.k,
        k_shared=options.k_shared,  # type: ignore[arg-type]
        eps=options.eps,
        gain=decision.has_gain and not is_plain,
    )
    dropped = old_bias if decision.drops_bias else None
    needs_bias = decision.adds_bias and not is_plain
    if dropped is not None:
        module.register_parameter("bias", None)
    elif needs_bias:
        module.bias = nn.Parameter(module.weight.detach().new_zeros(module.weight.shape[0]))
    for key in ("gain", "k_logit", *(["bias"] if needs_bias else [])):
        added = module._parameters.get(key)
        if added is not None:  # what is frozen stays frozen
            added.requires_grad_(module.weight.requires_grad)
    setattr(module, ORIGIN, Origin(source_type, dropped, needs_bias))
    return module


def swap_back_(module: AngularLayer) -> None:
    """Undo ``swap_``: the class, and the bias as it was."""
    origin: Origin = getattr(module, ORIGIN)
    if origin.dropped_bias is not None:
        origin.dropped_bias.data = origin.dropped_bias.data.to(module.weight)
        module.bias = origin.dropped_bias
    elif origin.has_new_bias:
        module.register_parameter("bias", None)
    for parameter in ("gain", "k_logit"):
        module._parameters.pop(parameter, None)
        module.__dict__.pop(parameter, None)
    for attribute in ("operator", "eps", "k_shared", "fixed_k", ORIGIN):
        del module.__dict__[attribute]
    module.__class__ = origin.source_type  # type: ignore[assignment]


def remove_(module: nn.Module, name: str) -> None:
    """Make a norm or an activation the identity, under all its names.

    Raises:
        RewriteError: it does more than normalise, in a way that is not known.
    """
    if isinstance(module, _BatchNorm) and type(module) not in PLAIN_NORMS and "act" not in module._modules:
        raise RewriteError(f"{name} ({type(module).__name__}): it may do more than normalise; use norm=keep.")
    source_type, words = type(module), module.extra_repr()
    stored = (dict(module._parameters), dict(module._buffers))
    module._parameters.clear()
    module._buffers.clear()
    module.__class__ = Removed
    assert isinstance(module, Removed)
    module.source_type, module.source_words, module.stored_state = source_type, words, stored


def put_back_(module: Removed, like: nn.Module) -> None:
    """Undo ``remove_``; what comes back stands on the device of ``like``."""
    parameters, buffers = module.stored_state
    device = next((parameter.device for parameter in like.parameters()), torch.device("cpu"))
    for tensor in (*parameters.values(), *buffers.values()):
        if tensor is not None:
            tensor.data = tensor.data.to(device)
    source_type = module.source_type
    for attribute in ("source_type", "source_words", "stored_state"):
        del module.__dict__[attribute]
    module.__class__ = source_type  # type: ignore[assignment]
    module._parameters.update(parameters)
    module._buffers.update(buffers)
