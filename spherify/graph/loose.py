"""Parameters that multiply an activation outside any layer: nothing converts them, so they must not be passed over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx, nn

from spherify.graph.flow import PRODUCT_NAMES, is_layer_call, name_of
from spherify.graph.record import Recording
from spherify.graph.site import Site

ATTENTION_NAMES = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})
LOOSE_NAMES = (PRODUCT_NAMES - ATTENTION_NAMES) | {"inner"}
FIRST_IS_ADDED = frozenset({"addmm", "baddbmm"})


def loose_parameters(model: nn.Module, recordings: Sequence[Recording], sites: Sequence[Site]) -> tuple[str, ...]:
    """Names of the Parameters that a matmul, einsum or the like multiplies with an activation, as registered.

    Those of a site are left out, for the plan has a row that speaks of them; so are tables that are only added.
    """
    owners = {name for site in sites for name in site.names}
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    free = {name for name in matrices if not is_owned(name, owners)}
    found: set[str] = set()
    for recording in recordings:
        live: set[fx.Node] = set()
        for node in recording.graph.nodes:
            if node.op == "placeholder" or any(source in live for source in node.all_input_nodes):
                live.add(node)
            if node in live and name_of(node) in LOOSE_NAMES:
                found |= {str(weight.target) for weight in weights_behind(node, live)}
    return tuple(name for name in matrices if name in found & free)


def is_owned(name: str, owners: set[str]) -> bool:
    """Whether a Parameter stands in one of these modules; those of the model itself are in it directly."""
    path = name.rpartition(".")[0]
    return path in owners or any(owner and path.startswith(f"{owner}.") for owner in owners)


def weights_behind(product: fx.Node, live: set[fx.Node]) -> Iterator[fx.Node]:
    """The weights from which the factors of a product were made that depend on no input, not behind another layer."""
    added = product.args[0] if name_of(product) in FIRST_IS_ADDED and product.args else None
    waiting = [source for source in product.all_input_nodes if source not in live and source is not added]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.op == "get_attr":
            yield node
        elif not is_layer_call(node):
            waiting += [source for source in node.all_input_nodes if source not in seen]
            seen.update(node.all_input_nodes)
