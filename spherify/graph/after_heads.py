"""What happens to a classifier's logits before they leave the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import fx, nn

from spherify.graph.branches import MUL_NAMES
from spherify.graph.flow import ADD_NAMES, DROPPING_NAMES, REARRANGING_NAMES, Flow, name_of
from spherify.graph.heads import ACTIVATION_NAMES
from spherify.graph.record import Recording
from spherify.graph.site import Site
from spherify.graph.view import View

AVERAGING_NAMES = frozenset(
    {
        *("mean", "sum", "stack", "avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate", "upsample"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    }
)
HARMLESS_NAMES = frozenset(
    {
        *("getitem", "__getitem__", "select", "unbind", "narrow", "float", "double", "half", "bfloat16", "type"),
        *("type_as", "detach", "expand", "view_as", "reshape_as", "moveaxis", "swapaxes"),
    }
)
SCALING_NAMES = MUL_NAMES | {"div", "div_", "__truediv__", "__idiv__", "true_divide"}


@dataclass(frozen=True)
class Change:
    """A function behind a classifier that does more than average, rescale or rearrange its logits.

    Attributes:
        function: its name.
        module: path of the module that called it.
        is_activation: it bends each logit by itself: relu and its kin.
    """

    function: str
    module: str
    is_activation: bool


def changes_after(
    model: nn.Module, recordings: Sequence[Recording], sites: Sequence[Site]
) -> dict[str, tuple[Change, ...]]:
    """For each classifier, the functions between it and the output that change more than the scale of its logits.

    In train mode, where that could be recorded, since a loss reads what the model gives then.
    """
    layers = {site.name: model.get_submodule(site.name) for site in sites}
    flows = tuple(Flow(recording.graph, training=recording.training) for recording in recordings)
    view = View(model, layers, flows)
    flows = tuple(flow for flow in flows if flow.training) or flows
    heads = {site.name for site in sites if "@head" in site.roles}
    found: dict[str, dict[Change, None]] = {name: {} for name in heads}
    for flow in flows:
        calls = {call: view.layer_of(call) for call in flow.select(flow.layer_calls)}
        logits = {call for call, name in calls.items() if name in heads}
        behind = {node for node in flow.nodes if any(flow.has(flow.before(node), call) for call in logits)}
        for call in logits:
            name = calls[call]
            assert name is not None
            found[name] |= dict.fromkeys(
                Change(name_of(node), str(node.meta.get("module", "")), name_of(node) in ACTIVATION_NAMES)
                for node in flow.nodes
                if node in behind and node not in logits and flow.has(flow.before(node), call)
                if node.op == "call_function" and not keeps_ratios(flow, node, behind)
            )
    return {name: tuple(changes) for name, changes in found.items()}


def keeps_ratios(flow: Flow, node: fx.Node, logits: set[fx.Node]) -> bool:
    """Whether each class's logit is still one sum over the feature, scaled alike for all classes."""
    name = name_of(node)
    others = [source for source in node.all_input_nodes if source not in logits]
    if name in ADD_NAMES:
        return not others
    if name in SCALING_NAMES:
        return all(prod(source.meta.get("shape", (2,))) == 1 for source in others)
    return name in REARRANGING_NAMES | DROPPING_NAMES | AVERAGING_NAMES | HARMLESS_NAMES
