"""What each converted layer costs alone."""

import copy

import pytest
import torch
from networks import FromFunction, Residual, conv_bn, image, small_net
from torch import nn

from spherify import ModelError, calibrate, load, save, spherify
from spherify.calibrate.effects import Effect, Effects
from spherify.calibrate.sensitivity import sensitivity

IMAGES = image(32, 3, 8, 8)


def donor_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [*conv_bn(3, 8), nn.ReLU(), Residual(8, 8), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)]
    donor = nn.Sequential(*layers)
    for module in donor.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    donor(IMAGES)
    return donor.eval()


@pytest.mark.parametrize("options", [{}, {"norm": "remove", "activation": "remove"}])
def test_it_is_the_error_of_a_model_with_that_layer_alone_converted(options):
    donor = donor_net()
    model = spherify(donor, example_input=IMAGES[:2], **options)
    before = copy.deepcopy(model.state_dict())
    effects = sensitivity(model, IMAGES, donor)
    assert [layer.name for layer in effects.layers] == ["0", "3.one.0", "3.two.0", "3.projection.0"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if options:  # there, "alone" is not what spherify(include=...) gives: the norm behind a sum stays
        return
    for layer in effects.layers:
        single = spherify(donor, include=[layer.name], example_input=IMAGES[:2])
        calibrate(single, IMAGES, donor=donor, refit_kept=False)
        with torch.no_grad():
            error = (single.eval()(IMAGES) - donor(IMAGES)).norm() / donor(IMAGES).norm()
        assert layer.error == pytest.approx(float(error), rel=1e-3)


def test_a_layer_that_the_output_hardly_uses_costs_least():
    torch.manual_seed(0)
    layers = {"large": nn.Conv2d(3, 4, 3), "small": nn.Conv2d(3, 4, 3)}
    donor = FromFunction(lambda m, x: m.large(x) + 0.01 * m.small(x), **layers).eval()
    effects = sensitivity(spherify(donor, head="convert", example_input=IMAGES[:2]), IMAGES)
    large, small = (layer.error for layer in effects.layers)
    assert small < 0.05 * large
    assert effects.worst(1) == ("large",)


def test_a_classifier_that_the_conversion_changes_stays_the_donors_here():
    """A converted or resized head is new: it would drown what the body's layers cost."""
    donor = donor_net()
    plain = sensitivity(spherify(donor, example_input=IMAGES[:2]), IMAGES, donor)
    headed = sensitivity(spherify(donor, head="cosface", example_input=IMAGES[:2]), IMAGES, donor)
    assert [layer.error for layer in headed.layers] == [layer.error for layer in plain.layers]


def test_the_donor_is_needed_where_it_cannot_be_taken_from_the_model(tmp_path):
    loaded = load(save(spherify(small_net()), tmp_path / "saved"), base=small_net())
    loaded[0].weight.data.mul_(2.0)
    with pytest.raises(ModelError, match="the donor is needed"):
        sensitivity(loaded, IMAGES)


def test_the_largest_errors_come_first_and_what_is_not_finite_before_them():
    layers = tuple(
        Effect(name=name, error=error, cosine=0.5) for name, error in zip("abc", (0.1, float("nan"), 0.3), strict=True)
    )
    effects = Effects(layers=layers, images=9, seconds=1.0)
    assert effects.worst(2) == ("b", "c")
    assert [line.split()[0] for line in str(effects).splitlines()] == ["converted", "b", "c", "a", "sensitivity:"]
    assert [row["error"] for row in effects.to_dict()["layers"]] == [0.1, None, 0.3]


def test_the_report_of_a_calibration_holds_it_where_asked_for():
    model = spherify(donor_net(), example_input=IMAGES[:2])
    named = []
    report = calibrate(model, IMAGES, sensitivity=True, progress=named.append)
    assert named[:4] == [layer.name for layer in report.sensitivity.layers]
    assert "converted alone" in str(report)
    assert report.to_dict()["sensitivity"]["images"] == 32
    assert calibrate(spherify(donor_net(), example_input=IMAGES[:2]), IMAGES).sensitivity is None
