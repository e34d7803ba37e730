"""What a role may look at: the model, its layers by name, and the recorded runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from spherify.graph.flow import Flow, weight_node


@dataclass(frozen=True)
class View:
    """What a role may look at: the model, its layers by name, and the recorded runs."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    flows: tuple[Flow, ...]

    def layer_of(self, node: fx.Node) -> str | None:
        """Name of the layer behind a conv or linear call: the one that issued it, or the owner of its weight."""
        weight = weight_node(node)
        owner = str(weight.target).rpartition(".")[0] if weight is not None and weight.op == "get_attr" else None
        return next((name for name in (node.meta.get("module"), owner) if name in self.modules), None)

    @cached_property
    def calls(self) -> Mapping[Flow, Mapping[str, list[fx.Node]]]:
        """In each run, the conv and linear calls of each layer."""
        found: dict[Flow, dict[str, list[fx.Node]]] = {}
        for flow in self.flows:
            of_layer = found.setdefault(flow, {})
            for call in flow.select(flow.layer_calls):
                name = self.layer_of(call)
                if name is not None:
                    of_layer.setdefault(name, []).append(call)
        return found

    def layers_of(self, find: Callable[[Flow], Iterable[fx.Node]]) -> set[str]:
        """Names of the layers behind the calls that ``find`` yields, over all runs."""
        names = {self.layer_of(call) for flow in self.flows for call in find(flow)}
        return {name for name in names if name is not None}
