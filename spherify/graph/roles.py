"""Roles: what a layer is in its network, read from the graph and never from names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx, nn

from spherify.graph.branches import attention_calls, gate_calls, rep_branch_calls
from spherify.graph.flow import (
    ADD_NAMES,
    CAT_NAMES,
    CONV_FUNCTIONS,
    Flow,
    input_node,
    name_of,
    weight_node,
)
from spherify.graph.heads import heads
from spherify.graph.view import View

MOST_SHORTCUT_PRODUCTS = 3  # a projection is one 1x1 conv, or a few with depthwise convs beside it


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


def is_depthwise_call(node: fx.Node) -> bool:
    weight = weight_node(node)
    return groups_of(node) > 1 and weight is not None and weight.meta["shape"][1] == 1


def stems(view: View) -> set[str]:
    """The first layer on each path from an input: no other layer stands before it."""
    return view.layers_of(stem_calls)


def stem_calls(flow: Flow) -> Iterator[fx.Node]:
    for call in flow.select(flow.layer_calls & flow.activations):
        if not (flow.before(call) & flow.layer_calls & ~flow.mask([call])):
            yield call


def shortcuts(view: View) -> set[str]:
    """The 1x1 convolution on the short side of a residual add."""
    return view.layers_of(shortcut_calls)


def shortcut_calls(flow: Flow) -> Iterator[fx.Node]:
    for add in flow.nodes:
        if name_of(add) in ADD_NAMES and len(flow.sources(add)) == 2:
            yield from projections_into(flow, add)


def attention(view: View) -> set[str]:
    """A layer next to a product of two activations: it makes queries, keys or values, or takes their result."""
    return view.layers_of(attention_calls)


def gates(view: View) -> set[str]:
    """A layer that computes how much of another activation passes, as in squeeze-excite."""
    return view.layers_of(gate_calls)


def rep_branches(view: View) -> set[str]:
    """One of several convolutions of one input that are summed with at most a norm between (RepVGG, MobileOne)."""
    return view.layers_of(rep_branch_calls)


def auxiliaries(view: View) -> set[str]:
    """A layer that runs in train mode alone."""
    runs = {flow.training: {view.layer_of(call) for call in flow.select(flow.layer_calls)} for flow in view.flows}
    return {name for name in runs.get(True, set()) - runs.get(False, set()) if name is not None}


def projections_into(flow: Flow, add: fx.Node) -> list[fx.Node]:
    """The dense 1x1 conv call on the short side of an add; [] where the add has no projection.

    What both sides have in common is the block's input. Of what each side has for itself, the short one has fewer
    products: one dense 1x1 convolution, beside it depthwise ones at most. The long side must have more, one after the
    other (a sum of parallel branches, as in MobileOne, has them side by side), and must not be an upsampled map (a
    feature pyramid adds its lateral to one). What the projection feeds must end in this block's merges: an input that
    a whole cell goes on using is not a shortcut. The sum must be the block's result: one of several sums side by side,
    as in the cells of an architecture search, is none.
    """
    one, two = (flow.before(source) for source in flow.sources(add))
    short, long = sorted((one & ~two, two & ~one), key=lambda mask: (mask & flow.products).bit_count())
    products = flow.select(short & flow.products)
    if not products or len(products) > MOST_SHORTCUT_PRODUCTS:
        return []
    dense = [node for node in products if is_dense_1x1(node)]
    others = [node for node in products if node not in dense]
    if len(dense) != 1 or not all(is_depthwise_call(node) for node in others):
        return []
    if (long & flow.products).bit_count() <= len(products):
        return []
    if flow.longest_chain(flow.products, long) <= flow.longest_chain(flow.products, short):
        return []
    if not others and long & flow.resizes:
        return []
    is_projection = ends_in_merges(flow, dense[0], add, long) and not stands_beside_others(flow, dense[0], add)
    return dense if is_projection else []


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
            if not any(flow.before(source) & long for source in flow.sources(node)):
                return False
            continue
        waiting += node.users
    return add in seen


def stands_beside_others(flow: Flow, call: fx.Node, add: fx.Node) -> bool:
    """Whether the sum is concatenated, as it is, with the result of other layers that do not know of ``call``."""
    for user in flow.consumers(add):
        if name_of(user) not in CAT_NAMES:
            continue
        for other in flow.sources(user):
            before = flow.before(other)
            if not flow.has(before, call) and before & flow.layer_calls & ~flow.before(add):
                return True
    return False


def depthwise(view: View) -> set[str]:
    """A convolution with as many groups as input channels, more than one."""
    return {
        name
        for name, module in view.modules.items()
        if isinstance(module, CONV_TYPES) and module.groups == module.in_channels > 1
    }


def pointwise(view: View) -> set[str]:
    """A convolution with a 1x1 kernel and one group."""
    return {
        name
        for name, module in view.modules.items()
        if isinstance(module, CONV_TYPES) and module.groups == 1 and all(size == 1 for size in module.kernel_size)
    }


CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

ROLES: dict[str, Callable[[View], set[str]]] = {
    "@stem": stems,
    "@shortcut": shortcuts,
    "@depthwise": depthwise,
    "@pointwise": pointwise,
    "@attention": attention,
    "@gate": gates,
    "@rep_branch": rep_branches,
    "@aux": auxiliaries,
    "@head": heads,
}
