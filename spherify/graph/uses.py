"""Where norms and activations run: one module may stand behind several layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from spherify.graph.flow import (
    ADD_NAMES,
    CAT_NAMES,
    DROPPING_NAMES,
    REARRANGING_NAMES,
    Flow,
    is_batch_norm,
    is_layer_call,
    name_of,
)
from spherify.graph.record import Recording
from spherify.graph.site import Site
from spherify.graph.view import View


def runs_after(model: nn.Module, recordings: Sequence[Recording], sites: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """For the norm and the activation behind each site, all that they run after, in words, each once.

    A layer is called by its name, be there a norm between or not; an addition "an addition", and so on.
    """
    paths = {path for site in sites for path in (site.norm, site.activation) if path is not None}
    layers = {site.name: model.get_submodule(site.name) for site in sites}
    view = View(model, layers, tuple(Flow(recording.graph, training=recording.training) for recording in recordings))
    found: dict[str, dict[str, None]] = {path: {} for path in paths}
    for flow in view.flows:
        for node in flow.select(flow.activations):
            path = node.meta.get("module")
            if path not in paths:
                continue
            for source in flow.sources(node):
                if source.meta.get("module") != path:
                    found[path][named(view, source)] = None
    return {path: tuple(names) for path, names in found.items()}


def named(view: View, node: fx.Node) -> str:
    """What made an activation, in words."""
    while name_of(node) in REARRANGING_NAMES | DROPPING_NAMES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if is_batch_norm(node):
        before = node.all_input_nodes[0]
        while name_of(before) in REARRANGING_NAMES and before.all_input_nodes:
            before = before.all_input_nodes[0]
        return named(view, before) if is_layer_call(before) else node.meta.get("module") or "a norm"
    if is_layer_call(node):
        return view.layer_of(node) or "a layer"
    if name_of(node) in ADD_NAMES:
        return "an addition"
    if name_of(node) in CAT_NAMES:
        return "a concatenation"
    return node.meta.get("module") or ("the input" if node.op == "placeholder" else "a function")
