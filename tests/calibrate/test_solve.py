"""The solves of the outputs: their slopes are true, they bring other images nearer, and they leave what they must."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, Residual, conv_bn, image
from torch import nn

from spherify import OptionError, calibrate, spherify
from spherify.calibrate.fresh import moved
from spherify.calibrate.held_out import take_mean_
from spherify.calibrate.outputs import FEWEST_IMAGES, Outputs, image_axes, outputs_of
from spherify.calibrate.pair import Pair
from spherify.calibrate.solve import Solves, drawn_group, play, ridge_solutions, shape_of_group, solve_outputs_
from spherify.calibrate.unknowns import Filters, unknowns_of

IMAGES = image(60, 3, 12, 12)
MANY = image(300, 3, 12, 12)
OTHERS = image(60, 3, 12, 12, seed=1)


@torch.no_grad()
def decided(donor: nn.Module) -> nn.Module:
    """With class probabilities that are far from even, as a trained network has them."""
    head = [module for module in donor.modules() if isinstance(module, nn.Linear)][-1]
    spread = donor(IMAGES).std(0)
    head.weight.mul_(2.0 / spread[:, None])
    head.bias.sub_(donor(IMAGES).mean(0))
    return donor


def residual_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [*conv_bn(3, 8), nn.ReLU(), Residual(8, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)]
    return decided(nn.Sequential(*layers).eval())


def without_norms() -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, stride=2, bias=False), nn.ReLU()]
    return decided(nn.Sequential(*convs, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)).eval())


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    patches = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2))
    net = FromFunction(
        lambda m, x: m.head(m.layer(m.patches(x).transpose(1, 2)).mean(1)),
        patches=patches,
        layer=layer,
        head=nn.Linear(16, 5),
    )
    return decided(net.eval())


def outputs_for(donor: nn.Module, images=IMAGES[:20], **options) -> Outputs:
    model = spherify(donor, example_input=images[:2], **options).eval()
    outputs = Outputs(Pair(model, donor, images.split(10), half=False), torch.Generator().manual_seed(0))
    outputs.draw(outputs.seen)
    return outputs


def error(model: nn.Module, donor: nn.Module, images=OTHERS) -> float:
    with torch.no_grad():
        answer, truth = model.eval()(images).log_softmax(1), donor(images).log_softmax(1)
    return float(F.kl_div(answer, truth, reduction="batchmean", log_target=True))


def solved(model: nn.Module, donor: nn.Module, images=IMAGES, **options):
    return solve_outputs_(Pair(model, donor, images.split(10), half=False), Solves(**options))


NETWORKS = {"residual": residual_net, "without norms": without_norms, "transformer": transformer}


# ---------------------------------------------------------------------------------------------- the slopes


@pytest.mark.parametrize("operator", ["cosine", "sigmoid"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_rows_say_how_each_images_outputs_change(network, operator):
    outputs = outputs_for(network(), operator=operator)
    run = outputs.pair.student.recorded
    unknowns, left = unknowns_of(run, 10**9, kept=True)
    axes = image_axes(outputs, {position for unknown in unknowns for position in unknown.positions})
    generator = torch.Generator().manual_seed(2)
    assert not left
    tested = 0
    for unknown in unknowns:
        if not all(position in axes for position in unknown.positions):
            continue
        played, before, sums = play(outputs, unknowns, axes, 0, 1)
        rows = unknown.rows(played)[0]
        change = 2e-4 * torch.randn(unknown.size, generator=generator)
        if isinstance(unknown, Filters) and unknown.part.is_angular:
            change = 0.1 * change
        start = [tensor.clone() for tensor in unknown.tensors]
        unknown.add_(change)
        after = outputs_of(outputs.pair.student, outputs.output, [0])[0]
        for tensor, value in zip(unknown.tensors, start, strict=True):
            tensor.copy_(value)
        expected = (sums[0] * (after - before)).sum(1)
        assert float((rows @ change - expected).norm()) < 0.05 * float(expected.norm()) + 1e-6, unknown.name
        tested += 1
    assert tested >= len(unknowns) - 1


def test_as_many_sums_as_outputs_hold_all_of_them():
    outputs = outputs_for(residual_net())
    difference = image(10, 5, 1, 1).flatten(1)
    sums = outputs.sums(difference, 9)
    assert sums.shape == (5, 10, 5)
    torch.testing.assert_close((sums * difference).sum(2).square().sum(0), difference.square().sum(1))


def test_images_along_the_second_axis_are_found():
    donor = FromFunction(
        lambda m, x: m.head(m.token(x.flatten(2).permute(2, 0, 1)).mean(0)),
        token=nn.Linear(3, 7),
        head=nn.Linear(7, 5),
    ).eval()
    outputs = outputs_for(donor)
    first, last = outputs.pair.student.recorded.layer_calls()
    assert image_axes(outputs, {first, last}) == {first: 1, last: 0}


# ---------------------------------------------------------------------------------------------- what it achieves


@torch.no_grad()
def disturbed(donor: nn.Module) -> nn.Module:
    """A transplanted model, the scales and offsets of which were changed at random."""
    model = spherify(donor, example_input=IMAGES[:2])
    calibrate(model, IMAGES, donor=donor, output_solves=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise * parameter.abs().mean())
    return model.eval()


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_disturbed_scales_are_made_up_for_on_images_not_seen(network):
    donor = network()
    model = disturbed(donor)
    before = error(model, donor)
    solved(model, donor, MANY)
    assert error(model, donor) < 0.5 * before


@torch.no_grad()
def test_outputs_that_are_maps_are_solved_too():
    torch.manual_seed(0)
    donor = nn.Sequential(*conv_bn(3, 8), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    model = disturbed(donor)
    before = (model(OTHERS) - donor(OTHERS)).norm()
    solved(model, donor, MANY)
    assert (model(OTHERS) - donor(OTHERS)).norm() < 0.7 * before


def test_the_report_says_what_was_solved():
    report = calibrate(spherify(residual_net(), example_input=IMAGES[:2]), MANY)
    assert any(note.startswith("Outputs solved for 1666 numbers") and " -> " in note for note in report.notes)


def test_it_is_part_of_the_default_and_can_be_left_out():
    states = []
    for options in ({}, {"output_solves": 8}, {"output_solves": 0}):
        model = spherify(residual_net(), example_input=IMAGES[:2])
        calibrate(model, MANY, **options)
        states.append(model[0].weight.clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_norms_have_the_statistics_of_their_inputs_afterwards():
    model = spherify(residual_net(), example_input=IMAGES[:2])
    calibrate(model, MANY)
    with torch.no_grad():
        inputs = model[0](MANY)
    torch.testing.assert_close(model[1].running_mean, inputs.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, inputs.var((0, 2, 3)), rtol=1e-2, atol=1e-5)


# ---------------------------------------------------------------------------------------------- changed images


def test_images_are_mirrored_and_moved_by_up_to_an_eighth_of_the_side():
    images = image(64, 2, 16, 8)
    changed = moved(images, torch.Generator().manual_seed(0))
    wider = F.pad(images, (1, 1, 2, 2), mode="reflect")
    seen = set()
    for number in range(len(images)):
        crops = {
            (mirrored, down, right): wider[number, :, down : down + 16, right : right + 8].flip([2] if mirrored else [])
            for mirrored in (False, True)
            for down in range(5)
            for right in range(3)
        }
        found = [key for key, crop in crops.items() if torch.equal(crop, changed[number])]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 20


def test_images_are_changed_anew_for_each_solve_and_are_themselves_again_at_the_end():
    donor = residual_net()
    outputs = outputs_for(donor, IMAGES)
    world = outputs.pair.student
    drawn = []
    for _ in range(2):
        outputs.draw(outputs.seen)
        drawn.append(torch.cat(world.batches[:4]))
        torch.testing.assert_close(outputs.truths[3], donor(world.batches[3]))
    assert not torch.equal(*drawn)
    assert outputs.held == [5, 4, 6, 7] and not torch.equal(world.batches[4], world.batches[7])
    torch.testing.assert_close(outputs.truths[7], donor(world.batches[7]))
    outputs.close()
    for batches in (world.batches, outputs.pair.donor.batches):
        assert torch.equal(torch.cat(batches), IMAGES)


def test_inputs_that_are_no_images_stay_as_they_are():
    donor = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    inputs = image(40, 6)
    outputs = outputs_for(donor, inputs)
    outputs.draw(outputs.seen)
    assert torch.equal(torch.cat(outputs.pair.student.batches), inputs)


def test_a_group_holds_no_more_images_than_wanted_and_no_batch_twice():
    outputs = outputs_for(residual_net(), IMAGES)
    assert sorted(drawn_group(outputs, 100)) == outputs.seen
    assert len(set(drawn_group(outputs, 25))) == 2
    assert len(drawn_group(outputs, 5)) == 1


# ---------------------------------------------------------------------------------------------- one solve


@pytest.mark.parametrize("unknowns", [40, 90], ids=["fewer unknowns than equations", "more"])
def test_a_solve_is_the_ridge_regression_of_its_equations(unknowns):
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(60, unknowns, generator=generator) * torch.logspace(-1, 1, unknowns)
    errors = torch.randn(60, generator=generator)
    ridges = (30.0, 0.1)
    size = slopes.double().square().sum() / 60
    for ridge, found in zip(ridges, ridge_solutions(slopes, errors, ridges), strict=True):
        below = (ridge * size).sqrt() * torch.eye(unknowns, dtype=torch.float64)
        padded = torch.cat([errors, torch.zeros(unknowns)]).double()[:, None]
        expected = torch.linalg.lstsq(torch.cat([slopes.double(), below]), padded).solution[:, 0]
        assert float((found - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.parametrize("unknowns", [40, 90])
def test_infinite_slopes_have_no_solution(unknowns):
    slopes = torch.randn(60, unknowns)
    slopes[3, 2] = float("inf")
    assert ridge_solutions(slopes, torch.randn(60), (1.0,)) == []


def test_equations_are_bounded_and_few_images_have_more_sums_each():
    assert shape_of_group(3600, 10, 2468) == (2, 4096)
    assert shape_of_group(240, 5, 1666) == (5, 1638)
    assert shape_of_group(800, 10, 2468) == (10, 819)
    assert shape_of_group(3600, 10, 53_120) == (2, 1411)  # a ResNet-50's scales and offsets
    assert shape_of_group(10**6, 1000, 10**9) == (2, 1)


def test_scales_and_offsets_alone_still_bring_other_images_nearer(monkeypatch):
    monkeypatch.setattr(importlib.import_module("spherify.calibrate.solve"), "MOST_NUMBERS", 300)
    donor = residual_net()
    model = disturbed(donor)
    before = error(model, donor)
    done = solved(model, donor, MANY)
    assert done.unknowns <= 300 and len(done.left) == 3
    assert error(model, donor) < 0.7 * before


# ---------------------------------------------------------------------------------------------- what it leaves


def test_plain_layers_stay_where_they_are_to_stay():
    donor = residual_net()
    model = spherify(donor, example_input=IMAGES[:2])
    before = copy.deepcopy(model[6].state_dict())
    first = model[0].weight.clone()
    solved(model, donor, refits_kept=False)
    assert all(torch.equal(value, before[name]) for name, value in model[6].state_dict().items())
    assert not torch.equal(model[0].weight, first)


def test_what_stands_in_front_of_converted_layers_stays():
    donor = residual_net()
    model = spherify(donor, exclude=["@stem"], example_input=IMAGES[:2])
    solved(model, donor)
    assert torch.equal(model[0].weight, donor[0].weight) and torch.equal(model[1].weight, donor[1].weight)


def test_weights_that_two_layers_share_stay():
    donor = without_norms()
    donor[2] = nn.Conv2d(8, 3, 3, padding=2, bias=False)
    donor.insert(4, nn.Conv2d(3, 8, 3))
    donor[4].weight = donor[0].weight
    model = spherify(donor, example_input=IMAGES[:2]).eval()
    before = model[0].weight.clone()
    assert solved(model, donor) is not None
    assert torch.equal(model[0].weight, before) and model[4].weight is model[0].weight


def test_filters_without_room_stay_and_are_named():
    run = outputs_for(residual_net()).pair.student.recorded
    every, _ = unknowns_of(run, 10**9, kept=True)
    most = sum(unknown.size for unknown in every) - 1
    unknowns, left = unknowns_of(run, most, kept=True)
    largest = max((u for u in every if isinstance(u, Filters)), key=lambda u: u.size)
    assert len(left) == 1 and left[0] not in [u.name for u in unknowns if isinstance(u, Filters)]
    assert run.model.get_submodule(left[0]).weight.numel() == largest.size


def test_too_few_images_are_not_solved():
    donor = residual_net()
    model = spherify(donor, example_input=IMAGES[:2])
    before = [parameter.clone() for parameter in model.parameters()]
    assert "39 images, and 40 are needed" in solved(model, donor, IMAGES[: FEWEST_IMAGES - 1]).problem
    assert all(map(torch.equal, before, model.parameters()))


def test_fewer_images_than_classes_are_not_solved_and_a_note_says_so():
    donor = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 50)).eval()
    model = spherify(donor, example_input=IMAGES[:2]).eval()
    report = calibrate(model, [IMAGES[:48]], donor=donor)
    assert any("48 images, fewer than the 50 classes" in note for note in report.notes)


def test_a_function_without_a_derivative_is_told_and_leaves_the_weights():
    donor = FromFunction(
        lambda m, x: m.head(torch.igamma(m.conv(x).abs() + 1.0, x.new_ones(())).mean((2, 3))),
        conv=nn.Conv2d(3, 8, 3),
        head=nn.Linear(8, 5),
    ).eval()
    weights = []
    for count in (0, 3):
        model = spherify(donor, example_input=IMAGES[:2], include=["conv"])
        report = calibrate(model, IMAGES, donor=donor, output_solves=count)
        weights.append(model.conv.weight)
    assert torch.equal(*weights)
    assert any("were not solved for" in note and "igamma" in note for note in report.notes)


@pytest.mark.parametrize("output", [lambda z: z.argmax(1, keepdim=True), lambda z: z.sum()])
def test_outputs_that_are_no_numbers_for_each_image_are_not_solved(output):
    donor = FromFunction(lambda m, x: output(m.conv(x).mean((2, 3))), conv=nn.Conv2d(3, 8, 3)).eval()
    model = spherify(donor, example_input=IMAGES[:2], include=["conv"], head="convert")
    assert solved(model, donor) is None


def test_a_negative_number_of_solves_is_refused():
    with pytest.raises(OptionError, match="output_solves=-1 is negative; choose 0 for none"):
        calibrate(spherify(residual_net(), example_input=IMAGES[:2]), IMAGES, output_solves=-1)


@torch.no_grad()
def test_the_mean_of_the_last_states_is_taken_where_it_has_less_loss():
    donor = residual_net()
    outputs = outputs_for(donor, MANY[:100])
    unknowns, _ = unknowns_of(outputs.pair.student.recorded, 10**6, kept=True)
    tensors = [tensor for unknown in unknowns for tensor in unknown.tensors]
    middle = [tensor.clone() for tensor in tensors]
    away = [0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) for tensor in tensors]
    states = [[value + sign * step for value, step in zip(middle, away, strict=True)] for sign in (1.0, -1.0)]
    loss_between = outputs.loss()
    for tensor, value in zip(tensors, states[-1], strict=True):
        tensor.copy_(value)
    loss_at_last = outputs.loss()
    assert loss_between < loss_at_last
    assert take_mean_(outputs, unknowns, states, loss_at_last) == pytest.approx(loss_between, rel=1e-4)
    for tensor, value in zip(tensors, middle, strict=True):
        torch.testing.assert_close(tensor, value)
    kept = [tensor.clone() for tensor in tensors]
    assert take_mean_(outputs, unknowns, states, loss_between / 2) == loss_between / 2
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, kept, strict=True))
