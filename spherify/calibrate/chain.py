"""What happens to a layer's output next: its norm, the sum it goes into, the activation behind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from spherify.calibrate.recorded import Recorded
from spherify.graph.flow import ADD_NAMES, DROPPING_NAMES, REARRANGING_NAMES, is_batch_norm, name_of

RELU_NAMES = frozenset({"relu", "relu_"})
RELU6_NAMES = frozenset({"relu6", "relu6_"})
HARDTANH_NAMES = frozenset({"hardtanh", "hardtanh_"})
SCALING_NAMES = frozenset({"mul", "__mul__", "__rmul__", "mul_", "__imul__"})


def only_user(recorded: Recorded, position: int) -> int | None:
    users = recorded.users[position]
    return users[0] if len(users) == 1 else None


def norm_after(recorded: Recorded, position: int) -> int | None:
    """Position of the BatchNorm that alone uses a result."""
    user = only_user(recorded, position)
    return user if user is not None and is_batch_norm(recorded.nodes[user]) else None


def sum_after(recorded: Recorded, position: int) -> tuple[int, int] | None:
    """The addition that a result goes into and the other summand; between them, only channels are scaled or moved."""
    while (user := only_user(recorded, position)) is not None:
        node = recorded.nodes[user]
        sources = [recorded.position[source] for source in recorded.flow.sources(node)]
        name = name_of(node)
        if name in ADD_NAMES and len(sources) == 2 and not scales_a_summand(node):
            other = sources[0] if sources[1] == position else sources[1]
            same_shape = node.meta["shape"] == recorded.nodes[other].meta["shape"]
            return (user, other) if same_shape and not recorded.depends_on(other, position) else None
        if len(sources) != 1 or name not in REARRANGING_NAMES | DROPPING_NAMES | SCALING_NAMES:
            return None
        position = user
    return None


def scales_a_summand(node: fx.Node) -> bool:
    return bool(node.kwargs.get("alpha", 1) != 1)


def bounds_after(recorded: Recorded, position: int) -> tuple[float | None, float | None]:
    """(low, high) between which every user of a result sees it; None where there is no bound."""
    bounds = {bounds_of(recorded.nodes[user]) for user in recorded.users[position]}
    return bounds.pop() if len(bounds) == 1 else (None, None)


def bounds_of(node: fx.Node) -> tuple[float | None, float | None]:
    name = name_of(node)
    if name in RELU_NAMES or node.target in (F.relu, torch.relu):
        return 0.0, None
    if name in RELU6_NAMES:
        return 0.0, 6.0
    if name in HARDTANH_NAMES:
        low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", -1.0)
        high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max_val", 1.0)
        return float(low), float(high)  # type: ignore[arg-type]
    return None, None
