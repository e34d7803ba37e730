"""Shortcuts: the 1x1 convolution, or the linear layer on tokens, on the short side of a residual add."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import fx

from spherify.graph.flow import ADD_NAMES, CAT_NAMES, CONV_FUNCTIONS, Flow, input_node, name_of, weight_node

ACTIVATION_NAMES = frozenset({"relu", "relu_", "gelu", "silu", "silu_", "hardswish", "hardswish_", "tanh", "sigmoid"})
NORM_NAMES = frozenset({"layer_norm", "group_norm", "rms_norm", "batch_norm"})
MOST_SHORTCUT_PRODUCTS = 3  # a projection is one 1x1 conv, or a few with depthwise convs beside it


def shortcut_calls(flow: Flow) -> Iterator[fx.Node]:
    for add in flow.nodes:
        if name_of(add) in ADD_NAMES and len(flow.sources(add)) == 2:
            yield from projections_into(flow, add)


def projections_into(flow: Flow, add: fx.Node) -> list[fx.Node]:
    """The dense 1x1 conv or linear call on the short side of an add; [] where the add has no projection.

    What both sides have in common is the block's input. Of what each side has for itself, the short one has fewer
    products: one dense 1x1 convolution, beside it depthwise ones at most. The long side must have more, one after the
    other (a sum of parallel branches, as in MobileOne, has them side by side), and must not be an upsampled map (a
    feature pyramid adds its lateral to one). What the projection feeds must end in this block's merges: an input that
    a whole cell goes on using is not a shortcut. The sum must be the block's result: one of several sums side by side,
    as in the cells of an architecture search, is none. A linear layer projects tokens, (N, ..., D) of three or more
    dimensions (classifiers that are averaged give two), with no activation function beside it and no norm behind it:
    that would be a branch of its own, or another stream (TNT's patches beside its pixels).
    """
    one, two = (flow.before(source) for source in flow.sources(add))
    short, long = sorted((one & ~two, two & ~one), key=lambda mask: (mask & flow.products).bit_count())
    products = flow.select(short & flow.products)
    if not products or len(products) > MOST_SHORTCUT_PRODUCTS:
        return []
    dense = [node for node in products if is_dense_1x1(node) or is_linear_on_tokens(node)]
    others = [node for node in products if node not in dense]
    if len(dense) != 1 or not all(is_depthwise_call(node) for node in others):
        return []
    if (long & flow.products).bit_count() <= len(products):
        return []
    if flow.longest_chain(flow.products, long) <= flow.longest_chain(flow.products, short):
        return []
    if not others and long & flow.resizes:
        return []
    if is_linear_on_tokens(dense[0]) and (others or not goes_straight(flow, dense[0], short)):
        return []
    is_projection = ends_in_merges(flow, dense[0], add, long) and not stands_beside_others(flow, add)
    return dense if is_projection else []


def goes_straight(flow: Flow, call: fx.Node, short: int) -> bool:
    """No activation function on the short side, and no norm between the projection and the add."""
    for node in flow.select(short):
        is_behind = flow.has(flow.before(node), call)
        if name_of(node) in ACTIVATION_NAMES or (is_behind and name_of(node) in NORM_NAMES):
            return False
    return True


def ends_in_merges(flow: Flow, call: fx.Node, add: fx.Node, long: int) -> bool:
    """Every use of ``call`` ends, before any other product, in ``add`` or a merge with the same long side."""
    waiting, seen = list(call.users), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is add:
            continue
        if node.op == "output" or flow.has(flow.products, node):
            return False
        if flow.is_merge(node):
            if any(flow.before(source) & long for source in flow.sources(node)):
                continue
            again = is_linear_on_tokens(call) and all(flow.has(flow.before(part), call) for part in flow.sources(node))
            if not again:  # put together again, as a class token and its image
                return False
        waiting += node.users
    return add in seen


def stands_beside_others(flow: Flow, add: fx.Node) -> bool:
    """Whether a sum is concatenated, as it is, with what other layers than its own made beside it."""
    one, two = (flow.before(source) for source in flow.sources(add))
    own = (one ^ two) & flow.layer_calls
    for user in flow.consumers(add):
        if name_of(user) not in CAT_NAMES:
            continue
        for other in flow.sources(user):
            theirs = flow.before(other) & ~(one & two) & flow.layer_calls
            if theirs and not theirs & own:
                return True
    return False


def window_of(node: fx.Node) -> tuple[int, ...]:
    """Kernel size of a conv call, () for a linear call."""
    weight = weight_node(node)
    return tuple(weight.meta["shape"][2:]) if weight is not None else ()


def groups_of(node: fx.Node) -> int:
    weight, source = weight_node(node), input_node(node)
    if node.target not in CONV_FUNCTIONS or weight is None or source is None:
        return 1
    channels = source.meta["shape"][-1 - len(window_of(node))]
    return channels // max(weight.meta["shape"][1], 1)


def is_dense_1x1(node: fx.Node) -> bool:
    return node.target in CONV_FUNCTIONS and groups_of(node) == 1 and all(size == 1 for size in window_of(node))


def is_linear_on_tokens(node: fx.Node) -> bool:
    return node.target is F.linear and len(node.meta["shape"]) > 2


def is_depthwise_call(node: fx.Node) -> bool:
    weight = weight_node(node)
    return groups_of(node) > 1 and weight is not None and weight.meta["shape"][1] == 1
