"""Roles: what a layer is in its network, read from the graph and never from names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx, nn

from spherify.graph.branches import attention_calls, gate_calls, rep_branch_calls
from spherify.graph.flow import Flow
from spherify.graph.heads import heads
from spherify.graph.shortcuts import shortcut_calls
from spherify.graph.view import View


def stems(view: View) -> set[str]:
    """The first layer on each path from an input: no other layer stands before it."""
    return view.layers_of(stem_calls)


def stem_calls(flow: Flow) -> Iterator[fx.Node]:
    for call in flow.select(flow.layer_calls & flow.activations):
        if not (flow.before(call) & flow.layer_calls & ~flow.mask([call])):
            yield call


def shortcuts(view: View) -> set[str]:
    """The 1x1 convolution, or the linear layer on tokens, on the short side of a residual add."""
    return view.layers_of(shortcut_calls)


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
