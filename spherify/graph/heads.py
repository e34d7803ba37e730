"""Heads: the layers whose results are what the model predicts, read from the graph and never from names."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

from torch import fx, nn

from spherify.graph.branches import MUL_NAMES, ends_in_squash
from spherify.graph.flow import ADD_NAMES, CAT_NAMES, Flow, is_layer_call, name_of, weight_node
from spherify.graph.shortcuts import projections_into
from spherify.graph.view import View

NORM_NAMES = frozenset(
    {
        *("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm", "local_response_norm", "normalize"),
        *("rsqrt", "vector_norm", "norm"),  # of norms written by hand
    }
)
ACTIVATION_NAMES = frozenset(
    {
        *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "rrelu", "rrelu_", "prelu", "elu", "elu_", "celu"),
        *("selu", "selu_", "gelu", "silu", "silu_", "mish", "hardswish", "hardtanh", "glu", "softplus", "softsign"),
        *("tanh", "tanh_", "tanhshrink", "softshrink", "hardshrink", "threshold"),
    }
)
POOL_NAMES = frozenset(
    {
        *("mean", "amax", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    }
)
SELECTION_NAMES = frozenset({"__getitem__", "index_select", "gather", "take", "masked_select"})
SAMPLING_NAMES = frozenset({"roi_align", "torchvision.roi_align", "roi_pool", "torchvision.roi_pool", "grid_sample"})


class Passed(IntEnum):
    """What lies between a node and the model's output, as far as it makes an activation tolerable."""

    NOTHING = 0
    POOL = 1  # the mean over all positions, as behind squeezenet's classifier
    SELECTION = 2  # rows chosen by what was computed, as detectors choose their boxes


def heads(view: View) -> set[str]:
    """A predictor: no other layer, norm, gate, residual merge or activation lies between it and the model's output."""
    if hasattr(view.model, "get_classifier"):
        return classifiers_by_interface(view)
    if getattr(view.model, "num_classes", None) == 0:
        return set()  # timm's word for an encoder
    found = view.layers_of(predictor_calls)
    read = view.layers_of(lambda flow: (call for call in flow.select(flow.layer_calls) if feeds_a_layer(flow, call)))
    return found - read if read else set()  # where no layer feeds another, all are body


def predictor_calls(flow: Flow) -> Iterator[fx.Node]:
    """The layer calls met first on the ways back from the outputs, where nothing stops the walk before.

    An activation stops it, but for two cases: between a 1x1 convolution and the mean over positions (squeezenet), and
    before a choice of rows (FCOS keeps its distances positive). A map that is an output as it is counts as predicted
    if the layer sees one position at a time, or has fewer channels than it sees: else it is a map of features.
    """
    results = flow.nodes[-1].all_input_nodes
    waiting = [(result, result, Passed.NOTHING, False) for result in results if flow.has(flow.activations, result)]
    seen = set(waiting)
    while waiting:
        result, node, passed, was_activated = waiting.pop()
        if is_layer_call(node):
            needs_one_position = was_activated and passed is Passed.POOL
            if is_pointwise(node) or not (needs_one_position or is_feature_map(node, result)):
                yield node
            continue
        if name_of(node) in ACTIVATION_NAMES:
            if passed is Passed.NOTHING:
                continue
            was_activated = True
        elif stops(flow, node):
            continue
        passed = max(passed, passed_at(flow, node))
        steps = {(result, source, passed, was_activated) for source in flow.sources(node)}
        waiting += steps - seen
        seen |= steps


def stops(flow: Flow, node: fx.Node) -> bool:
    """Whether what lies before a node belongs to the body."""
    return (
        flow.has(flow.products, node)
        or name_of(node) in NORM_NAMES
        or is_gated(flow, node)
        or is_residual_merge(flow, node)
    )


def passed_at(flow: Flow, node: fx.Node) -> Passed:
    name = name_of(node)
    if name in SELECTION_NAMES and len(flow.sources(node)) > 1:
        return Passed.SELECTION
    if name in POOL_NAMES and all(size == 1 for size in node.meta["shape"][2:]):
        return Passed.POOL
    return Passed.NOTHING


def is_gated(flow: Flow, node: fx.Node) -> bool:
    """A product of which one factor alone is squashed: squeeze-excite, swish by hand, weights of a mixture."""
    sources = flow.sources(node)
    return name_of(node) in MUL_NAMES and len(sources) > 1 and len({ends_in_squash(source) for source in sources}) > 1


def is_residual_merge(flow: Flow, node: fx.Node) -> bool:
    """A sum or concatenation with something that another summand was computed from, or with a projection of it."""
    sources = flow.sources(node)
    if name_of(node) not in ADD_NAMES | CAT_NAMES or len(sources) < 2:
        return False
    layers = [flow.before(source) & flow.layer_calls for source in sources]
    if any(not one & ~two and two & ~one for one in layers for two in layers):
        return True
    return name_of(node) in ADD_NAMES and len(sources) == 2 and bool(projections_into(flow, node))


def is_pointwise(call: fx.Node) -> bool:
    """Sees one position at a time: a linear layer, a 1x1 convolution."""
    weight = weight_node(call)
    window = weight.meta["shape"][2:] if weight is not None else ()
    return all(size == 1 for size in window)


def is_feature_map(call: fx.Node, result: fx.Node) -> bool:
    """Whether an output is still the map that a convolution made, with no fewer channels than it made it from."""
    made, given = call.meta["shape"], call.all_input_nodes[0].meta["shape"]
    weight = weight_node(call)
    if weight is None or len(result.meta["shape"]) != len(made):
        return False
    channel = -1 - len(weight.meta["shape"][2:])
    return made[channel] >= given[channel]


def feeds_a_layer(flow: Flow, call: fx.Node) -> bool:
    """Whether another layer reads what a call made, other than to know where to look.

    Indices, masks and boxes say where: the proposals of a detector are predictions, though its second stage reads
    the features inside them.
    """
    waiting, seen = [call], {call}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user in seen or user.op == "output" or says_where(node, user):
                continue
            if flow.has(flow.products, user):
                return True
            seen.add(user)
            waiting.append(user)
    return False


def says_where(node: fx.Node, user: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return True
    is_sampling = name_of(user) in SAMPLING_NAMES or getattr(user.target, "_qualified_op_name", "") in SAMPLING_NAMES
    return is_sampling and bool(user.args) and user.args[0] is not node


def classifiers_by_interface(view: View) -> set[str]:
    """timm's own word. Of a composite head, the layers as wide as the number of classes, else its last layer."""
    given = view.model.get_classifier()  # type: ignore[operator]
    waiting = list(given) if isinstance(given, (tuple, list)) else [given]
    names = {id(module): name for name, module in view.modules.items()}
    classes = getattr(view.model, "num_classes", None)
    found: set[str] = set()
    for module in waiting:
        if not isinstance(module, nn.Module):
            continue
        inside = [part for part in module.modules() if id(part) in names]
        wide = [part for part in inside if filters_of(part) == classes]
        found |= {names[id(part)] for part in (wide or inside[-1:])}
    return found


def filters_of(module: nn.Module) -> int | None:
    return getattr(module, "out_features", None) or getattr(module, "out_channels", None)
