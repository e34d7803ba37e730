"""Taking the costliest layers back: the model, its plan, its folder, and what is refused."""

import copy
import re

import pytest
import torch
from networks import Residual, conv_bn, image
from torch import nn

from spherify import ModelError, OptionError, calibrate, load, save, spherify, unspherify
from spherify.layers.angular import AngularLayer
from spherify.rewrite.apply import conversion_of

IMAGES = image(32, 3, 8, 8)
OPTIONS = [
    {},
    {"operator": "learnable", "k_shared": "network"},
    {"norm": "remove", "activation": "remove", "bias": "drop"},
    {"gain": "learned", "exclude": ["3.one.0"]},
]


def donor_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [*conv_bn(3, 8, bias=True), nn.ReLU(), Residual(8, 8), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    donor = nn.Sequential(*layers, nn.Linear(128, 5))
    for module in donor.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    donor(IMAGES)
    return donor.eval()


def angular(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, AngularLayer)}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_model_is_what_converting_without_them_and_calibrating_gives(options, tmp_path):
    donor = donor_net()
    model = spherify(donor, example_input=IMAGES[:2], **options)
    before = angular(model)
    report = calibrate(model, IMAGES, donor=donor, keep_worst=2)
    assert report.kept == report.sensitivity.worst(2)
    assert angular(model) == before - set(report.kept) == {layer.name for layer in report.layers}
    assert f"Taken back to plain layers: {', '.join(report.kept)}." in re.sub(r"\s+", " ", str(report))

    excluded = {**options, "exclude": [*options.get("exclude", ()), *report.kept]}
    direct = spherify(donor, example_input=IMAGES[:2], **excluded)
    calibrate(direct, IMAGES, donor=donor)
    with torch.no_grad():
        answer = model.eval()(IMAGES)
        torch.testing.assert_close(answer, direct.eval()(IMAGES))
        loaded = load(save(model, tmp_path / "saved"), base=donor).eval()
        assert torch.equal(loaded(IMAGES), answer)
    kept = [decision for decision in conversion_of(loaded).decisions if decision.site.name in report.kept]
    assert all(decision.action == "keep" and "keep_worst=2: alone" in decision.reason for decision in kept)
    assert f"Kept plain by keep_worst=2: {', '.join(report.kept)}." in conversion_of(loaded).notes
    assert angular(unspherify(loaded)) == set()


def test_a_kept_layer_has_the_donors_weights_where_plain_layers_are_not_fitted():
    donor = donor_net()
    model = spherify(donor, example_input=IMAGES[:2])
    report = calibrate(model, IMAGES, keep_worst=1, refit_kept=False)
    (name,) = report.kept
    assert torch.equal(model.get_submodule(name).weight, donor.get_submodule(name).weight)
    assert type(model.get_submodule(name)) is nn.Conv2d


def test_objects_modes_and_flags_stay_and_the_error_falls():
    donor = donor_net()
    every = spherify(donor, example_input=IMAGES[:2])
    whole = calibrate(every, IMAGES)
    model = spherify(donor, example_input=IMAGES[:2]).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    report = calibrate(model, IMAGES, keep_worst=2)
    assert model.training and not model[1].training and model[3].training
    assert not model[0].weight.requires_grad and model[3].one[0].weight.requires_grad
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert report.logits.error < whole.logits.error


def test_a_loaded_folder_and_a_second_time(tmp_path):
    donor = donor_net()
    model = load(save(spherify(donor, example_input=IMAGES[:2]), tmp_path / "saved"), base=donor)
    first = calibrate(model, IMAGES, donor=donor, keep_worst=1)
    second = calibrate(model, IMAGES, donor=donor, keep_worst=1)
    assert len({*first.kept, *second.kept}) == 2
    assert len(angular(model)) == 2


def test_a_failure_leaves_the_model_as_it_was():
    model = spherify(donor_net(), example_input=IMAGES[:2])
    before, names = copy.deepcopy(model.state_dict()), angular(model)
    seen = []

    def stop(name: str) -> None:
        seen.append(name)
        if len(seen) == 6:  # four layers alone, then the second of the calibration
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, IMAGES, keep_worst=1, progress=stop)
    assert angular(model) == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("count", [-1, 4])
def test_a_number_out_of_range(count):
    model = spherify(donor_net(), example_input=IMAGES[:2])
    with pytest.raises(OptionError, match=f"keep_worst={count} is out of range; 4 layers are converted, choose 0 to 3"):
        calibrate(model, IMAGES, keep_worst=count)


@pytest.mark.parametrize("options", [{"head": "cosface"}, {"num_classes": 7}])
def test_a_new_classifier_would_be_lost(options):
    model = spherify(donor_net(), example_input=IMAGES[:2], **options)
    with pytest.raises(OptionError, match="would lose the model's new classifier; convert with head=keep"):
        calibrate(model, IMAGES, keep_worst=1)


def test_the_donor_is_needed():
    model = spherify(donor_net(), example_input=IMAGES[:2], gain="none")
    model[0].weight.data.mul_(2.0)
    with pytest.raises(ModelError, match="the donor is needed"):
        calibrate(model, IMAGES, "statistics", keep_worst=1)
