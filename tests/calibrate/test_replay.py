"""What is played back must be what the model computes: data-dependent control flow, chance, numbers out of range."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, Residual, conv_bn, image, small_net, timm_model
from torch import nn

from spherify import ModelError, calibrate, spherify
from spherify.calibrate.replay import departure, ends_of

IMAGES = image(24, 3, 8, 8)
TWO_KINDS = torch.cat([IMAGES[:12] + 1, IMAGES[12:] - 1])  # of a positive and of a negative mean


def branching(gain: str = "none") -> nn.Module:
    """Its forward takes one of two layers, by the mean of its images."""
    torch.manual_seed(0)
    layers = {"stem": conv_bn(3, 6), "one": conv_bn(6, 6), "two": conv_bn(6, 6), "head": nn.Linear(6, 4)}

    def forward(m, x):
        return m.head((m.one if x.mean() > 0 else m.two)(F.relu(m.stem(x))).mean((2, 3)))

    donor = FromFunction(forward, **layers).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spherify(donor, example_input=TWO_KINDS[:2], gain=gain)


@pytest.mark.parametrize("method", ["transplant", "reconstruct"])
def test_a_forward_that_branches_on_its_data_is_refused(method):
    model = branching()
    before = copy.deepcopy(model.state_dict())
    text = r"the donor does not do .* \(two.0 runs, which it did not then\); use method=\"statistics\""
    with pytest.raises(ModelError, match=text):
        calibrate(model, TWO_KINDS, method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_run_the_model_itself_and_say_what_was_not_compared():
    model = branching()
    report = calibrate(model, TWO_KINDS, "statistics")
    assert report.layers == ()
    assert "Not compared with the donor: the donor does not do for all images" in str(report).replace("\n", " ")


def test_statistics_with_gains_need_the_replay():
    with pytest.raises(ModelError, match="have its forward call the same functions for every image"):
        calibrate(branching(gain="learned"), TWO_KINDS, "statistics")


def test_a_number_computed_from_the_data_is_found_by_the_layer_behind_it():
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 6, 3), "late": nn.Conv2d(6, 4, 3)}
    donor = FromFunction(lambda m, x: m.late(m.stem(x) * float(x.abs().max())), **layers).eval()
    model = spherify(donor, head="convert", example_input=TWO_KINDS[:2])
    with pytest.raises(ModelError, match=r"the output of late differs by \d+ %"):
        calibrate(model, TWO_KINDS * torch.linspace(1, 2, 24)[:, None, None, None])


def test_a_forward_that_draws_random_numbers_is_refused():
    torch.manual_seed(0)
    donor = FromFunction(lambda m, x: m.late(F.dropout(m.stem(x))), stem=nn.Conv2d(3, 6, 3), late=nn.Conv2d(6, 4, 3))
    with pytest.raises(ModelError, match="does not do for all images what was recorded"):
        calibrate(spherify(donor.eval(), head="convert", example_input=IMAGES[:2]), IMAGES)


@pytest.mark.parametrize(
    ("donor", "shape"),
    [(small_net, (3, 16, 16)), (Residual, (3, 16, 16)), (lambda: timm_model("test_vit"), (3, 160, 160))],
)
def test_models_that_call_the_same_for_every_image_do_not_depart(donor, shape):
    torch.manual_seed(0)
    donor = donor().eval()
    images = image(8, *shape)
    model = spherify(donor, example_input=images[:2]).train()
    assert departure(model, donor, [images]) is None
    assert model.training


@pytest.mark.parametrize(("sizes", "count"), [([24], 8), ([8], 4), ([16, 1], 8), ([1] * 9, 1)])
def test_the_images_played_are_from_both_ends(sizes, count):
    images = torch.arange(sum(sizes))[:, None]
    first, last = ends_of(images.split(sizes))
    assert len(first) == len(last) == count
    assert first[0] == 0 and first[-1] < last[0]
