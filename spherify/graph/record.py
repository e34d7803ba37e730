"""Recording one run of a model as a ``torch.fx.Graph``, on a copy without data."""

from __future__ import annotations

import contextlib
import gc
import operator
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from spherify.errors import ModelError
from spherify.graph.copies import copy_without_data, one_line
from spherify.graph.shapes import answer

FILLS_ARGUMENT = frozenset({"__setitem__"})  # changes its first argument and returns nothing


@dataclass(frozen=True)
class Inputs:
    """What the model is called with while it is recorded.

    Attributes:
        args, kwargs: as in ``model(*args, **kwargs)``.
        settings: path of a module, name and value of an attribute that its copy gets for the run.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    settings: tuple[tuple[str, str, Any], ...] = ()

    def on(self, device: str) -> Inputs:
        """The same with every tensor on ``device``; tensors without data become random numbers."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if device == "meta":
                return value.detach().to("meta")
            if value.device.type != "meta":
                return value.detach().to(device)
            if value.is_floating_point():
                return torch.rand(value.shape, dtype=value.dtype, device=device)
            return torch.zeros(value.shape, dtype=value.dtype, device=device)

        return Inputs(map_tree(move, self.args), map_tree(move, dict(self.kwargs or {})), self.settings)


@dataclass(frozen=True)
class Recording:
    """One run of a model.

    Attributes:
        graph: a node for every torch function that returned a tensor. ``node.meta`` has ``module`` (path of the
            innermost module that called it), ``shape`` and ``dtype``. Weights are ``get_attr`` nodes with the
            qualified name of the Parameter or buffer.
        calls: how often each module ran, by its first path.
        output_shapes: of every tensor in the output, in order.
        training: the mode of the run.
        device: ``meta``, or ``cpu`` where the model needs data to run.
    """

    graph: fx.Graph
    calls: Mapping[str, int]
    output_shapes: tuple[tuple[int, ...], ...]
    training: bool
    device: str


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """``function`` on every leaf of nested tuples, lists and dicts."""
    if isinstance(tree, dict):
        return type(tree)((key, map_tree(function, value)) for key, value in tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(function, value) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tree(function, value) for value in tree)
    return function(tree)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclass-like outputs."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)


