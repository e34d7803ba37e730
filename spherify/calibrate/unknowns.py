"""What a solve of the outputs may change, and how much each image's outputs depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherify.calibrate.absorb import write_direction_
from spherify.calibrate.parts import Part, bits_of, parts_of, reads_bias
from spherify.calibrate.patches import Call, output_rows, patch_maps, patch_rows
from spherify.calibrate.recorded import Recorded
from spherify.calibrate.world import World
from spherify.graph.flow import CONV_FUNCTIONS, name_of
from spherify.layers.angular import AngularLayer
from spherify.layers.timm_convs import StandardisedFilters

FLOATS_AT_ONCE = 50_000_000  # of the rows that one layer's filters are multiplied with
CHANNELS_SECOND = frozenset({"batch_norm", "group_norm", "instance_norm"})
CHANNELS_LAST = frozenset({"layer_norm", "rms_norm"})


@dataclass
class Played:
    """One batch that went through a network, its values at hand, with the slopes of some sums of its outputs.

    Attributes:
        world, number: the network and which of its batches.
        images: in the batch.
        slopes: by position, the slopes of each sum by the value there, (R, ...) each.
        axes: by position, the axis of the value along which the images lie.
    """

    world: World
    number: int
    images: int
    slopes: dict[int, Tensor]
    axes: dict[int, int]

    def by_image(self, rows: Tensor, position: int) -> Tensor:
        """(rows, ...) in the order of the value there, as (images, rows of an image, ...)."""
        if self.axes[position] == 0:
            return rows.unflatten(0, (self.images, -1))
        value = self.world.values[self.number][position]
        return rows.unflatten(0, (len(value), self.images, -1)).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Channels:
    """Scale and offset of each channel: ``value * (1 + a) + b`` at all positions where a Parameter acts.

    Attributes:
        name: path of the module.
        positions: where the values stand.
        channel_axis: of the value: 1 or -1.
        weights: (C, ...) what ``1 + a`` multiplies, views of the Parameter; None where nothing scales.
        bias: (C,) view, or None.
    """

    name: str
    positions: tuple[int, ...]
    channel_axis: int
    weights: Tensor | None
    bias: Tensor | None

    @property
    def size(self) -> int:
        return sum(len(tensor) for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.weights, self.bias) if tensor is not None]

    def rows(self, played: Played) -> Tensor:
        """(R, images, size): how each sum changes with each unknown."""
        total: Tensor | float = 0.0
        for position in self.positions:
            value = played.world.values[played.number][position].detach().float()
            value = played.by_image(output_rows(value, self.channel_axis == 1), position)
            slopes = [
                played.by_image(output_rows(slope.float(), self.channel_axis == 1), position)
                for slope in played.slopes[position]
            ]
            scales = [torch.stack([(slope * value).sum(1) for slope in slopes])] if self.weights is not None else []
            shifts = [torch.stack([slope.sum(1) for slope in slopes])] if self.bias is not None else []
            total = total + torch.cat([*scales, *shifts], 2)
        assert isinstance(total, Tensor)
        return total

    def spread(self, squares: Tensor) -> Tensor:
        """(size,) from mean squares of the rows' columns: each unknown is measured by its own effect."""
        return squares.clamp_min(1e-3 * squares.mean())

    def add_(self, change: Tensor) -> None:
        scale = torch.zeros_like(change)
        if self.weights is not None:
            scale, change = change[: len(self.weights)], change[len(self.weights) :]
            self.weights.mul_(1.0 + scale.view(-1, *[1] * (self.weights.dim() - 1)).to(self.weights))
        if self.bias is not None:
            factor = 1.0 + scale.to(self.bias) if self.weights is not None else 1.0
            self.bias.mul_(factor).add_(change.to(self.bias))


