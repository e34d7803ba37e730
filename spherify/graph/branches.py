"""Layers on side branches: attention, gates, re-parameterisation branches."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import fx

from spherify.graph.flow import (
    ADD_NAMES,
    DROPPING_NAMES,
    REARRANGING_NAMES,
    Flow,
    is_batch_norm,
    is_layer_call,
    name_of,
)

MUL_NAMES = frozenset({"mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply"})
SQUASHING_NAMES = frozenset(
    {"sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "hard_sigmoid", "softmax", "tanh", "relu6"}
)
MIXING_NAMES = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})
ATTENTION_NAMES = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})


def attention_calls(flow: Flow) -> Iterator[fx.Node]:
    """Layer calls next to a product of two activations: what makes queries, keys and values, and what follows."""
    for product in flow.nodes:
        name = name_of(product)
        if name not in ATTENTION_NAMES and not (name in MIXING_NAMES and len(flow.sources(product)) > 1):
            continue
        yield from nearest_layers(flow, product, forward=False)
        yield from nearest_layers(flow, product, forward=True)


def nearest_layers(flow: Flow, start: fx.Node, *, forward: bool) -> Iterator[fx.Node]:
    """The layer calls met first on every path from a node, not looked for behind a residual add."""
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        for following in node.users if forward else node.all_input_nodes:
            if following in seen or not flow.has(flow.activations, following):
                continue
            seen.add(following)
            if flow.has(flow.layer_calls, following):
                yield following
            elif not is_residual_add(flow, following):
                waiting.append(following)


def is_residual_add(flow: Flow, node: fx.Node) -> bool:
    """An add of an activation and something computed from it."""
    sources = flow.sources(node)
    if name_of(node) not in ADD_NAMES or len(sources) != 2:
        return False
    one, two = (flow.before(source) for source in sources)
    return any(all(name_of(own) in REARRANGING_NAMES for own in flow.select(side)) for side in (one & ~two, two & ~one))


def gate_calls(flow: Flow) -> Iterator[fx.Node]:
    """Layer calls on the side of a multiplication that says how much of the other side passes.

    Of what the two factors have each for itself, one side alone has layers (squeeze-excite: the other side is what
    they were computed from), or one side alone ends in a squashing function. And nothing of a gate gets past the
    multiplication: what else a recurrent cell is computed from is not a gate.
    """
    for product in flow.nodes:
        if not is_product(flow, product):
            continue
        sources = flow.sources(product)
        one, two = (flow.before(source) for source in sources)
        sides = [(one & ~two & flow.layer_calls, sources[0]), (two & ~one & flow.layer_calls, sources[1])]
        with_layers = [layers for layers, _ in sides if layers]
        squashed = [layers for layers, end in sides if ends_in_squash(end)]
        if len(with_layers) == 1:
            yield from held_back(flow, with_layers[0])
        elif len(squashed) == 1:
            yield from held_back(flow, squashed[0])


def is_product(flow: Flow, node: fx.Node) -> bool:
    """A multiplication of two activations, element by element."""
    return name_of(node) in MUL_NAMES and len(flow.sources(node)) == 2


def held_back(flow: Flow, side: int) -> Iterator[fx.Node]:
    """The layers of a side from which every way on meets a multiplication before a layer outside it or the output."""
    layers = flow.select(side)
    cone: set[fx.Node] = set(layers)
    past: set[fx.Node] = set()
    waiting = list(layers)
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.op == "output" or (is_layer_call(user) and not flow.has(side, user)):
                past.add(node)
            elif user not in cone and not is_product(flow, user):
                cone.add(user)
                waiting.append(user)
    for node in sorted(cone, key=flow.index.__getitem__, reverse=True):
        if any(user in past for user in node.users):
            past.add(node)
    return (layer for layer in layers if layer not in past)


def ends_in_squash(node: fx.Node) -> bool:
    through = REARRANGING_NAMES | DROPPING_NAMES | {"expand", "expand_as", "interpolate"}
    while name_of(node) in through and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return name_of(node) in SQUASHING_NAMES


def rep_branch_calls(flow: Flow) -> Iterator[fx.Node]:
    """Parallel convolutions of one input that are added without anything but a norm between (RepVGG, MobileOne)."""
    for add in flow.nodes:
        if not is_sum(flow, add) or any(is_sum(flow, user) for user in add.users):
            continue
        calls = [call for operand in operands(flow, add) if (call := conv_behind(flow, operand)) is not None]
        by_input: dict[fx.Node, list[fx.Node]] = {}
        for call in calls:
            by_input.setdefault(call.all_input_nodes[0], []).append(call)
        for parallel in by_input.values():
            if len(parallel) > 1:
                yield from parallel


def is_sum(flow: Flow, node: fx.Node) -> bool:
    return name_of(node) in ADD_NAMES and len(flow.sources(node)) == 2


def operands(flow: Flow, add: fx.Node) -> Iterator[fx.Node]:
    """What a chain of adds sums up."""
    for source in flow.sources(add):
        if is_sum(flow, source) and len(source.users) == 1:
            yield from operands(flow, source)
        else:
            yield source


def conv_behind(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The convolution that a summand is, its norm taken off."""
    while is_batch_norm(node) or name_of(node) in REARRANGING_NAMES | DROPPING_NAMES or adds_a_number(node):
        node = node.all_input_nodes[0]
    is_conv = flow.has(flow.layer_calls, node) and node.target is not F.linear
    return node if is_conv else None


def adds_a_number(node: fx.Node) -> bool:
    """``0 + x``, as a sum begins that is written as a loop."""
    return name_of(node) in ADD_NAMES and len(node.all_input_nodes) == 1
