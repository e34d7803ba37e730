"""Filters that may change along few directions only: those in which most of their slopes lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spherify.calibrate.unknowns import Filters, Played, Unknown

SHARES = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)  # tried from the first on


@dataclass(frozen=True, kw_only=True, eq=False)
class Subspace:
    """Filters that change by ``left @ change @ right.T`` alone.

    Attributes:
        filters: (O, D) of a layer.
        left, right: (O, o) and (D, d), orthonormal columns.
    """

    filters: Filters
    left: Tensor
    right: Tensor

    @property
    def name(self) -> str:
        return self.filters.name

    @property
    def positions(self) -> tuple[int, ...]:
        return self.filters.positions

    @property
    def size(self) -> int:
        return self.left.shape[1] * self.right.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        return self.filters.tensors

    def rows(self, played: Played) -> Tensor:
        """(R, images, size): how each sum changes with each unknown."""
        rows = self.filters.rows(played).unflatten(2, (len(self.left), -1))
        return (self.left.T @ (rows @ self.right)).flatten(2)

    def spread(self, squares: Tensor) -> Tensor:
        """(size,) the number that all filters of the layer would have, were the rest of their slopes nothing."""
        return (squares.sum() / self.filters.size).expand_as(squares)

    def add_(self, change: Tensor) -> None:
        self.filters.add_((self.left @ change.view(self.left.shape[1], -1) @ self.right.T).flatten())


class Sides:
    """The directions of a layer's slopes, on either side of its weight, those that matter most first.

    Args:
        filters: (O, D).
        rows: (equations, O D), how some sums change with them.
    """

    def __init__(self, filters: Filters, rows: Tensor) -> None:
        self.filters = filters
        slopes = rows.unflatten(1, (filters.part.filters.shape[0], -1))
        self.left = self.directions(slopes.transpose(1, 2).flatten(0, 1))
        self.right = self.directions(slopes.flatten(0, 1))

    @staticmethod
    def directions(slopes: Tensor) -> tuple[Tensor, Tensor]:
        """The share of the squares that the first directions hold, (D,), and the directions, (D, D)."""
        values, vectors = torch.linalg.eigh((slopes.T @ slopes).double())
        shares = values.flip(0).clamp_min(0.0).cumsum(0)
        return shares / shares[-1].clamp_min(1e-30), vectors.flip(1).to(slopes)

    def counts(self, share: float) -> tuple[int, int]:
        left, right = (min(int((shares < share).sum()) + 1, len(shares)) for shares, _ in (self.left, self.right))
        return left, right

    def within(self, share: float) -> Subspace:
        left, right = self.counts(share)
        return Subspace(
            filters=self.filters,
            left=self.left[1][:, :left].contiguous(),
            right=self.right[1][:, :right].contiguous(),
        )


Solvable = Unknown | Subspace


def narrowed(unknowns: Sequence[Unknown], rows: Sequence[Tensor], limit: int) -> list[Solvable]:
    """The unknowns, filters in subspaces with the largest share of the slopes' squares that ``limit`` numbers hold.

    Args:
        unknowns: with ``limit`` numbers or fewer, they are left as they are.
        rows: (equations, size) of each, how some sums change with it.
    """
    if sum(unknown.size for unknown in unknowns) <= limit:
        return list(unknowns)
    sides = {
        unknown: Sides(unknown, slopes)
        for unknown, slopes in zip(unknowns, rows, strict=True)
        if isinstance(unknown, Filters)
    }
    fixed = sum(unknown.size for unknown in unknowns if unknown not in sides)
    for share in SHARES:
        counts = [side.counts(share) for side in sides.values()]
        if fixed + sum(left * right for left, right in counts) <= limit:
            break
    return [sides[unknown].within(share) if isinstance(unknown, Filters) else unknown for unknown in unknowns]
