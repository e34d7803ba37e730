"""Rows count by how much the donor's outputs depend on them."""

import pytest
import torch
from networks import FromFunction, conv_bn, image
from torch import nn

from spherify import calibrate, spherify
from spherify.calibrate.pair import Gatherer, Pair
from spherify.calibrate.parts import parts_of
from spherify.calibrate.regression import Equations, Samples, chosen_equations, scale_and_shift
from spherify.calibrate.slopes import row_weights

IMAGES = image(60, 3, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [*conv_bn(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)]
    return nn.Sequential(*layers).eval()


def pair_for(donor: nn.Module, images: torch.Tensor = IMAGES, batch: int = 20) -> Pair:
    model = spherify(donor, example_input=images[:2]).eval()
    return Pair(model, donor, images.split(batch), half=False)


def test_as_many_sums_as_outputs_give_the_length_of_the_slopes():
    donor = net()
    pair = pair_for(donor)
    parts = parts_of(pair.student.recorded, kept=True)
    weights = row_weights(pair, parts, seed=0)
    assert set(weights) == {answer for part in parts for answer in part.answers}
    part = next(part for part in parts if part.name == "3")
    values = donor[3](donor[:3](IMAGES[:20])).detach().double().requires_grad_()
    rest = donor[4:].double()
    squares = torch.zeros(20, 6, 6).double()
    for number in range(5):
        (slope,) = torch.autograd.grad(rest(values)[:, number].sum(), values)
        squares += slope.square().sum(1)
    found = weights[part.answers[0]][0].double().unflatten(0, (20, 6, 6))
    assert found.shape == squares.shape
    # four of five sums are taken: every position keeps between none and all of it, and four fifths in the mean
    share = (found.square() / squares).flatten()
    assert share.max() <= 1.02 and share.min() >= 0.0
    assert share.mean() == pytest.approx(0.8, abs=0.03)


def test_rows_get_the_weights_of_their_positions_with_a_mean_of_one():
    donor = net()
    pair = pair_for(donor)
    part = next(part for part in parts_of(pair.student.recorded, kept=True) if part.is_angular)
    weights = row_weights(pair, [part], seed=0)
    pair.student.want([len(pair.student.recorded.nodes) - 1])
    pair.donor.want([len(pair.donor.recorded.nodes) - 1])
    gatherer = Gatherer(pair, part, rows_wanted=10**6, corrects=True, seed=0, weights=weights)
    gatherer.gather()
    samples, _ = gatherer.samples(one_sided=True)
    every = torch.cat(weights[part.answers[0]]).float()
    assert samples.weights is not None and samples.weights.mean() == pytest.approx(1.0, abs=1e-4)
    expected = (every / every.mean() + 0.01) / 1.01
    torch.testing.assert_close(samples.weights, expected)


@pytest.mark.parametrize("centred", [True, False])
def test_a_weight_of_two_is_a_row_given_twice(centred):
    generator = torch.Generator().manual_seed(0)
    rows, targets = torch.randn(2, 30, 4, generator=generator), torch.randn(2, 30, 3, generator=generator)
    weights = torch.ones(30)
    weights[:10] = 2.0
    twice = [torch.cat([values[:, :10], values], 1) for values in (rows, targets)]
    prior = torch.randn(2, 3, 4, generator=generator)
    line = Equations(rows, 0.1, centred, weights=weights).solve(targets, prior)
    other = Equations(twice[0], 0.1, centred).solve(twice[1], prior)
    torch.testing.assert_close(line.weight, other.weight)
    torch.testing.assert_close(line.offset, other.offset)
    found = scale_and_shift(rows[..., :3], targets, centred=centred, weights=weights)
    wanted = scale_and_shift(twice[0][..., :3], twice[1], centred=centred)
    torch.testing.assert_close(found, wanted)


def test_held_out_rows_of_no_weight_do_not_choose_the_ridge():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 100, 30, generator=generator)
    targets = rows[..., :1] + 1e-3 * torch.randn(1, 100, 1, generator=generator)
    spoilt = targets.clone()
    spoilt[:, 90:] = 0.0  # as if a large ridge were best
    weights = torch.ones(100)
    weights[90:] = 1e-6
    prior = torch.zeros(1, 1, 30)
    equations, sums = chosen_equations(Samples(rows, spoilt, weights=weights), prior, (1e-6, 1e3), centred=True)
    line = equations.solve_for(sums, prior)
    assert equations.chosen == 1e-6
    torch.testing.assert_close(line.weight[0, 0, 0], torch.tensor(1.0), atol=0.01, rtol=0.0)


def test_there_are_none_with_fewer_images_than_classes():
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 70)).eval()
    pair = pair_for(wide)
    assert row_weights(pair, parts_of(pair.student.recorded, kept=True), seed=0) == {}


def test_there_are_none_where_a_function_has_no_derivative(monkeypatch):
    pair = pair_for(net())
    parts = parts_of(pair.student.recorded, kept=True)
    call = pair.donor.call

    def failing(number, step):
        value = call(number, step)
        value.register_hook(fail) if value.requires_grad else None
        return value

    def fail(gradient):
        raise RuntimeError("derivative for this is not implemented")

    monkeypatch.setattr(pair.donor, "call", failing)
    assert row_weights(pair, parts, seed=0) == {}
    assert all(list(values) == [0] for values in pair.donor.values)  # nothing is left of the graph


def test_a_layer_on_which_nothing_depends_is_fitted_as_without_weights():
    torch.manual_seed(0)
    donor = FromFunction(
        lambda m, x: (m.head(m.conv(x).flatten(1)), m.other(x)),
        conv=nn.Conv2d(3, 4, 3),
        head=nn.Linear(144, 5),
        other=nn.Conv2d(3, 4, 3),
    ).eval()
    model = spherify(donor, example_input=IMAGES[:2], include=["conv", "other"]).eval()
    report = calibrate(model, IMAGES, donor=donor, output_solves=0)
    fits = {fit.name: fit for fit in report.layers}
    assert fits["other"].error < 1.0 and torch.isfinite(model(IMAGES)[1]).all()
