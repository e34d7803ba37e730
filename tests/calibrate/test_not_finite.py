"""NaN and infinity that arise inside a network are named by the first layer that meets them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, conv_bn, image
from torch import nn

from spherify import ModelError, calibrate, spherify

IMAGES = image(24, 3, 8, 8)


def donor_with(function, norms: bool = True) -> nn.Module:
    """stem, a function, middle, late."""
    torch.manual_seed(0)
    layer = conv_bn if norms else (lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3))
    layers = {"stem": layer(3, 6), "middle": layer(6, 6), "late": layer(6, 4)}
    return FromFunction(lambda m, x: m.late(F.relu(m.middle(function(m.stem(x))))), **layers).eval()


@pytest.mark.parametrize("method", ["statistics", "transplant", "reconstruct"])
@pytest.mark.parametrize("norms", [True, False])
def test_the_first_layer_behind_it_is_named(method, norms):
    model = spherify(donor_with(torch.log, norms), head="convert", example_input=IMAGES[:2])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"^middle(\.\d)?: its .* holds NaN or infinite numbers, though the images"):
        calibrate(model, IMAGES, method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_image_among_many_is_enough():
    images = IMAGES.clone()
    images[17] *= 1e30
    model = spherify(donor_with(lambda x: x * x), head="convert", example_input=IMAGES[:2])
    with pytest.raises(ModelError, match=r"^middle.0: its output in the donor holds NaN or infinite numbers"):
        calibrate(model, images)


def test_what_only_the_conversion_makes_of_the_images():
    """The donor's stem answers 1 and more, whose root is finite; an angular one answers less than 0 too."""
    donor = donor_with(lambda x: (x - 1).sqrt(), norms=False)
    with torch.no_grad():
        donor.stem.weight.zero_()
        donor.stem.weight[:, 0, 1, 1] = 1.0
        donor.stem.bias.fill_(1.0)
    images = IMAGES.abs()
    model = spherify(donor, head="convert", example_input=images[:2])
    text = r"^middle: its input in the converted model holds NaN .* keep the layers in front of it plain"
    with pytest.raises(ModelError, match=text):
        calibrate(model, images)


def test_an_output_that_is_not_finite_is_noted():
    torch.manual_seed(0)
    donor = FromFunction(lambda m, x: m.conv(x).log(), conv=nn.Conv2d(3, 4, 3)).eval()
    report = calibrate(spherify(donor, head="convert", example_input=IMAGES[:2]), IMAGES)
    assert any("The outputs were not compared: they hold NaN" in note for note in report.notes)
    assert report.to_dict()["logits"]["error"] is None