@dataclass(frozen=True, kw_only=True, eq=False)
class Filters:
    """The filters of a part: of an angular layer their directions, of a plain one their numbers."""

    part: Part

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def positions(self) -> tuple[int, ...]:
        return self.part.calls

    @property
    def size(self) -> int:
        return self.part.filters.numel()

    @property
    def tensors(self) -> list[Tensor]:
        return [self.part.filters.data]

    def unit(self, groups: int) -> Tensor:
        """(G, O/G, D) directions of an angular layer's filters."""
        assert isinstance(self.part.module, AngularLayer)
        filters = self.part.module.filters().detach()[self.part.rows].flatten(1).float()
        return F.normalize(filters, dim=1).unflatten(0, (groups, -1))

    def rows(self, played: Played) -> Tensor:
        """(R, images, size): how each sum changes with each unknown."""
        total: Tensor | float = 0.0
        for position in self.positions:
            total = total + self.rows_at(played, position)
        assert isinstance(total, Tensor)
        return total

    def rows_at(self, played: Played, position: int) -> Tensor:
        world = played.world
        call = Call.of(world.recorded.nodes[position].target, *world.arguments(played.number, position))
        groups = call.groups if call.is_conv else 1
        slopes = torch.stack(  # (R, images, P, O)
            [played.by_image(output_rows(s.float(), call.is_conv), position) for s in played.slopes[position]]
        )
        if self.part.has_gain:
            slopes = slopes * self.part.module.output_gain()[self.part.rows].detach().float()  # type: ignore[operator]
        slopes = slopes.unflatten(3, (groups, -1)).permute(1, 3, 0, 4, 2)  # (images, G, R, O/G, P)
        width = groups * slopes.shape[4] * self.part.filters[0].numel()
        together = max(1, FLOATS_AT_ONCE // width) if played.axes[position] == 0 else played.images
        firsts = range(0, played.images, together)
        pieces = zip(
            slopes.split(together), (self.inputs(call, n, together, played, position) for n in firsts), strict=True
        )
        found = [self.products(*piece) for piece in pieces]
        return torch.cat(found, 1) if len(found) > 1 else found[0]

    def inputs(self, call: Call, first: int, count: int, played: Played, position: int) -> Tensor:
        """(some images, G, P, D): what the filters are multiplied with, images from ``first`` on."""
        if played.axes[position] == 0 and call.is_conv:
            maps = patch_maps(replace(call, input=call.input[first : first + count]))
            if maps is not None:
                return maps.detach().float()
        size = len(output_rows(played.world.values[played.number][position], call.is_conv))
        if played.axes[position] == 0:
            places = size // played.images
            numbers = torch.arange(first * places, min(first + count, played.images) * places, device=call.input.device)
            rows = patch_rows(call, numbers).detach().float()
            return rows.unflatten(1, (-1, places)).transpose(0, 1)
        rows = patch_rows(call, torch.arange(size, device=call.input.device)).detach().float()
        return torch.stack([played.by_image(group, position) for group in rows], 1)

    def products(self, slopes: Tensor, inputs: Tensor) -> Tensor:
        """(R, some images, size) from (images, G, R, O/G, P) and (images, G, P, D)."""
        module = self.part.module
        sums, outputs = slopes.shape[2:4]
        if not isinstance(module, AngularLayer):
            products = torch.matmul(slopes.flatten(2, 3), inputs).unflatten(2, (sums, outputs))
            return products.permute(2, 0, 1, 3, 4).flatten(2)
        inverse = torch.rsqrt(inputs.mT.square().sum(2) + module.eps)  # (images, G, P)
        unit = self.unit(inputs.shape[1])
        if module.operator != "cosine":
            cosine = torch.matmul(inputs, unit.mT) * inverse[..., None]  # (images, G, P, O/G)
            slope = self.part.slope(cosine.transpose(0, 1).flatten(1, 2)).unflatten(1, inverse.shape[::2])
            slopes = slopes * slope.permute(1, 0, 3, 2)[:, :, None]
        slopes = slopes * inverse[:, :, None, None]
        products = torch.matmul(slopes.flatten(2, 3), inputs).unflatten(2, (sums, outputs))  # (images, G, R, O/G, D)
        if isinstance(module, StandardisedFilters):  # whose inputs are centred before they meet the filters
            products = products - products.mean(-1, keepdim=True)
        products = products - (products * unit[:, None]).sum(-1, keepdim=True) * unit[:, None]
        return products.permute(2, 0, 1, 3, 4).flatten(2)

    def spread(self, squares: Tensor) -> Tensor:
        """(size,) from mean squares of the rows' columns: one number for the whole layer."""
        return squares.mean().expand_as(squares)

    def add_(self, change: Tensor) -> None:
        if self.part.is_angular:
            unit = self.unit(1)[0]
            write_direction_(self.part, F.normalize(unit + change.view_as(unit), dim=1)[None])
        else:
            self.part.filters.data.add_(change.view_as(self.part.filters).to(self.part.filters))


Unknown = Channels | Filters


def unknowns_of(recorded: Recorded, limit: int, *, kept: bool) -> tuple[list[Unknown], list[str]]:
    """All scales and offsets, and the filters of as many layers as ``limit`` numbers hold, the smallest first.

    Of converted layers and the norms behind them and, with ``kept``, of plain layers behind converted ones too.

    Returns:
        The unknowns, and the names of the layers whose filters are left as they are.
    """
    tied = shared_parameters(recorded)
    parts = [part for part in parts_of(recorded, kept=kept) if not held_in(part.module, tied)]
    changed = bits_of(tuple(call for part in parts if part.is_angular for call in part.calls))
    parts = [part for part in parts if any(recorded.ancestors[call] & changed for call in part.calls)]
    norms = [norm for norm in norms_in(recorded, tied) if recorded.ancestors[norm.positions[0]] & changed]
    found: list[Unknown] = [*norms, *scales_in(recorded, parts)]
    total = sum(unknown.size for unknown in found)
    left = []
    for part in sorted(parts, key=lambda part: part.filters.numel()):
        filters = Filters(part=part)
        total += filters.size
        if total <= limit:
            found.append(filters)
        else:
            left.append(part.name)
    return [unknown for unknown in found if unknown.size], left


def shared_parameters(recorded: Recorded) -> set[int]:
    """Ids of Parameters that several modules hold: a change would act in places that are not looked at."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in recorded.model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def held_in(module: nn.Module, ids: set[int]) -> bool:
    return any(id(parameter) in ids for parameter in module.parameters(recurse=False))


def norms_in(recorded: Recorded, tied: set[int]) -> list[Channels]:
    """Weight and bias of every norm in the run."""
    places: dict[str, list[int]] = {}
    for position, node in enumerate(recorded.nodes):
        if recorded.is_activation(position) and name_of(node) in CHANNELS_SECOND | CHANNELS_LAST:
            places.setdefault(recorded.path(position), []).append(position)
    found = []
    for path, positions in places.items():
        module = recorded.model.get_submodule(path)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        axis = 1 if name_of(recorded.nodes[positions[0]]) in CHANNELS_SECOND else -1
        channels = recorded.nodes[positions[0]].meta["shape"][axis]
        if isinstance(weight, Tensor) and weight.shape == (channels,) and not held_in(module, tied):
            shift = bias.data if isinstance(bias, Tensor) else None
            found.append(
                Channels(name=path, positions=tuple(positions), channel_axis=axis, weights=weight.data, bias=shift)
            )
    return found


def scales_in(recorded: Recorded, parts: Sequence[Part]) -> list[Channels]:
    """Gain and bias of every layer that has them; of a plain layer, the lengths of its filters."""
    found = []
    for part in parts:
        weights = gain_of(part)
        bias = part.bias
        if bias is not None and not all(reads_bias(recorded, call, bias) for call in part.calls):
            bias = None
        is_conv = recorded.nodes[part.calls[0]].target in CONV_FUNCTIONS
        found.append(
            Channels(
                name=part.name,
                positions=part.calls,
                channel_axis=1 if is_conv else -1,
                weights=weights,
                bias=None if bias is None else bias.data[part.rows],
            )
        )
    return found


def gain_of(part: Part) -> Tensor | None:
    if not isinstance(part.module, AngularLayer):
        return part.filters.data
    gain = part.module.gain
    return gain.data.view(-1)[part.rows] if part.has_gain and gain is not None else None
