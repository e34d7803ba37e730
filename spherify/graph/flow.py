"""Questions to a recorded graph: what multiplies, what adds, what comes before what."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import fx

CONV_FUNCTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})
TRANSPOSED_FUNCTIONS = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})
LAYER_FUNCTIONS = CONV_FUNCTIONS | TRANSPOSED_FUNCTIONS | {F.linear, F.bilinear}
PRODUCT_NAMES = frozenset(
    {
        *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"),
        *("scaled_dot_product_attention", "multi_head_attention_forward"),
    }
)
ADD_NAMES = frozenset({"add", "__add__", "__radd__", "__iadd__", "add_"})
CAT_NAMES = frozenset({"cat", "concat", "concatenate", "stack"})
REARRANGING_NAMES = frozenset(
    {
        *("flatten", "reshape", "view", "transpose", "permute", "contiguous", "squeeze", "unsqueeze"),
        *("unflatten", "movedim", "t", "to", "clone"),
    }
)
DROPPING_NAMES = frozenset({"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"})


def name_of(node: fx.Node) -> str:
    """The bare name of the function behind a node, "" for weights and inputs."""
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def is_layer_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in LAYER_FUNCTIONS


def weight_node(node: fx.Node) -> fx.Node | None:
    """The node of the weight of a conv or linear call."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return weight if isinstance(weight, fx.Node) else None


def input_node(node: fx.Node) -> fx.Node | None:
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def bits(mask: int) -> Iterator[int]:
    """Positions of the ones."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Flow:
    """A recorded graph with its ancestor sets, held as integers with one bit a node."""

    def __init__(self, graph: fx.Graph, *, training: bool = False) -> None:
        self.training = training
        self.nodes = list(graph.nodes)
        self.index = {node: index for index, node in enumerate(self.nodes)}

    @cached_property
    def ancestors(self) -> list[int]:
        """For each node, the set of the nodes it depends on, itself included."""
        sets: list[int] = []
        for index, node in enumerate(self.nodes):
            mine = 1 << index
            for source in node.all_input_nodes:
                mine |= sets[self.index[source]]
            sets.append(mine)
        return sets

    @cached_property
    def activations(self) -> int:
        """The nodes that depend on an input of the model."""
        inputs = self.mask(node for node in self.nodes if node.op == "placeholder")
        return self.mask(node for node, mine in zip(self.nodes, self.ancestors, strict=True) if mine & inputs)

    @cached_property
    def layer_calls(self) -> int:
        return self.mask(filter(is_layer_call, self.nodes))

    @cached_property
    def products(self) -> int:
        """Everything with multiplications by weights or between activations: convs, linears, matmuls, attention."""
        return self.layer_calls | self.mask(node for node in self.nodes if name_of(node) in PRODUCT_NAMES)

    @cached_property
    def resizes(self) -> int:
        return self.mask(node for node in self.nodes if name_of(node) in ("interpolate", "upsample", "grid_sample"))

    def mask(self, nodes: Iterable[fx.Node]) -> int:
        total = 0
        for node in nodes:
            total |= 1 << self.index[node]
        return total

    def before(self, node: fx.Node) -> int:
        return self.ancestors[self.index[node]]

    def has(self, mask: int, node: fx.Node) -> bool:
        return bool(mask >> self.index[node] & 1)

    def select(self, mask: int) -> list[fx.Node]:
        return [self.nodes[index] for index in bits(mask)]

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The activations among a node's inputs."""
        return [source for source in node.all_input_nodes if self.has(self.activations, source)]

    def is_merge(self, node: fx.Node) -> bool:
        """An add or a concatenation of at least two activations."""
        return name_of(node) in ADD_NAMES | CAT_NAMES and len(self.sources(node)) > 1

    def longest_chain(self, counted: int, inside: int) -> int:
        """How many nodes of ``counted`` at most follow one another inside a set."""
        lengths: dict[fx.Node, int] = {}
        for node in self.select(inside):
            before = max((lengths.get(source, 0) for source in node.all_input_nodes), default=0)
            lengths[node] = before + self.has(counted, node)
        return max(lengths.values(), default=0)

    def consumers(self, node: fx.Node, through: frozenset[str] = REARRANGING_NAMES) -> list[fx.Node]:
        """The nodes that compute with a node's result, looked for behind pure rearrangements."""
        while len(node.users) == 1 and name_of(next(iter(node.users))) in through:
            node = next(iter(node.users))
        return list(node.users)


def is_batch_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)


def is_getitem(node: fx.Node) -> bool:
    return node.target is operator.getitem
