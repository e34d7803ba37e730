"""Ridge regression against torch.linalg.lstsq in float64; one-sided targets lower the one-sided error."""

import pytest
import torch

from spherify.calibrate.regression import (
    Equations,
    Samples,
    chosen_equations,
    fitted,
    products,
    scale_and_shift,
    squares_of,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_without_a_ridge_it_is_least_squares(centred, groups):
    rows, targets = random(groups, 200, 6) + 0.5, random(groups, 200, 4, seed=1)
    line = Equations(rows, 1e-12, centred).solve(targets, torch.zeros(groups, 4, 6).double())
    design = torch.cat([rows, torch.ones(groups, 200, 1)], 2) if centred else rows
    expected = torch.linalg.lstsq(design, targets).solution  # (G, D (+ 1), O)
    torch.testing.assert_close(line.weight, expected[:, :6].mT, rtol=1e-6, atol=1e-8)
    if centred:
        torch.testing.assert_close(line.offset, expected[:, 6], rtol=1e-6, atol=1e-8)
    else:
        assert not line.offset.any()


def test_a_large_ridge_gives_the_prior():
    rows, targets, prior = random(1, 100, 5), random(1, 100, 3, seed=1), random(1, 3, 5, seed=2)
    line = Equations(rows, 1e9, True).solve(targets, prior)
    torch.testing.assert_close(line.weight, prior, rtol=1e-5, atol=1e-5)


def test_fewer_rows_than_inputs_are_solved_with_a_larger_ridge():
    rows = random(1, 5, 40).float()
    line = Equations(rows, 0.0, True).solve(random(1, 5, 2).float(), torch.zeros(1, 2, 40))
    assert line.weight.isfinite().all()


def one_sided_error(answers, targets):
    return float((answers.clamp_min(0) - targets.clamp_min(0)).square().sum())


def test_one_sided_targets_fit_what_the_relu_shows():
    rows = random(1, 400, 5)
    truth = rows @ random(1, 5, 6, seed=1) + 0.5 * random(1, 400, 6, seed=2).abs() - 1
    prior = torch.zeros(1, 6, 5).double()
    errors = []
    for rounds in (0, 2, 20):
        line, _ = fitted(Samples(rows, truth, low=0.0), prior, ridges=(1e-9,), rounds=rounds, centred=True)
        errors.append(one_sided_error(line(rows), truth))
    assert errors[0] > errors[1] > errors[2]


def test_what_stands_beside_shifts_the_bound():
    samples = Samples(torch.zeros(1, 1, 1), torch.tensor([[[-3.0]]]), beside=torch.tensor([[[2.0]]]), low=0.0)
    # the sum of target and summand is -1: any answer below -2 is as good
    assert samples.targets_near(torch.tensor([[[-5.0]]])).item() == -5.0
    assert samples.targets_near(torch.tensor([[[1.0]]])).item() == -2.0


def test_both_bounds_of_a_clipped_activation():
    samples = Samples(torch.zeros(1, 1, 1), torch.tensor([[[9.0, 3.0, -1.0]]]), low=0.0, high=6.0)
    moved = samples.targets_near(torch.tensor([[[7.0, 8.0, 1.0]]]))
    torch.testing.assert_close(moved, torch.tensor([[[7.0, 3.0, 0.0]]]))


def test_scale_and_shift_recover_a_line():
    values = random(2, 50, 3)
    scale, shift = scale_and_shift(values, 3 * values - 2, centred=True)
    torch.testing.assert_close(scale, torch.full((2, 3), 3.0).double())
    torch.testing.assert_close(shift, torch.full((2, 3), -2.0).double())


def test_the_ridge_is_chosen_by_what_was_held_out():
    rows, prior = random(1, 60, 50), torch.zeros(1, 1, 50).double()
    signal = rows[:, :, :1] * 1.0
    of_signal, sums = chosen_equations(Samples(rows, signal), signal.new_zeros(1, 1, 50), (1e-4, 1e3), centred=True)
    assert of_signal.chosen == 1e-4
    torch.testing.assert_close(sums.products, rows.mT @ signal)
    torch.testing.assert_close(sums.targets, signal.sum(1))
    of_noise, _ = chosen_equations(Samples(rows, random(1, 60, 1, seed=5)), prior, (1e-4, 1e3), centred=True)
    assert of_noise.chosen == 1e3


@pytest.mark.parametrize("width", [1, 512, 513, 1100])
def test_products_of_rows_with_themselves_are_those_of_any_two(width):
    rows = random(2, 40, width)
    torch.testing.assert_close(squares_of(rows), products(rows, rows))
