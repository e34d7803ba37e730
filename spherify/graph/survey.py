"""From recorded runs to sites: every layer with a weight, and its facts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from spherify.graph.flow import Flow, is_batch_norm
from spherify.graph.readers import can_be_redirected, names_by_object, readers_of_weights
from spherify.graph.record import Recording
from spherify.graph.roles import ROLES, View
from spherify.graph.site import KINDS, Site

LAYER_TYPES: tuple[type[nn.Module], ...] = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
WEIGHT_HOLDERS: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
ACTIVATION_MODULES = ("torch.nn.modules.activation", "timm.layers.activations")
NOT_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)


def survey(model: nn.Module, recordings: Sequence[Recording]) -> tuple[Site, ...]:
    """Every site of a model, in the order in which its modules are registered.

    A site is a conv or linear module, or any other module whose Parameter a conv or linear function multiplies by:
    attention with a packed weight, a recurrent layer, a convolution with a routed weight.
    """
    objects = names_by_object(model)
    flows = tuple(Flow(recording.graph, training=recording.training) for recording in recordings)
    readers = readers_of_weights(model, recordings, objects)
    functional = {path for path, by in readers.items() if any(uses & {"direct", "derived"} for uses in by.values())}
    layers = {
        names[0]: module
        for module, names in objects.values()
        if isinstance(module, LAYER_TYPES + WEIGHT_HOLDERS)
        or (names[0] in functional and not isinstance(module, parametrize.ParametrizationList))
    }
    view = View(model, {name: module for name, module in layers.items() if isinstance(module, LAYER_TYPES)}, flows)
    roles = {role: find(view) for role, find in ROLES.items()}
    aliases = {names[0]: tuple(names[1:]) for _, names in objects.values()}
    return tuple(
        make_site(
            name,
            module,
            aliases=aliases[name],
            recordings=recordings,
            readers={path: uses for path, uses in readers.get(name, {}).items() if path != name},
            followers=follower_paths(view, name),
            roles=frozenset(role for role, found in roles.items() if name in found),
        )
        for name, module in layers.items()
    )


def make_site(
    name: str,
    module: nn.Module,
    *,
    aliases: tuple[str, ...],
    recordings: Sequence[Recording],
    readers: dict[str, set[str]],
    followers: tuple[str | None, str | None],
    roles: frozenset[str],
) -> Site:
    weight = main_weight(module)
    shape = tuple(weight.shape) if weight is not None else ()
    calls = {recording.training: recording.calls.get(name, 0) for recording in recordings}
    return Site(
        name=name,
        aliases=aliases,
        source_type=type(module),
        kind=next((kind for base, kind in KINDS.items() if isinstance(module, base)), "other"),
        shape=shape,
        fan_in=math.prod(shape[1:]) if shape else 0,
        groups=getattr(module, "groups", 1),
        has_bias=isinstance(getattr(module, "bias", None), Tensor),
        calls_eval=calls.get(False, 0),
        calls_train=calls.get(True, 0),
        read_by=tuple(sorted(readers)),
        stood_in_by=tuple(sorted(readers)) if can_be_redirected(name, module, readers) else (),
        norm=followers[0],
        activation=followers[1],
        roles=roles,
        obstacle=obstacle_in(module, weight),
    )


def main_weight(module: nn.Module) -> Tensor | None:
    """The Parameter a site is known by: ``weight``, else its largest of two or more dimensions."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    return max(own, key=Tensor.numel, default=None)


def obstacle_in(module: nn.Module, weight: Tensor | None) -> str | None:
    """What stands in the way of converting this very object, whatever its type."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrised; remove the parametrisation first (torch.nn.utils.parametrize)"
    if "weight" not in module._parameters and isinstance(module, LAYER_TYPES):
        return "its weight is computed by a hook (weight_norm or spectral_norm); remove it first"
    if isinstance(module, nn.MultiheadAttention) and not has_plain_projections(module):
        return "it has separate weights for keys and values, bias_k, or add_zero_attn"
    if "forward" in vars(module):
        return "its forward was replaced on the object, and a conversion would lose that"
    if weight is not None and not weight.is_floating_point():
        return f"its weight is of type {weight.dtype}, and angles need floating-point numbers"
    return None


def has_plain_projections(attention: nn.MultiheadAttention) -> bool:
    return attention.in_proj_weight is not None and attention.bias_k is None and not attention.add_zero_attn


def follower_paths(view: View, name: str) -> tuple[str | None, str | None]:
    """Paths of the BatchNorm and of the activation behind a layer, where every call of it is followed alike."""
    norms: set[str | None] = set()
    activations: set[str | None] = set()
    for flow in view.flows:
        for call in view.calls[flow].get(name, ()):
            after = flow.consumers(call)
            norm = after[0] if len(after) == 1 and is_batch_norm(after[0]) else None
            norms.add(norm.meta["module"] if norm is not None else None)
            activations.add(activation_path(view.model, after if norm is None else flow.consumers(norm)))
    return only(norms), only(activations)


def activation_path(model: nn.Module, nodes: Iterable[fx.Node]) -> str | None:
    """The activation module to which all of these nodes belong; some are made of several functions."""
    path = only(node.meta.get("module") for node in nodes)
    return path if path and is_activation(model.get_submodule(path)) else None


def is_activation(module: nn.Module) -> bool:
    """One of torch's or timm's activation modules."""
    return type(module).__module__.startswith(ACTIVATION_MODULES) and not isinstance(module, NOT_ACTIVATIONS)


def only(values: Iterable[str | None]) -> str | None:
    """The single value, or None where there are several or none."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
