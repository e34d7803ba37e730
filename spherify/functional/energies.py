"""How far a set of filters is from orthogonal, and how evenly it is spread over the sphere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spherify.errors import OptionError
from spherify.functional.precision import widened
from spherify.functional.responses import angle_from_equator

PAIR_GUARD = 1e-4  # added to squared distances and angles: two equal filters repel each other with a finite force
LENGTH_GUARD = 1e-12  # inside the root: a filter of zeros has cosine 0 with every other
POWERS = (0, 1, 2)


class Gram(torch.autograd.Function):
    """``x @ x^T`` over the last two dimensions, with one product in the backward pass where autograd takes two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.transpose(-1, -2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (gradient + gradient.transpose(-1, -2)) @ x


def unit_rows(filters: Tensor) -> Tensor:
    return filters * torch.rsqrt(filters.square().sum(-1, keepdim=True) + LENGTH_GUARD)


def orthogonality_gap(filters: Tensor, *, normalized: bool = False, subtract_floor: bool = True) -> Tensor:
    """``|W^T W - I|_F^2`` of each set of filters, W with a filter a column.

    With n filters in d < n dimensions it cannot reach zero: its least value is n - d, and ``n (n - d) / d`` where the
    filters are normalised first. The Gram matrix of the smaller side is taken: ``|W W^T - I|^2`` is less by just
    n - d, the floor.

    Args:
        filters: (G, n, d), the n filters of each of G groups as rows.
        normalized: of the filters at length one, so that their lengths do not count.
        subtract_floor: leave out what no filters can do away with.

    Returns:
        (G), 0 or more.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, section 3.3.
    """
    rows = widened(filters)
    if normalized:
        rows = unit_rows(rows)
    n, d = rows.shape[-2:]
    is_wide = n > d
    gram = Gram.apply(rows.transpose(-1, -2) if is_wide else rows)
    gap = (gram - torch.eye(min(n, d), dtype=gram.dtype, device=gram.device)).square().sum((-2, -1))
    if not is_wide:
        return gap
    gap = gap + (n - d)
    floor = n * (n - d) / d if normalized else n - d
    return gap - floor if subtract_floor else gap


def pair_energy(filters: Tensor, *, s: int = 0, angular: bool = False, half_space: bool = False) -> Tensor:
    """Hyperspherical energy of each set of filters: the mean over its pairs of ``z ** -s``, for s = 0 of ``-log z``.

    z is the distance of two normalised filters, or with ``angular`` the angle between them; both squares have 1e-4
    added. With ``half_space`` each filter w counts as w and -w, so that filters on one line repel too; the constant
    pairs (w, -w) are left out.

    Args:
        filters: (G, n, d), the n filters of each of G groups as rows; n of 2 or more.
        s: 0, 1, 2.

    Returns:
        (G).

    Raises:
        OptionError: s is another number, or there is no pair.

    Source: Liu et al. 2018, Learning towards Minimum Hyperspherical Energy, arXiv:1805.09298, eq. 1 and 2.
    """
    if s not in POWERS:
        raise OptionError(f"s={s!r} is unknown; choose one of: {', '.join(map(str, POWERS))}.")
    n = filters.shape[-2]
    if n < 2:
        raise OptionError(f"an energy needs two filters or more, and there is {n}.")
    cosine = Gram.apply(unit_rows(widened(filters)))
    above = torch.ones(n, n, dtype=torch.bool, device=cosine.device).triu(1)
    cosine = cosine[..., above]
    energy = repulsion(cosine, s, angular)
    if half_space:
        energy = (energy + repulsion(-cosine, s, angular)) / 2
    return energy.mean(-1)


def repulsion(cosine: Tensor, s: int, angular: bool) -> Tensor:
    """``z ** -s`` or ``-log z`` of pairs by their cosine."""
    if angular:
        squared = (math.pi / 2 - angle_from_equator(cosine)).square()
    else:
        squared = (2.0 - 2.0 * cosine).clamp_min(0.0)
    squared = squared + PAIR_GUARD
    return -0.5 * torch.log(squared) if s == 0 else squared ** (-s / 2)
