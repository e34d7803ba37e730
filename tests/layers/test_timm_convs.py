"""Twins of timm's convolutions against references made by hand: padding as TensorFlow pads, standardised filters."""

import copy
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from angular_samples import normal
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple

from spherify import OptionError, RewriteError, load, plan, register_twin, save, spherify, unspherify
from spherify.functional import RESPONSES
from spherify.layers import SphereConv2d, SphereConv3d
from spherify.layers.conv import SphereConv
from spherify.rewrite.swaps import SWAPS

SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame)
STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
SCALED = (ScaledStdConv2d, ScaledStdConv2dSame)
ALL = (Conv2dSame, *STANDARDISED)
OPERATORS = [("cosine", None), ("linear", None), ("sigmoid", 0.3)]
WINDOWS = [
    dict(kernel_size=3, stride=2),
    dict(kernel_size=3, stride=1, dilation=2),
    dict(kernel_size=(2, 5), stride=(1, 3), groups=2),
]


def plain_layer(kind: type[nn.Conv2d], **window) -> nn.Conv2d:
    torch.manual_seed(0)
    layer = kind(4, 6, **window, bias=True).double()
    if kind in SCALED:
        layer.gain.data = torch.linspace(-1, 2, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    return layer


def padded_as_tensorflow_pads(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Output size ceil(input / stride); what is missing for it is added, the odd pixel at the end."""
    for axis in (2, 3):
        size, step = x.shape[axis], layer.stride[axis - 2]
        reach = (layer.kernel_size[axis - 2] - 1) * layer.dilation[axis - 2] + 1
        missing = max((math.ceil(size / step) - 1) * step + reach - size, 0)
        zeros = [list(x.shape), list(x.shape)]
        zeros[0][axis], zeros[1][axis] = missing // 2, missing - missing // 2
        x = torch.cat([x.new_zeros(zeros[0]), x, x.new_zeros(zeros[1])], axis)
    return x


def standardised(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()).view_as(weight)


def converted(layer: nn.Module, **options) -> nn.Module:
    model = spherify(nn.Sequential(layer, nn.ReLU()).double(), example_input=normal(2, 4, 9, 9), **options)
    assert isinstance(model[0], SphereConv)
    return model[0]


@pytest.mark.parametrize(("operator", "k"), OPERATORS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [(9, 9), (8, 11)])
@pytest.mark.parametrize("kind", ALL)
def test_equals_the_reference(kind, size, window, operator, k):
    layer = plain_layer(kind, **window)
    sphere = converted(copy.deepcopy(layer), operator=operator, k=k, gain="none")
    x = normal(2, 4, *size)
    weight = layer.weight.detach()
    filters = standardised(weight) if kind in STANDARDISED else weight
    gain = None
    if kind in SCALED:  # timm's own gain goes on, at the scale it had for an input of unit variance
        gain = layer.gain.detach().flatten() / RESPONSES[operator].spread(k, weight[0].numel())
    same = kind is Conv2dSame or getattr(layer, "same_pad", False)
    expected = reference.sphere_conv(
        padded_as_tensorflow_pads(x, layer) if same else x,
        filters,
        layer.bias.detach(),
        operator=operator,
        k=k,
        gain=gain,
        stride=layer.stride,
        padding=0 if same else layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    assert_close(sphere(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ALL)
def test_the_padding_follows_the_size_of_each_input(kind):
    layer = plain_layer(kind, kernel_size=3, stride=2)
    sphere = converted(copy.deepcopy(layer))
    for size in (7, 8, 15):
        x = normal(1, 4, size, size)
        assert sphere(x).shape == layer(x).shape


@pytest.mark.parametrize("kind", ALL)
def test_the_hidden_identity_is_the_plain_layer_bit_for_bit(kind):
    layer = plain_layer(kind, kernel_size=3, stride=2)
    x = normal(2, 4, 9, 9)
    assert torch.equal(converted(copy.deepcopy(layer), operator="identity")(x), layer(x))


@pytest.mark.parametrize("gain", ["auto", "none", "learned"])
@pytest.mark.parametrize("kind", ALL)
def test_undoing_restores_the_layer_bit_for_bit(kind, gain):
    layer = plain_layer(kind, kernel_size=3, stride=2)
    model = nn.Sequential(layer, nn.ReLU())
    example = normal(2, 4, 9, 9)
    restored = unspherify(spherify(model, example_input=example, gain=gain, operator="learnable"))
    assert torch.equal(restored(example), model(example))
    assert repr(restored) == repr(model)
    assert list(restored.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("kind", STANDARDISED)
def test_a_constant_added_to_a_filter_changes_nothing(kind):
    layer = plain_layer(kind, kernel_size=3)
    shifted = copy.deepcopy(layer)
    shifted.weight.data += 0.7
    x = normal(2, 4, 9, 9)
    assert_close(converted(shifted)(x), converted(layer)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SCALED)
def test_the_gain_of_timm_stays_the_same_parameter_and_no_second_one_is_added(kind):
    layer = plain_layer(kind, kernel_size=3)
    keys, gain = list(layer.state_dict()), layer.gain
    model = spherify(nn.Sequential(layer, nn.ReLU()), example_input=normal(2, 4, 9, 9), inplace=True)
    assert model[0].gain is gain
    assert list(model[0].state_dict()) == keys


@pytest.mark.parametrize("kind", ALL)
def test_the_output_keeps_the_scale_of_the_plain_layer(kind):
    torch.manual_seed(0)
    layer = kind(64, 32, 3, bias=False)
    sphere = spherify(nn.Sequential(layer, nn.ReLU()), example_input=torch.zeros(2, 64, 9, 9), operator="sigmoid")[0]
    x = normal(8, 64, 20, 20, dtype=torch.float32)
    inner = (..., slice(2, -2), slice(2, -2))  # at the border the patches have zeros in them
    assert (sphere(x)[inner].std() / layer(x)[inner].std()).item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", ALL)
def test_a_saved_layer_of_its_kind_comes_back_bit_for_bit(kind, tmp_path):
    plain = nn.Sequential(plain_layer(kind, kernel_size=3, stride=2), nn.ReLU())
    model = spherify(plain, example_input=normal(2, 4, 9, 9), operator="learnable")
    save(model, tmp_path / "model")
    x = normal(2, 4, 9, 9)
    assert torch.equal(load(tmp_path / "model", base=plain)(x), model(x))


@pytest.mark.parametrize("kind", [Conv3DSimple, Conv3DNoTemporal])
def test_a_subclass_without_a_forward_of_its_own_counts_as_its_parent(kind):
    model = nn.Sequential(kind(4, 6, midplanes=5), nn.ReLU())
    layer = spherify(model, example_input=torch.zeros(2, 4, 5, 9, 9))[0]
    assert isinstance(layer, SphereConv3d)
    x = normal(2, 4, 5, 9, 9, dtype=torch.float32)
    same = dict(stride=model[0].stride, padding=model[0].padding)
    expected = reference.sphere_conv(x.double(), model[0].weight.detach().double(), **same)
    out = (layer(x) - layer.bias.view(-1, 1, 1, 1)) / layer.gain.view(-1, 1, 1, 1)
    assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


# A user's own layers


class CentredConv2d(nn.Conv2d):
    """Takes the mean off each filter."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, self.stride)


class SphereCentredConv2d(SphereConv2d):
    def filters(self) -> Tensor:
        return self.weight - self.weight.mean((1, 2, 3), keepdim=True)


@pytest.fixture
def no_twins_left_behind():
    before = dict(SWAPS)
    yield
    SWAPS.clear()
    SWAPS.update(before)


def test_an_unknown_subclass_with_a_forward_of_its_own_is_unsupported_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), CentredConv2d(4, 4, 3), nn.ReLU())
    converted_model = spherify(model, example_input=torch.zeros(2, 3, 9, 9))
    decisions = {d.site.name: d for d in converted_model.spherify_conversion.decisions}
    assert (decisions["2"].action, decisions["2"].rule) == ("unsupported", "type")
    assert "CentredConv2d" in decisions["2"].reason
    assert type(converted_model[2]) is CentredConv2d


