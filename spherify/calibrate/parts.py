"""What there is to fit in a recorded network: each layer with its calls, and where its scale can go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.calibrate.chain import norm_after, sum_after
from spherify.calibrate.recorded import Recorded
from spherify.functional.responses import RESPONSES
from spherify.graph.flow import is_getitem, is_layer_call, weight_node
from spherify.layers.angular import AngularLayer

EVERY_ROW = slice(None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Filters that are fitted together: a layer, or one slice of a packed weight.

    Attributes:
        name: path of the layer.
        module: its object.
        calls: positions of its conv or linear calls in the student's run.
        rows: which filters of the weight.
        norm: the BatchNorm that takes up scale and offset, if it follows every call and nothing else.
        answers: for each call, the position whose value is fitted: the norm's, or the call's own.
        sums: for each call, the addition behind it and the other summand, where the fit makes up for errors there.
    """

    name: str
    module: nn.Module
    calls: tuple[int, ...]
    rows: slice = field(default_factory=lambda: EVERY_ROW)
    norm: _BatchNorm | None = None
    answers: tuple[int, ...] = ()
    sums: tuple[tuple[int, int] | None, ...] = ()

    @property
    def is_angular(self) -> bool:
        return isinstance(self.module, AngularLayer)

    @property
    def filters(self) -> Tensor:
        """(O, ...) of these rows, whose direction is to change."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight[self.rows]

    @property
    def bias(self) -> nn.Parameter | None:
        name = "in_proj_bias" if isinstance(self.module, nn.MultiheadAttention) else "bias"
        return self.module._parameters.get(name)

    @property
    def has_gain(self) -> bool:
        return isinstance(self.module, AngularLayer) and self.module.output_gain() is not None

    @property
    def can_scale(self) -> bool:
        """There is a place for the length of the fitted filters."""
        return not self.is_angular or self.has_gain or self.norm is not None

    def can_shift(self, recorded: Recorded) -> bool:
        """There is a place for an offset, and the layer's own calls read it."""
        if self.norm is not None and (self.norm.affine or self.norm.track_running_stats):
            return True
        return self.bias is not None and all(reads_bias(recorded, call, self.bias) for call in self.calls)

    def response(self, cosine: Tensor) -> Tensor:
        """(G, R, O/G) cosines through the operator; anything else passes."""
        if not isinstance(self.module, AngularLayer):
            return cosine
        k = self.k
        if isinstance(k, Tensor):
            k = k.detach() if k.numel() == 1 else k.detach().view(cosine.shape[0], 1, -1)
        return RESPONSES[self.module.operator].function(cosine, k)

    def slope(self, cosine: Tensor) -> Tensor:
        assert isinstance(self.module, AngularLayer)
        k = self.k
        if isinstance(k, Tensor):
            k = k.detach() if k.numel() == 1 else k.detach().view(cosine.shape[0], 1, -1)
        return RESPONSES[self.module.operator].slope(cosine, k)

    @property
    def k(self) -> Tensor | float | None:
        assert isinstance(self.module, AngularLayer)
        k = self.module.k
        return k[self.rows] if isinstance(k, Tensor) and k.numel() > 1 else k


def reads_bias(recorded: Recorded, call: int, bias: nn.Parameter) -> bool:
    """The bias that a call adds is this Parameter, or a slice of it."""
    node = recorded.nodes[call]
    source = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    while source is not None and is_getitem(source):
        source = source.args[0]
    if source is None or source.op != "get_attr" or "constant" in source.meta:
        return False
    return recorded.parameter(str(source.target)) is bias


def parts_of(recorded: Recorded, *, kept: bool) -> list[Part]:
    """Every converted layer and, with ``kept``, every plain one whose weight is a Parameter of its own.

    In the order in which they first run.
    """
    found: dict[tuple[int, str], Part] = {}
    for call in recorded.layer_calls():
        part = part_of(recorded, call)
        if part is None or not (part.is_angular or kept):
            continue
        key = (id(part.module), str(part.rows))
        found[key] = replace(found[key], calls=(*found[key].calls, call)) if key in found else part
    return only_one_to_a_sum([with_answers(recorded, part) for part in found.values()])


