"""A network as the list of functions that one run of it called, for each size of batch."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from spherify.errors import ModelError
from spherify.graph.flow import Flow, is_layer_call
from spherify.graph.record import Recorder, one_line, tensors_in
from spherify.layers.angular import AngularLayer

IN_PLACE_BY_NAME = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__iand__", "__ior__")


@contextlib.contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Within it every angular layer is one call of its torch function, and the model is in eval mode."""
    layers = [layer for layer in model.modules() if isinstance(layer, AngularLayer)]
    states = [(layer.operator, layer.fixed_k, layer.k_logit) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for layer in layers:
            layer.operator, layer.fixed_k, layer.k_logit = "identity", None, None
        model.eval()
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer.operator, layer.fixed_k, layer.k_logit = state
        for module, mode in modes:
            module.training = mode


class KeepsConstants(Recorder):
    """Notes the value of every tensor that is neither a weight nor made in the run."""

    def node_of(self, value: Any) -> Any:
        node = super().node_of(value)
        if isinstance(node, fx.Node) and node.op == "get_attr" and not node.meta["is_weight"]:
            node.meta["constant"] = value
        return node


def graph_of(model: nn.Module, inputs: Tensor) -> fx.Graph:
    """The functions of one run in eval mode, converted layers as plain ones.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    recorder = KeepsConstants(model)
    recorder.bind(recorder.graph.placeholder("inputs"), inputs)
    try:
        with torch.no_grad(), as_plain(model), recorder.listening():
            output = model(inputs)
    except Exception as error:  # the model's own code, which may raise anything
        raise ModelError(
            f"{type(model).__name__} does not run on calibration images of shape {tuple(inputs.shape)} "
            f"({one_line(error)}); give images of the size it was made for."
        ) from error
    recorder.graph.output(tuple(recorder.node_of(tensor) for tensor in tensors_in(output)))
    return recorder.graph


def is_in_place(node: fx.Node) -> bool:
    """The function may write into its first argument."""
    name = getattr(node.target, "__name__", "")
    return name in IN_PLACE_BY_NAME or bool(node.kwargs.get("inplace")) or (name.endswith("_") and name[-2:] != "__")


class Recorded:
    """The nodes of a model's run in order; position by position the same for every size of batch.

    Args:
        graphs: of earlier runs on images of this shape, by size of batch; new ones are added.

    Attributes:
        nodes: of the first size of batch that was recorded.
        users: for each position, the positions that use its result.
        ancestors: for each position, all that it depends on and itself, one bit a position.
        activations: positions that depend on the input, as bits.
        outputs: positions of the model's outputs.
    """

    def __init__(self, model: nn.Module, example: Tensor, graphs: dict[int, fx.Graph] | None = None) -> None:
        self.model = model
        self.graphs = {} if graphs is None else graphs
        graph = self.graph_for(example)
        self.by_size = {len(example): list(graph.nodes)}
        self.nodes = self.by_size[len(example)]
        self.flow = Flow(graph)
        self.position = dict(self.flow.index)
        self.ancestors = self.flow.ancestors
        self.activations = self.flow.activations
        self.users = [[self.position[user] for user in node.users] for node in self.nodes]
        self.outputs = [self.position[node] for node in self.nodes[-1].all_input_nodes]

    def graph_for(self, batch: Tensor) -> fx.Graph:
        """Of a batch of this size, recorded where no earlier run was."""
        if len(batch) not in self.graphs:
            self.graphs[len(batch)] = graph_of(self.model, batch)
        return self.graphs[len(batch)]

    def prepare(self, batch: Tensor) -> None:
        """Record the run for the size of this batch, once.

        Raises:
            ModelError: another number of images calls other functions, or writes into parts of a tensor.
        """
        if len(batch) in self.by_size:
            return
        nodes = list(self.graph_for(batch).nodes)
        if [node.target for node in nodes] != [node.target for node in self.nodes]:
            raise ModelError(
                f"{type(self.model).__name__} calls other functions for {len(batch)} images than for "
                f"{len(next(iter(self.by_size)))}; give batches of one size."
            )
        self.by_size[len(batch)] = nodes
        self.position.update((node, position) for position, node in enumerate(nodes))

    def is_activation(self, position: int) -> bool:
        return bool(self.activations >> position & 1)

    def depends_on(self, position: int, other: int) -> bool:
        return bool(self.ancestors[position] >> other & 1)

    def layer_calls(self) -> list[int]:
        """Positions of conv and linear calls on activations."""
        calls = (self.position[node] for node in self.nodes if is_layer_call(node))
        return [position for position in calls if self.is_activation(position)]

    def parameter(self, name: str) -> Any:
        """The Parameter or buffer of a qualified name."""
        return operator.attrgetter(name)(self.model)

    def path(self, position: int) -> str:
        """Of the module that called this function."""
        return str(self.nodes[position].meta.get("module", ""))


def aligned(first: Recorded, second: Recorded) -> dict[int, int]:
    """Positions in ``first`` and those in ``second`` that call the same function in the same module.

    Both are runs of one architecture; norms, activations and biases may be missing in one of them.
    """
    waiting: dict[tuple[str, str], list[int]] = {}
    for position, node in enumerate(second.nodes):
        waiting.setdefault(key_of(node), []).append(position)
    counts = {key: len(positions) for key, positions in waiting.items()}
    own: dict[tuple[str, str], int] = {}
    for node in first.nodes:
        own[key_of(node)] = own.get(key_of(node), 0) + 1
    pairs = {}
    for position, node in enumerate(first.nodes):
        key = key_of(node)
        if node.op != "get_attr" and counts.get(key) == own[key]:
            pairs[position] = waiting[key].pop(0)
    return pairs


def key_of(node: fx.Node) -> tuple[str, str]:
    name = getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else node.op
    return str(node.meta.get("module", "")), name.strip("_")


def sizes_of(batches: Sequence[Tensor]) -> dict[int, Tensor]:
    """One batch of each size."""
    return {len(batch): batch for batch in reversed(batches)}