def test_a_registered_twin_converts_a_users_layer(no_twins_left_behind):
    register_twin(CentredConv2d, SphereCentredConv2d)
    layer = CentredConv2d(4, 4, 3).double()
    model = spherify(nn.Sequential(layer, nn.ReLU()), example_input=normal(2, 4, 9, 9), gain="none")
    x = normal(2, 4, 9, 9)
    weight = layer.weight.detach()
    expected = reference.sphere_conv(x, weight - weight.mean((1, 2, 3), keepdim=True), layer.bias.detach())
    assert_close(model[0](x), expected)


@pytest.mark.parametrize(
    ("kind", "twin", "message"),
    [
        (3, SphereCentredConv2d, "register_twin: 3 is no class of modules"),
        (CentredConv2d, nn.Conv2d, "is no angular layer; derive it from SphereConv2d or SphereLinear"),
    ],
)
def test_what_is_no_layer_cannot_be_registered(kind, twin, message):
    with pytest.raises(OptionError, match=message):
        register_twin(kind, twin)


def test_a_plan_for_a_twin_that_is_gone_is_refused(no_twins_left_behind):
    register_twin(CentredConv2d, SphereCentredConv2d)
    report = plan(nn.Sequential(CentredConv2d(4, 4, 3), nn.ReLU()), example_input=torch.zeros(2, 4, 9, 9))
    del SWAPS[CentredConv2d]
    with pytest.raises(RewriteError, match=r"0 \(CentredConv2d\): nothing converts it, only Conv1d, Conv2d"):
        report.apply()
