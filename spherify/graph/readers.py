"""Who reads a layer's weight past the layer's own forward, and what for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import fx, nn

from spherify.graph.flow import is_layer_call, weight_node
from spherify.graph.record import Recording

OWN_FORWARDS: tuple[type[nn.Module], ...] = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)


def names_by_object(model: nn.Module) -> dict[int, tuple[nn.Module, list[str]]]:
    """Every module object once, with all its names in the order of registration."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(name)
    return found


def readers_of_weights(
    model: nn.Module,
    recordings: Sequence[Recording],
    objects: dict[int, tuple[nn.Module, list[str]]],
) -> dict[str, dict[str, set[str]]]:
    """For each module, the other modules that read its Parameters, by path, and what each does with them.

    What they do is a set of ``direct`` (the weight argument of ``F.linear``), ``derived`` (that of another conv or
    linear function, or after it was changed), ``attention`` (the output projection of ``nn.MultiheadAttention``),
    ``fast path`` (by ``nn.TransformerEncoderLayer`` in eval mode, which no recording shows) and ``other``.
    """
    first_name = {id(module): names[0] for module, names in objects.values()}
    owners: dict[str, list[str]] = {}
    for module, names in objects.values():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                full = f"{names[0]}.{key}" if names[0] else key
                owners.setdefault(full, []).append(first_name[id(module)])
    shared: dict[int, list[str]] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(full)
    same = {full: group for group in shared.values() for full in group}

    readers: dict[str, dict[str, set[str]]] = {}
    for recording in recordings:
        for node in recording.graph.nodes:
            if node.op != "get_attr" or str(node.target) not in same:
                continue
            holders = {owner for full in same[str(node.target)] for owner in owners.get(full, ())}
            for user in node.users:
                reader = user.meta.get("module", "")
                if reader in holders and isinstance(model.get_submodule(reader), OWN_FORWARDS):
                    continue  # the layer's own forward, or that of one tied to it
                for holder in holders:
                    readers.setdefault(holder, {}).setdefault(reader, set()).add(use_of(node, user))
    for path, part in fast_paths(model):
        readers.setdefault(first_name[id(part)], {}).setdefault(path, set()).add("fast path")
    return readers


def fast_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths of torch's transformer encoders, each with every part whose weight its fast path takes."""
    for path, module in model.named_modules():
        layers = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        for layer in layers:
            if isinstance(layer, nn.TransformerEncoderLayer):
                for part in (layer.linear1, layer.linear2, layer.self_attn, layer.self_attn.out_proj):
                    yield path, part


def use_of(weight: fx.Node, user: fx.Node) -> str:
    """What a function does with a weight, or makes of it for another function of the same module."""
    if user.target is F.linear and weight_node(user) is weight:
        return "direct"
    if user.target is F.multi_head_attention_forward:
        return "attention"
    waiting, seen = [(weight, user)], set()
    while waiting:
        source, node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_layer_call(node):
            if weight_node(node) is source:
                return "derived"
            continue
        if node.meta.get("module") == user.meta.get("module"):
            waiting += [(node, following) for following in node.users]
    return "other"


def can_be_redirected(name: str, module: nn.Module, readers: dict[str, set[str]]) -> bool:
    """Whether all that others do with a weight could be done by calling the layer that it belongs to.

    They must stand above it, so that they can find it, and multiply by the weight as it is.
    """
    known = {"direct", "attention", "fast path"} if isinstance(module, nn.Linear) else {"fast path"}
    is_kind = isinstance(module, (nn.Linear, nn.MultiheadAttention))
    return is_kind and all(
        uses <= known and (not path or name.startswith(f"{path}.")) for path, uses in readers.items()
    )
