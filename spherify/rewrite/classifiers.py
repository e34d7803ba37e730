"""Classifiers: another number of classes, an angular head, and both taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import timm.layers
from torch import Tensor, nn

from spherify.errors import RewriteError
from spherify.heads.angular import AngularConv1d, AngularConv2d, AngularConv3d, AngularHead, AngularLinear
from spherify.plan.plan import Decision
from spherify.rewrite.swaps import ORIGIN, Origin, computes_the_same

HEAD_TWINS: dict[type[nn.Module], type[AngularHead]] = {
    nn.Linear: AngularLinear,
    nn.Conv1d: AngularConv1d,
    nn.Conv2d: AngularConv2d,
    nn.Conv3d: AngularConv3d,
    timm.layers.Linear: AngularLinear,  # a plain linear layer, but for TorchScript
}

RESIZED = "_spherify_resized"  # attribute of a classifier that was given another size: what it had before
COUNT = "num_classes"


def head_twin_of(kind: type[nn.Module]) -> type[AngularHead] | None:
    """The angular twin of a class of classifiers, or None where it may compute something else."""
    for parent in kind.__mro__:
        if parent in HEAD_TWINS:
            return HEAD_TWINS[parent] if computes_the_same(kind, parent) else None
    return None


def becomes_head(kind: type[nn.Module]) -> bool:
    return head_twin_of(kind) is not None


def swap_head_(module: nn.Module, decision: Decision) -> None:
    """Change the class of a classifier to its angular twin and take off its bias; its weight stays the very same.

    Raises:
        RewriteError: there is no twin for its type.
    """
    source_type, twin = type(module), head_twin_of(type(module))
    if twin is None or decision.head is None:
        raise RewriteError(f"{decision.site.name} ({source_type.__name__}): it cannot be an angular head.")
    bias = module._parameters.get("bias")
    module.__class__ = twin
    assert isinstance(module, AngularHead)
    module.take_settings(decision.head)
    module.register_parameter("bias", None)
    setattr(module, ORIGIN, Origin(source_type, bias, False))


def swap_head_back_(module: AngularHead) -> None:
    """Undo ``swap_head_``: the class, and the bias as it was."""
    origin: Origin = getattr(module, ORIGIN)
    if origin.dropped_bias is not None:
        origin.dropped_bias.data = origin.dropped_bias.data.to(module.weight)
        module.bias = origin.dropped_bias
    del module.__dict__["settings"]
    delattr(module, ORIGIN)
    module.__class__ = origin.source_type  # type: ignore[assignment]


def biases_taken(model: nn.Module) -> dict[str, Tensor]:
    """The biases that angular heads lost, by the path of the head: what a folder keeps so that undo can return them."""
    heads = {name: part for name, part in model.named_modules() if isinstance(part, AngularHead)}
    origins = {name: getattr(part, ORIGIN) for name, part in heads.items() if hasattr(part, ORIGIN)}
    return {name: origin.dropped_bias for name, origin in origins.items() if origin.dropped_bias is not None}


def take_biases_(model: nn.Module, biases: Mapping[str, Tensor]) -> None:
    """Have the heads keep these biases as what they lost, for undo."""
    for name, bias in biases.items():
        head = model.get_submodule(name)
        setattr(head, ORIGIN, replace(getattr(head, ORIGIN), dropped_bias=nn.Parameter(bias)))


@dataclass(frozen=True)
class Resized:
    """What a classifier was before it got another size.

    Attributes:
        classes: how many it had.
        weight, bias: the Parameters themselves.
        counts: paths of the modules whose ``num_classes`` followed.
    """

    classes: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    counts: tuple[str, ...]


def width_attribute(module: nn.Module) -> str:
    return "out_features" if hasattr(module, "out_features") else "out_channels"


def resize_(model: nn.Module, name: str, classes: int) -> None:
    """Give a classifier new class weights of another number, and tell the modules around it their ``num_classes``."""
    module = model.get_submodule(name)
    weight, bias = module.weight, module._parameters.get("bias")
    assert isinstance(weight, nn.Parameter)
    old = weight.shape[0]
    if old == classes:
        return
    steps = name.split(".") if name else []
    around = [".".join(steps[:count]) for count in range(len(steps))]
    counts = tuple(path for path in around if getattr(model.get_submodule(path), COUNT, None) == old)
    setattr(module, RESIZED, Resized(old, weight, bias, counts))
    module.weight = nn.Parameter(weight.detach().new_empty(classes, *weight.shape[1:]))
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().new_empty(classes))
    set_width(model, module, classes, counts)
    module.reset_parameters()  # type: ignore[operator]


def resize_back_(model: nn.Module, module: nn.Module) -> None:
    """Undo ``resize_``: the old class weights, on the device and in the type of the new ones."""
    resized: Resized = module.__dict__.pop(RESIZED)
    like = module.weight
    assert isinstance(like, Tensor)
    module.weight, module.bias = resized.weight, resized.bias  # type: ignore[assignment]
    for parameter in (resized.weight, resized.bias):
        if parameter is not None:
            parameter.data = parameter.data.to(like)
    set_width(model, module, resized.classes, resized.counts)


def set_width(model: nn.Module, module: nn.Module, classes: int, counts: tuple[str, ...]) -> None:
    setattr(module, width_attribute(module), classes)
    for path in counts:
        setattr(model.get_submodule(path), COUNT, classes)
