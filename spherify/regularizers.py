"""Regularisers over the converted layers of a model: orthogonality and hyperspherical energy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from spherify.errors import ModelError, OptionError
from spherify.functional.energies import orthogonality_gap, pair_energy
from spherify.functional.precision import widened, without_autocast
from spherify.heads.angular import AngularHead
from spherify.layers.angular import AngularLayer


def orthogonality(
    model: nn.Module, *, normalized: bool = False, subtract_floor: bool = True, heads: bool = False
) -> Tensor:
    """Sum over the converted layers of ``|W^T W - I|_F^2``: how far their filters are from orthonormal.

    Filters of a grouped convolution are compared within their group (those of two groups see different channels),
    and queries, keys and values of an attention each among themselves. The authors add ``1e-4`` of it to the loss::

        loss = criterion(model(x), y) + 1e-4 * orthogonality(model)

    Args:
        normalized: compare directions alone; else the length of each filter is drawn to 1 too.
        subtract_floor: leave out what cannot be reached where a layer has more filters than dimensions, so that 0
            is the best value for every model.
        heads: count the class weights of angular heads too.

    Returns:
        One number of 0 or more, in float32 or wider.

    Raises:
        ModelError: the model has no converted layer.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, section 3.3.
    """
    return total(
        model, heads, lambda rows: orthogonality_gap(rows, normalized=normalized, subtract_floor=subtract_floor).sum()
    )


def hyperspherical_energy(
    model: nn.Module,
    *,
    s: int = 0,
    angular: bool = False,
    half_space: bool = False,
    rows: int | None = None,
    generator: torch.Generator | None = None,
    heads: bool = False,
) -> Tensor:
    """Sum over the converted layers of the mean energy of a pair of filters: small where they are spread evenly.

    Of grouped convolutions the mean over the groups; a layer with one filter a group has no pair and no energy.

    Args:
        s: power of the distance, 0 (logarithm), 1, 2.
        angular: of the angle instead of the distance.
        half_space: repel filters on one line, too.
        rows: at most so many filters of a layer are compared, drawn anew at each call: for wide layers.
        generator: for that draw, on the CPU.
        heads: count the class weights of angular heads too.

    Returns:
        One number, in float32 or wider; it can be negative for s = 0.

    Raises:
        ModelError: the model has no converted layer.
        OptionError: s is unknown, or ``rows`` is below 2.

    Source: Liu et al. 2018, Learning towards Minimum Hyperspherical Energy, arXiv:1805.09298, eq. 1 and 2.
    """
    if rows is not None and rows < 2:
        raise OptionError(f"rows={rows!r} leaves no pair of filters; give 2 or more.")

    def energy(filters: Tensor) -> Tensor:
        count = filters.shape[-2]
        if count < 2:
            return filters.new_zeros(())
        if rows is not None and rows < count:
            chosen = torch.randperm(count, generator=generator)[:rows]
            filters = filters.index_select(-2, chosen.to(filters.device, non_blocking=True))
        return pair_energy(filters, s=s, angular=angular, half_space=half_space).mean()

    return total(model, heads, energy)


def total(model: nn.Module, heads: bool, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of a measure over the layers."""
    values: list[Tensor] = []
    for layer in layers_of(model, heads):
        with without_autocast(layer.weight.device):
            values.append(measure(filters_by_group(layer)))
    if not values:
        raise ModelError(f"{type(model).__name__} has no converted layer; convert it with spherify(model) first.")
    device = values[0].device
    return torch.stack([value.to(device) for value in values]).sum()


def layers_of(model: nn.Module, heads: bool) -> Iterator[AngularLayer | AngularHead]:
    """Angular layers, one for each weight."""
    seen: set[int] = set()
    for module in model.modules():
        is_counted = isinstance(module, AngularLayer) or (heads and isinstance(module, AngularHead))
        if is_counted and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield module  # type: ignore[misc]


def filters_by_group(layer: AngularLayer | AngularHead) -> Tensor:
    """(G, n, d): the filters that see the same input, as rows."""
    filters = layer.filters() if isinstance(layer, AngularLayer) else layer.weight
    groups = 3 if isinstance(layer, nn.MultiheadAttention) else getattr(layer, "groups", 1)
    return widened(filters).flatten(1).unflatten(0, (groups, -1))