class ByIdentity:
    """A table by objects, which it keeps alive; faster than one that must not."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Any, Any]] = {}

    def get(self, key: Any, default: Any = None) -> Any:
        entry = self.entries.get(id(key))
        return default if entry is None else entry[1]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[id(key)] = (key, value)


class Recorder(TorchFunctionMode):
    """Writes every torch function, and the stack of modules that called it, into a graph.

    Args:
        keeps_tensors: hold every tensor of the run until its end, which costs no memory on meta.
    """

    def __init__(self, model: nn.Module, *, keeps_tensors: bool = False) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.calls: dict[str, int] = {}
        self.stack: list[str] = []
        self.thread = threading.get_ident()
        self.paths = ByIdentity()
        for path, module in model.named_modules():  # the first path of each object
            self.paths[module] = path
        self.nodes: Any = ByIdentity() if keeps_tensors else WeakTensorKeyDictionary()
        self.weights = ByIdentity()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.weights[tensor] = name

    def enter(self, module: nn.Module, args: Any) -> None:
        path = self.paths.get(module)
        if path is not None and threading.get_ident() == self.thread:
            self.stack.append(path)
            self.calls[path] = self.calls.get(path, 0) + 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.paths.get(module) is not None and threading.get_ident() == self.thread:
            self.stack.pop()

    def node_of(self, value: Any) -> Any:
        """The node that made a tensor; a weight or a constant gets its node on first sight."""
        if not isinstance(value, Tensor):
            return value
        node = self.nodes.get(value)
        if node is None:
            name = self.weights.get(value)
            node = self.graph.create_node("get_attr", name or "constant")
            self.bind(node, value)
            node.meta["is_weight"] = name is not None
        return node

    def bind(self, node: fx.Node, value: Tensor) -> None:
        self.nodes[value] = node
        node.meta.update(module=self.stack[-1] if self.stack else "", shape=tuple(value.shape), dtype=value.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) and not args[0].is_inference() else None
        version = first._version if first is not None else None
        output = answer(func, args, kwargs)
        if output is None:
            output = func(*args, **kwargs)
            if first is not None and output is first and first._version == version:
                return output  # nothing was done, as by ``to`` with the type it has
        made = list(tensors_in(output))
        name = getattr(func, "__name__", "")
        if made or name in FILLS_ARGUMENT:
            self.write(func, name, args, kwargs, output, made)
        return output

    def write(self, func: Any, name: str, args: Any, kwargs: Any, output: Any, made: list[Tensor]) -> None:
        node_args = fx.node.map_aggregate(tuple(args), self.node_of)
        node_kwargs = fx.node.map_aggregate(dict(kwargs), self.node_of)
        node = self.graph.create_node("call_function", func, name=name.strip("_") or None)
        node.args, node.kwargs = node_args, node_kwargs  # create_node would search them for symbolic numbers, slowly
        if isinstance(output, Tensor):
            self.bind(node, output)
        elif made:
            node.meta.update(module=self.stack[-1] if self.stack else "", shape=(), dtype=made[0].dtype)
            for index, tensor in enumerate(made):
                self.bind(self.graph.call_function(operator.getitem, (node, index)), tensor)
        changed = args[0] if args and (name in FILLS_ARGUMENT or output is args[0]) else None
        if isinstance(changed, Tensor):
            self.bind(node, changed)
            if changed._base is not None:  # a write into a view writes into what it is a view of
                self.nodes[changed._base] = node

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = register_module_forward_pre_hook(self.enter)
        after = register_module_forward_hook(self.leave, always_call=True)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()


@contextlib.contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Of torch, Python and NumPy: models draw from all three."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def no_collector(device: str) -> Iterator[None]:
    """Without Python's collector of cycles, where no memory waits for it.

    A recording keeps all that it makes, and the collector would search it again and again in vain.
    """
    is_paused = device == "meta" and gc.isenabled()
    if is_paused:
        gc.disable()
    try:
        yield
    finally:
        if is_paused:
            gc.enable()


def run(model: nn.Module, inputs: Inputs, training: bool, device: str) -> Recording:
    """Record one run of a copy of ``model`` on ``device``; whatever the model raises comes through."""
    with unchanged_random_state(), no_collector(device):
        trial = copy_without_data(model, device).train(training)
        for path, name, value in inputs.settings:
            setattr(trial.get_submodule(path), name, value)
        inputs = inputs.on(device)
        recorder = Recorder(trial, keeps_tensors=device == "meta")
        for index, tensor in enumerate(tensors_in((inputs.args, inputs.kwargs))):
            recorder.bind(recorder.graph.placeholder(f"input_{index}"), tensor)
        with torch.no_grad(), recorder.listening():
            output = trial(*inputs.args, **dict(inputs.kwargs or {}))
        outputs = list(tensors_in(output))
        recorder.graph.output(tuple(recorder.node_of(tensor) for tensor in outputs))
    shapes = tuple(tuple(tensor.shape) for tensor in outputs)
    return Recording(recorder.graph, recorder.calls, shapes, training, device)


def record(model: nn.Module, inputs: Inputs, *, training: bool, devices: Sequence[str] = ("meta", "cpu")) -> Recording:
    """Record one run in eval or train mode; the model itself is not run and not changed.

    Args:
        devices: where to try, in this order: ``meta`` needs no memory, ``cpu`` serves models that read their data.

    Raises:
        ModelError: the model cannot be copied, or runs on no device; the message holds its own.
    """
    failure: Exception | None = None
    for device in devices:
        try:
            return run(model, inputs, training, device)
        except ModelError:
            raise
        except Exception as error:  # the model's own code, which may raise anything
            failure = error
    mode = "train" if training else "eval"
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in((inputs.args, inputs.kwargs)))
    assert failure is not None
    raise ModelError(
        f"{type(model).__name__} does not run in {mode} mode on an input of shape {shapes} "
        f"({one_line(failure)}); pass example_input=... with what it is called with."
    ) from failure


def record_both(model: nn.Module, inputs: Inputs, *, devices: Sequence[str] = ("meta", "cpu")) -> tuple[Recording, ...]:
    """A recording in eval mode and, where the model runs in it without targets, one in train mode.

    Args:
        devices: where to try in eval mode; train mode may fall back from ``meta`` to ``cpu``.

    Raises:
        ModelError: as ``record``, in eval mode.
    """
    recordings = [record(model, inputs, training=False, devices=devices)]
    with contextlib.suppress(ModelError):
        for_training = ("meta", "cpu") if recordings[0].device == "meta" else ("cpu",)
        recordings.append(record(model, inputs, training=True, devices=for_training))
    return tuple(recordings)
