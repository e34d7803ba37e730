"""Ridge regression of many outputs on shared rows, with one-sided targets, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spherify.errors import SpherifyError

ROWS_AT_ONCE = 8192
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
    """

    rows: Tensor
    targets: Tensor
    beside: Tensor | None = None
    low: float | None = None
    high: float | None = None

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


class Equations:
    """The normal equations of shared rows, factorised once for any number of targets.

    Args:
        rows: (G, R, D).
        ridge: relative to the mean square of a centred input.
        centred: fit an offset too.
        products: (G, D, D) sums of products of the rows, where they are known.
    """

    def __init__(self, rows: Tensor, ridge: float, centred: bool, *, products: Tensor | None = None) -> None:
        self.rows, self.centred = rows, centred
        count = rows.shape[1]
        self.mean = rows.new_zeros(rows.shape[::2], dtype=torch.double)
        if centred:
            self.mean = rows.mean(1, dtype=torch.float64)
        self.raw = self.products(rows, rows) if products is None else products
        self.gram = self.raw - count * self.mean[:, :, None] * self.mean[:, None]
        self.size = self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12 * count)
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

    @staticmethod
    def products(left: Tensor, right: Tensor) -> Tensor:
        """(G, D, O) sums over the rows, in float64 from blocks in the type of the rows."""
        total = left.new_zeros(left.shape[0], left.shape[2], right.shape[2], dtype=torch.float64)
        for a, b in zip(left.split(ROWS_AT_ONCE, 1), right.split(ROWS_AT_ONCE, 1), strict=True):
            total += a.mT @ b
        return total

    def solve(self, targets: Tensor, prior: Tensor) -> Line:
        """The map with the least squared error, drawn towards ``prior`` (G, O/G, D) by the ridge."""
        rows, count = self.rows, self.rows.shape[1]
        if self.centred:
            target_mean = targets.mean(1, dtype=torch.float64)
        else:
            target_mean = torch.zeros_like(prior[:, :, 0], dtype=torch.double)
        right = self.products(rows, targets) - count * self.mean[:, :, None] * target_mean[:, None]
        right += self.ridge[:, None, None] * prior.mT.double()
        weight = torch.cholesky_solve(right, self.factor).mT  # (G, O/G, D)
        offset = target_mean - (weight @ self.mean[:, :, None])[:, :, 0]
        return Line(weight.to(rows.dtype), offset.to(rows.dtype))


def chosen_equations(samples: Samples, prior: Tensor, ridges: Sequence[float], *, centred: bool) -> Equations:
    """The equations of all rows, with the ridge whose map, fitted to the first, errs least on the last of them.

    Rows are in the order of the images, so that the last ones are of other images.
    """
    rows, targets = samples.rows, samples.targets
    count = rows.shape[1]
    kept = count - max(1, int(HELD_OUT * count))
    if len(ridges) == 1 or kept < 2:
        return Equations(rows, ridges[0], centred)
    ridges = ridges[1::2] if rows.shape[2] > WIDE and len(ridges) > 3 else ridges
    equations = Equations(rows[:, :kept], ridges[0], centred)
    held, truth = rows[:, kept:], targets[:, kept:]
    errors = []
    for ridge in ridges:
        equations.factorise(ridge)
        errors.append(float((equations.solve(targets[:, :kept], prior)(held) - truth).square().mean()))
    best = ridges[errors.index(min(errors))]
    return Equations(rows, best, centred, products=equations.raw + Equations.products(held, held))


def fitted(
    samples: Samples, prior: Tensor, *, ridges: Sequence[float], rounds: int, centred: bool
) -> tuple[Line, Tensor]:
    """The affine map that answers the samples best, and the targets as they stood at last.

    One-sided targets are moved to the answers where the activation is flat, and the map is solved again, ``rounds``
    times; each round lowers the one-sided error (it minimises an upper bound that touches it).
    """
    equations = chosen_equations(samples, prior, ridges, centred=centred)
    targets = samples.targets
    line = equations.solve(targets, prior)
    for _ in range(rounds if samples.is_one_sided else 0):
        targets = samples.targets_near(line(samples.rows))
        line = equations.solve(targets, prior)
    return line, targets


def scale_and_shift(values: Tensor, targets: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """For each output, the factor and offset that bring values nearest to targets: (G, R, O) to twice (G, O)."""
    if not centred:
        scale = (values * targets).sum(1) / values.square().sum(1).clamp_min(1e-20)
        return scale, torch.zeros_like(scale)
    value_mean, target_mean = values.mean(1), targets.mean(1)
    spread = values - value_mean[:, None]
    scale = (spread * (targets - target_mean[:, None])).sum(1) / spread.square().sum(1).clamp_min(1e-20)
    return scale, target_mean - scale * value_mean