def part_of(recorded: Recorded, call: int) -> Part | None:
    path = recorded.path(call)
    module = recorded.model.get_submodule(path)
    node = recorded.nodes[call]
    weight = weight_node(node)
    if isinstance(module, AngularLayer):
        rows = EVERY_ROW
        if weight is not None and is_getitem(weight) and isinstance(weight.args[1], slice):
            rows = weight.args[1]
        return Part(name=path, module=module, calls=(call,), rows=rows)
    if weight is None or weight.op != "get_attr" or "constant" in weight.meta:
        return None
    owner, _, key = str(weight.target).rpartition(".")
    owner_module = recorded.model.get_submodule(owner)
    if key != "weight" or not isinstance(owner_module, (nn.Linear, nn.modules.conv._ConvNd)):
        return None
    return Part(name=owner, module=owner_module, calls=(call,))


def with_answers(recorded: Recorded, part: Part) -> Part:
    norms = {norm_after(recorded, call) for call in part.calls}
    norm = None
    if not part.has_gain and None not in norms:
        paths = {recorded.path(position) for position in norms if position is not None}
        module = recorded.model.get_submodule(paths.pop()) if len(paths) == 1 else None
        same = [p for p in range(len(recorded.nodes)) if is_norm_of(recorded, p, module)]
        norm = module if isinstance(module, _BatchNorm) and set(same) == norms else None
    answers = part.calls if norm is None else tuple(sorted(p for p in norms if p is not None))
    return replace(part, norm=norm, answers=answers, sums=tuple(sum_after(recorded, answer) for answer in answers))


def is_norm_of(recorded: Recorded, position: int, module: nn.Module | None) -> bool:
    node = recorded.nodes[position]
    is_norm = node.op == "call_function" and "batch_norm" in getattr(node.target, "__name__", "")
    return is_norm and recorded.model.get_submodule(recorded.path(position)) is module


def only_one_to_a_sum(parts: list[Part]) -> list[Part]:
    """Of several layers that go into one sum, the one with the largest filters makes up for the others' errors."""
    best: dict[int, Part] = {}
    for part in parts:
        for place in part.sums:
            if place is not None and (place[0] not in best or fan_in(part) >= fan_in(best[place[0]])):
                best[place[0]] = part
    return [
        replace(part, sums=tuple(place if place and best[place[0]] is part else None for place in part.sums))
        for part in parts
    ]


def fan_in(part: Part) -> int:
    return math.prod(part.filters.shape[1:])


def in_working_order(recorded: Recorded, parts: list[Part]) -> list[Part]:
    """Each part after all that its inputs, and the summands it makes up for, depend on."""
    before = {id(part): needs(recorded, part) for part in parts}
    waiting, ordered, fitted = list(parts), [], 0
    own = {id(part): bits_of(part.calls) for part in parts}
    total = 0
    for part in parts:
        total |= own[id(part)]
    while waiting:
        ready = next((p for p in waiting if not before[id(p)] & total & ~own[id(p)] & ~fitted), waiting[0])
        waiting.remove(ready)
        fitted |= own[id(ready)]
        ordered.append(ready)
    return ordered


def needs(recorded: Recorded, part: Part) -> int:
    """All positions that a part's first call and its other summands depend on."""
    mask = recorded.ancestors[part.calls[0]]
    for place in part.sums:
        if place is not None:
            mask |= recorded.ancestors[place[1]]
    return mask


def bits_of(positions: tuple[int, ...]) -> int:
    mask = 0
    for position in positions:
        mask |= 1 << position
    return mask


def layer_positions(recorded: Recorded) -> Iterator[int]:
    return (position for position, node in enumerate(recorded.nodes) if is_layer_call(node))


@torch.no_grad()
def unit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(G, O, D) as directions and lengths (G, O)."""
    length = weight.norm(dim=2).clamp_min(1e-12)
    return weight / length[:, :, None], length
