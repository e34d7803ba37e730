"""What may be folded: BatchNorms and activations that alone read a layer's output, and layers that read one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.graph.flow import input_node, is_batch_norm, is_layer_call
from spherify.graph.record import Recording

FOLD = "spherify_fold"  # attribute of a folded model: its FoldPlan


@dataclass(frozen=True)
class FoldPlan:
    """Data only: it is written with a folded model, and replayed when it is loaded.

    Attributes:
        norms: for each layer that takes its BatchNorm in, the norm's path.
        shared: groups of layers that read one tensor, and so share its norms.
        activations: for each layer that takes its activation in, the activation's path.
    """

    norms: dict[str, str] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    activations: dict[str, str] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        return {
            "norms": dict(self.norms),
            "shared": [list(group) for group in self.shared],
            "activations": dict(self.activations),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> FoldPlan:
        shared = tuple(tuple(group) for group in record["shared"])
        return cls(dict(record["norms"]), shared, dict(record.get("activations", {})))


def plan_fold(
    model: nn.Module,
    recording: Recording,
    is_layer: Callable[[nn.Module], bool],
    takes_in: Callable[[nn.Module, nn.Module], bool],
) -> FoldPlan:
    """What can be folded in a recorded run in eval mode.

    Args:
        is_layer: whether a module is one of the layers that can take a norm in, or share norms.
        takes_in: whether a layer can take in a module that runs right behind it, its activation.
    """
    layers = {path: module for path, module in model.named_modules() if is_layer(module)}
    norms: dict[str, str] = {}
    activations: dict[str, str] = {}
    readers: dict[fx.Node, list[str]] = {}
    for node in recording.graph.nodes:
        path = node.meta.get("module")
        if not is_layer_call(node) or path not in layers:
            continue
        source = input_node(node)
        if source is not None and path not in readers.setdefault(source, []):
            readers[source].append(path)
        if recording.calls.get(path) != 1:
            continue
        last = node
        if (norm := norm_behind(model, node, recording)) is not None:
            norms[path] = norm
            last = next(iter(node.users))
        behind = module_behind(model, last, recording)
        if behind is not None and takes_in(layers[path], model.get_submodule(behind)):
            activations[path] = behind
    return FoldPlan(norms, tuple(tuple(paths) for paths in readers.values() if len(paths) > 1), activations)


def norm_behind(model: nn.Module, node: fx.Node, recording: Recording) -> str | None:
    """Path of the BatchNorm that reads a layer's output, if nobody else does and it reads nothing else."""
    users = list(node.users)
    if len(users) != 1 or not is_batch_norm(users[0]) or input_node(users[0]) is not node:
        return None
    path = str(users[0].meta.get("module"))
    norm = model.get_submodule(path)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or recording.calls.get(path) != 1:
        return None
    is_plain = type(norm).__module__.startswith("torch.nn.") or "act" in norm._modules
    is_channel = len(node.meta["shape"]) == 2 or "conv" in getattr(node.target, "__name__", "")
    return path if is_plain and is_channel and not has_hooks(norm) else None


def module_behind(model: nn.Module, node: fx.Node, recording: Recording) -> str | None:
    """Path of another module that reads a node's result, if nobody else does and it runs once."""
    users = list(node.users)
    if len(users) != 1 or input_node(users[0]) is not node:
        return None
    path = users[0].meta.get("module")
    if not path or path == node.meta.get("module") or recording.calls.get(path) != 1:
        return None
    return None if has_hooks(model.get_submodule(path)) else str(path)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
