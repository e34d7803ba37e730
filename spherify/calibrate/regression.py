"""Ridge regression of many outputs on shared rows, with one-sided targets, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spherify.errors import SpherifyError

ROWS_AT_ONCE = 8192
STRIP = 512  # columns of a matrix of products that are computed at once
LEAST_RIDGE = 1e-6
WIDE = 2000  # inputs; beyond, a factorisation takes seconds, and every other ridge is tried
HELD_OUT = 0.2  # of the rows, to choose the ridge by


@dataclass
class Samples:
    """What one layer is fitted to, group by group.

    Attributes:
        rows: (G, R, D) inputs.
        targets: (G, R, O/G) what the layer should answer.
        beside: (G, R, O/G) what is added to the answer before the activation, or None where nothing is.
        low, high: bounds of the activation; beyond them it is flat, and any answer beyond is as good.
        weights: (R,) of the rows, 1 in the mean, or None where all count alike.
    """

    rows: Tensor
    targets: Tensor
    beside: Tensor | None = None
    low: float | None = None
    high: float | None = None
    weights: Tensor | None = None

    @property
    def is_one_sided(self) -> bool:
        return self.low is not None or self.high is not None

    def targets_near(self, answers: Tensor) -> Tensor:
        """The targets, moved to the answers wherever the activation does not tell the two apart."""
        beside = 0.0 if self.beside is None else self.beside
        moved = self.targets
        if self.low is not None:
            floor = self.low - beside
            moved = torch.where(self.targets <= floor, torch.minimum(answers, torch.as_tensor(floor)), moved)
        if self.high is not None:
            ceiling = self.high - beside
            moved = torch.where(self.targets >= ceiling, torch.maximum(answers, torch.as_tensor(ceiling)), moved)
        return moved


@dataclass
class Line:
    """An affine map, group by group: weight (G, O/G, D), offset (G, O/G)."""

    weight: Tensor
    offset: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.baddbmm(self.offset[:, None], rows, self.weight.mT)


@dataclass
class Sums:
    """What a solve needs to know of its targets.

    Attributes:
        products: (G, D, O/G) sums of rows times targets.
        targets: (G, O/G) sums of targets.
    """

    products: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Tensor, targets: Tensor, weights: Tensor | None = None) -> Sums:
        return cls(products(rows, targets, weights), totals(targets, weights))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.products + other.products, self.targets + other.targets)


class Equations:
    """The normal equations of shared rows, factorised once for any number of targets.

    Args:
        rows: (G, R, D).
        ridge: relative to the mean square of a centred input.
        centred: fit an offset too.
        squares: (G, D, D) sums of products of the rows, where they are known.
        weights: (R,) of the rows.
    """

    def __init__(
        self,
        rows: Tensor,
        ridge: float,
        centred: bool,
        *,
        squares: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.rows, self.centred, self.weights = rows, centred, weights
        self.count = float(rows.shape[1] if weights is None else weights.double().sum())
        self.mean = rows.new_zeros(rows.shape[::2], dtype=torch.double)
        if centred:
            self.mean = totals(rows, weights) / self.count
        self.squares = squares_of(rows, weights) if squares is None else squares
        self.gram = self.squares - self.count * self.mean[:, :, None] * self.mean[:, None]
        self.size = self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12 * self.count)
        self.factorise(ridge)

    def factorise(self, ridge: float) -> None:
        """Raises SpherifyError where the rows are not finite."""
        self.chosen = ridge
        while ridge < 1e12:  # with fewer rows than inputs, rounding may call for a larger ridge than was asked for
            gram = self.gram.clone()
            self.ridge = ridge * self.size
            gram.diagonal(dim1=1, dim2=2).add_(self.ridge[:, None])
            self.factor, failures = torch.linalg.cholesky_ex(gram)
            if not failures.any():
                return
            ridge = max(10.0 * ridge, LEAST_RIDGE)
        raise SpherifyError("a layer's activations are not finite; check the calibration images and the donor.")

    def solve(self, targets: Tensor, prior: Tensor) -> Line:
        """The map with the least squared error, drawn towards ``prior`` (G, O/G, D) by the ridge."""
        return self.solve_for(Sums.of(self.rows, targets, self.weights), prior)

    def solve_for(self, sums: Sums, prior: Tensor) -> Line:
        """The same, of the targets with these sums."""
        target_mean = sums.targets / self.count if self.centred else torch.zeros_like(sums.targets)
        right = sums.products - self.count * self.mean[:, :, None] * target_mean[:, None]
        right += self.ridge[:, None, None] * prior.mT.double()
        weight = torch.cholesky_solve(right, self.factor).mT  # (G, O/G, D)
        offset = target_mean - (weight @ self.mean[:, :, None])[:, :, 0]
        return Line(weight.to(self.rows.dtype), offset.to(self.rows.dtype))


def weighted_blocks(rows: Tensor, weights: Tensor | None) -> Iterator[Tensor]:
    """(G, some rows, D) blocks one after the other, each row times its weight."""
    for first, block in enumerate(rows.split(ROWS_AT_ONCE, 1)):
        start = first * ROWS_AT_ONCE
        yield block if weights is None else block * weights[start : start + ROWS_AT_ONCE, None].to(block)


def products(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """(G, D, O) sums over the rows, in float64 from blocks in the type of the rows."""
    total = left.new_zeros(left.shape[0], left.shape[2], right.shape[2], dtype=torch.float64)
    for a, b in zip(left.split(ROWS_AT_ONCE, 1), weighted_blocks(right, weights), strict=True):
        total += a.mT @ b
    return total


def squares_of(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """(G, D, D) sums of products of the rows with themselves: strips of the lower half, mirrored."""
    groups, _, width = rows.shape
    total = rows.new_zeros(groups, width, width, dtype=torch.float64)
    for block, weighted in zip(rows.split(ROWS_AT_ONCE, 1), weighted_blocks(rows, weights), strict=True):
        for start in range(0, width, STRIP):
            strip = weighted[:, :, start : start + STRIP]
            end = start + strip.shape[2]
            total[:, start:end, :end] += strip.mT @ block[:, :, :end]
    for start in range(STRIP, width, STRIP):
        total[:, :start, start : start + STRIP] = total[:, start : start + STRIP, :start].mT
    return total


def totals(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """(G, O) sums of (G, R, O) over the rows, summed as ``products`` are."""
    return products(values.new_ones(values.shape[0], values.shape[1], 1), values, weights)[:, 0]


def chosen_equations(
    samples: Samples, prior: Tensor, ridges: Sequence[float], *, centred: bool
) -> tuple[Equations, Sums]:
    """The equations of all rows, with the ridge whose map, fitted to the first, errs least on the last of them.

    Rows are in the order of the images, so that the last ones are of other images.
    """
    rows, targets, weights = samples.rows, samples.targets, samples.weights
    count = rows.shape[1]
    kept = count - max(1, int(HELD_OUT * count))
    if len(ridges) == 1 or kept < 2:
        return Equations(rows, ridges[0], centred, weights=weights), Sums.of(rows, targets, weights)
    ridges = ridges[1::2] if rows.shape[2] > WIDE and len(ridges) > 3 else ridges
    seen, unseen = (None, None) if weights is None else (weights[:kept], weights[kept:])
    equations = Equations(rows[:, :kept], ridges[0], centred, weights=seen)
    sums = Sums.of(rows[:, :kept], targets[:, :kept], seen)
    held, truth = rows[:, kept:], targets[:, kept:]
    errors = []
    for ridge in ridges:
        if ridge != equations.chosen:
            equations.factorise(ridge)
        squared = (equations.solve_for(sums, prior)(held) - truth).square()
        errors.append(float((squared if unseen is None else squared * unseen[:, None]).mean()))
    best, squares = ridges[errors.index(min(errors))], equations.squares
    del equations  # four matrices of D x D
    squares += squares_of(held, unseen)
    return Equations(rows, best, centred, squares=squares, weights=weights), sums + Sums.of(held, truth, unseen)


def fitted(
    samples: Samples, prior: Tensor, *, ridges: Sequence[float], rounds: int, centred: bool
) -> tuple[Line, Tensor]:
    """The affine map that answers the samples best, and the targets as they stood at last.

    One-sided targets are moved to the answers where the activation is flat, and the map is solved again, ``rounds``
    times; each round lowers the one-sided error (it minimises an upper bound that touches it).
    """
    equations, sums = chosen_equations(samples, prior, ridges, centred=centred)
    targets = samples.targets
    line = equations.solve_for(sums, prior)
    for _ in range(rounds if samples.is_one_sided else 0):
        targets = samples.targets_near(line(samples.rows))
        line = equations.solve(targets, prior)
    return line, targets


def scale_and_shift(
    values: Tensor, targets: Tensor, *, centred: bool, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """For each output, the factor and offset that bring values nearest to targets: (G, R, O) to twice (G, O)."""
    weight = 1.0 if weights is None else weights[:, None].to(values) / weights.mean()
    if not centred:
        scale = (weight * values * targets).sum(1) / (weight * values.square()).sum(1).clamp_min(1e-20)
        return scale, torch.zeros_like(scale)
    value_mean, target_mean = (weight * values).mean(1), (weight * targets).mean(1)
    spread = values - value_mean[:, None]
    products = (weight * spread * (targets - target_mean[:, None])).sum(1)
    scale = products / (weight * spread.square()).sum(1).clamp_min(1e-20)
    return scale, target_mean - scale * value_mean
