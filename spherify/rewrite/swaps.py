"""Which class becomes which, and the change itself: same object, same Parameters, another class."""

from __future__ import annotations

from dataclasses import dataclass

import timm.layers
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.errors import OptionError, RewriteError
from spherify.layers.angular import AngularLayer
from spherify.layers.attention import SphereMultiheadAttention
from spherify.layers.conv import SphereConv1d, SphereConv2d, SphereConv3d
from spherify.layers.linear import SphereLinear
from spherify.layers.removed import Removed
from spherify.layers.timm_convs import (
    SphereConv2dSame,
    SphereScaledStdConv2d,
    SphereScaledStdConv2dSame,
    SphereStdConv2d,
    SphereStdConv2dSame,
)
from spherify.plan.decision import Decision
from spherify.plan.options import Options


class Twins(dict[type[nn.Module], type[AngularLayer]]):
    """Which class becomes which. A subclass that computes just what its parent does counts as its parent."""

    def twin_of(self, kind: type[nn.Module]) -> type[AngularLayer] | None:
        """The angular twin of a class, or None where the class may compute something else than what is known."""
        for parent in kind.__mro__:
            if parent in self:
                return self[parent] if computes_the_same(kind, parent) else None
        return None

    def converts(self, kind: type[nn.Module]) -> bool:
        return self.twin_of(kind) is not None


def computes_the_same(kind: type[nn.Module], parent: type[nn.Module]) -> bool:
    methods = ("forward", "_conv_forward", "__call__")
    return all(getattr(kind, name, None) is getattr(parent, name, None) for name in methods)


SWAPS = Twins(
    {
        nn.Conv1d: SphereConv1d,
        nn.Conv2d: SphereConv2d,
        nn.Conv3d: SphereConv3d,
        nn.Linear: SphereLinear,
        nn.MultiheadAttention: SphereMultiheadAttention,
        timm.layers.Linear: SphereLinear,  # a plain linear layer, but for TorchScript
        timm.layers.Conv2dSame: SphereConv2dSame,
        timm.layers.StdConv2d: SphereStdConv2d,
        timm.layers.StdConv2dSame: SphereStdConv2dSame,
        timm.layers.ScaledStdConv2d: SphereScaledStdConv2d,
        timm.layers.ScaledStdConv2dSame: SphereScaledStdConv2dSame,
    }
)


def register_twin(kind: type[nn.Module], twin: type[AngularLayer]) -> None:
    """Have ``spherify`` convert layers of class ``kind`` to ``twin`` from now on.

    The layer's object changes its class, so ``twin`` must work on the attributes of ``kind``. A convolution that
    pads or computes its weight in its own way overrides ``padded`` or ``filters``::

        class SphereCentredConv2d(SphereConv2d):
            def filters(self):
                return self.weight - self.weight.mean((1, 2, 3), keepdim=True)

        register_twin(CentredConv2d, SphereCentredConv2d)

    Raises:
        OptionError: ``kind`` is no module class, or ``twin`` no angular layer class.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise OptionError(f"register_twin: {kind!r} is no class of modules.")
    if not (isinstance(twin, type) and issubclass(twin, AngularLayer)):
        raise OptionError(f"register_twin: {twin!r} is no angular layer; derive it from SphereConv2d or SphereLinear.")
    SWAPS[kind] = twin


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
    twin = SWAPS.twin_of(source_type)
    if twin is None:
        known = ", ".join(kind.__name__ for kind in SWAPS)
        raise RewriteError(f"{decision.site.name} ({source_type.__name__}): nothing converts it, only {known}.")
    is_plain = options.operator == "identity"
    old_bias, old_names = module._parameters.get("bias"), set(module._parameters)
    module.__class__ = twin
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
    for key, parameter in module._parameters.items():
        is_new = key not in old_names or (key == "bias" and needs_bias)
        if is_new and parameter is not None:
            parameter.requires_grad_(module.weight.requires_grad)  # what is frozen stays frozen
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
    module.clear_operator()
    delattr(module, ORIGIN)
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
