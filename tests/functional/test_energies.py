"""Orthogonality and hyperspherical energy against loops over pairs, their floors and their gradients."""

import math

import pytest
import torch
from angular_samples import normal
from torch.testing import assert_close

from spherify.errors import OptionError
from spherify.functional.energies import Gram, orthogonality_gap, pair_energy

SHAPES = {"narrow": (1, 4, 9), "wide": (1, 9, 4), "grouped": (3, 5, 4), "square": (2, 4, 4)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("normalized", [False, True])
def test_the_gap_is_the_printed_norm(shape, normalized):
    filters = normal(*shape)
    rows = filters / filters.norm(dim=-1, keepdim=True) if normalized else filters
    columns = rows.transpose(-1, -2)  # the paper's W: a filter a column
    expected = (columns.transpose(-1, -2) @ columns - torch.eye(shape[1])).square().sum((-2, -1))
    assert_close(orthogonality_gap(filters, normalized=normalized, subtract_floor=False), expected)


@pytest.mark.parametrize("normalized", [False, True])
def test_orthonormal_filters_have_no_gap_and_a_tight_frame_stands_on_the_floor(normalized):
    square = torch.linalg.qr(normal(6, 6))[0][None]
    assert orthogonality_gap(square[:, :4], normalized=normalized).item() == pytest.approx(0.0, abs=1e-12)
    frame = torch.cat([square, torch.linalg.qr(normal(6, 6, seed=1))[0][None]], 1)  # 12 filters in 6 dimensions
    frame = frame if normalized else frame / math.sqrt(2)  # W W^T = I: what raw filters can reach
    floor = 12 * 6 / 6 if normalized else 6.0
    assert orthogonality_gap(frame, normalized=normalized).item() == pytest.approx(0.0, abs=1e-10)
    full = orthogonality_gap(frame, normalized=normalized, subtract_floor=False)
    assert full.item() == pytest.approx(floor, abs=1e-10)


@pytest.mark.parametrize("normalized", [False, True])
def test_no_filters_get_below_the_floor(normalized):
    for seed in range(20):
        assert orthogonality_gap(normal(1, 7, 3, seed=seed), normalized=normalized).item() >= -1e-9


def energy_by_loops(filters: torch.Tensor, s: int, angular: bool, half_space: bool) -> float:
    unit = filters / filters.norm(dim=-1, keepdim=True)

    def force(one: torch.Tensor, two: torch.Tensor) -> float:
        z = math.acos(float(one @ two)) if angular else float((one - two).norm())
        z = math.sqrt(z * z + 1e-4)
        return -math.log(z) if s == 0 else z**-s

    total, pairs = 0.0, 0
    for i in range(len(unit)):
        for j in range(len(unit)):
            if i != j:
                both = [force(unit[i], unit[j])] + ([force(unit[i], -unit[j])] if half_space else [])
                total, pairs = total + sum(both) / len(both), pairs + 1
    return total / pairs


@pytest.mark.parametrize("s", [0, 1, 2])
@pytest.mark.parametrize("angular", [False, True], ids=["distance", "angle"])
@pytest.mark.parametrize("half_space", [False, True], ids=["full", "half"])
def test_the_energy_is_the_mean_over_pairs(s, angular, half_space):
    filters = normal(2, 6, 5)
    found = pair_energy(filters, s=s, angular=angular, half_space=half_space)
    expected = [energy_by_loops(group, s, angular, half_space) for group in filters]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("s", [0, 1, 2])
def test_filters_far_apart_have_less_energy(s):
    simplex = torch.eye(5, dtype=torch.float64) - 0.2
    assert pair_energy(simplex[None], s=s).item() < pair_energy(normal(1, 5, 5), s=s).item()


@pytest.mark.parametrize("half_space", [False, True], ids=["full", "half"])
@pytest.mark.parametrize("angular", [False, True], ids=["distance", "angle"])
@pytest.mark.parametrize("s", [0, 1, 2])
def test_equal_opposite_and_empty_filters_have_finite_gradients(s, angular, half_space):
    row = normal(6).float()
    filters = torch.stack([row, row, -row, torch.zeros(6)])[None].requires_grad_()
    energy = pair_energy(filters, s=s, angular=angular, half_space=half_space)
    energy.sum().backward()
    assert energy.isfinite().all()
    assert filters.grad is not None and filters.grad.isfinite().all()


def test_gradients_of_first_and_second_order_are_right():
    filters = normal(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(Gram.apply, (filters,))
    assert torch.autograd.gradgradcheck(Gram.apply, (filters,))
    assert torch.autograd.gradcheck(lambda x: orthogonality_gap(x, normalized=True), (filters,))
    assert torch.autograd.gradcheck(lambda x: pair_energy(x, s=2, half_space=True), (filters,))


def test_an_unknown_power_and_a_single_filter_are_refused():
    with pytest.raises(OptionError, match=r"^s=3 is unknown; choose one of: 0, 1, 2\.$"):
        pair_energy(normal(1, 3, 3), s=3)
    with pytest.raises(OptionError, match=r"^an energy needs two filters or more, and there is 1\.$"):
        pair_energy(normal(1, 1, 3))
