"""SphereConv1d, SphereConv2d, SphereConv3d: twins of torch's layers, and what from_conv takes over."""

import pytest
import torch
from angular_samples import SPHERE_CONVS, normal
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from spherify.errors import ModelError, OptionError
from spherify.layers import SphereConv1d, SphereConv2d, SphereConv3d

TWINS = {SphereConv1d: nn.Conv1d, SphereConv2d: nn.Conv2d, SphereConv3d: nn.Conv3d}
DIMS = {SphereConv1d: 1, SphereConv2d: 2, SphereConv3d: 3}
OPERATORS = ["cosine", "linear", "sigmoid", "learnable"]
each_layer = pytest.mark.parametrize("layer", TWINS)
each_operator = pytest.mark.parametrize("operator", OPERATORS)

WINDOWS = [
    dict(),
    dict(stride=2, padding=1),
    dict(padding="same", dilation=2),
    dict(padding="valid", groups=2),
    dict(groups=4, bias=False),
    dict(padding=1, padding_mode="reflect"),
    dict(padding="same", padding_mode="circular"),
]


def image(layer, batch: int = 2, dtype=torch.float32):
    return normal(batch, 4, *(8, 7, 6)[: DIMS[layer]], dtype=dtype)


def state_keys(module: nn.Module) -> set[str]:
    return set(module.state_dict())


@each_layer
def test_the_layer_is_a_subclass_of_its_twin(layer):
    assert isinstance(layer(4, 4, 3), TWINS[layer])


@each_layer
def test_the_layer_takes_the_arguments_of_its_twin_in_the_same_places(layer):
    arguments = (4, 8, 3, 2, 1, 2, 2, False, "circular", "cpu", torch.float64)
    sphere, plain = layer(*arguments, operator="linear"), TWINS[layer](*arguments)
    for name in [*plain.__constants__, "output_padding", "transposed", "_reversed_padding_repeated_twice"]:
        assert getattr(sphere, name) == getattr(plain, name), name
    assert sphere.bias is None
    assert sphere.weight.shape == plain.weight.shape
    assert sphere.weight.dtype == torch.float64


@each_layer
def test_the_initial_weights_are_those_of_the_twin(layer):
    torch.manual_seed(0)
    sphere = layer(4, 8, 3)
    torch.manual_seed(0)
    plain = TWINS[layer](4, 8, 3)
    assert torch.equal(sphere.weight, plain.weight)
    assert torch.equal(sphere.bias, plain.bias)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@each_operator
@each_layer
def test_the_layer_answers_as_the_function(layer, operator, window):
    sphere, x = layer(4, 4, 3, **window, operator=operator, gain=True, eps=1e-3), image(layer)
    geometry = {name: value for name, value in window.items() if name != "bias"}
    options = dict(operator=operator, k=sphere.k, eps=1e-3, gain=sphere.gain)
    expected = SPHERE_CONVS[DIMS[layer]](x, sphere.weight, sphere.bias, **geometry, **options)
    assert torch.equal(sphere(x), expected)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@each_layer
def test_the_output_has_the_shape_of_the_twins(layer, window):
    assert layer(4, 4, 3, **window)(image(layer)).shape == TWINS[layer](4, 4, 3, **window)(image(layer)).shape


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@each_layer
def test_the_hidden_operator_is_the_twin_bit_for_bit(layer, window):
    plain = TWINS[layer](4, 4, 3, **window)
    assert torch.equal(layer.from_conv(plain, operator="identity")(image(layer)), plain(image(layer)))


@each_layer
def test_an_unbatched_image_is_answered_as_in_a_batch(layer):
    sphere, x = layer(4, 4, 3, operator="learnable", gain=True), image(layer)
    assert_close(sphere(x[0]), sphere(x)[0])


@pytest.mark.parametrize(
    ("options", "added"),
    [
        (dict(operator="cosine"), []),
        (dict(operator="sigmoid"), []),
        (dict(operator="learnable"), ["k_logit"]),
        (dict(operator="linear", gain=True), ["gain"]),
        (dict(operator="learnable", gain=True), ["gain", "k_logit"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
@each_layer
def test_the_state_has_the_keys_of_the_twin_and_those_of_the_operator(layer, bias, options, added):
    assert state_keys(layer(4, 4, 3, bias=bias, **options)) == state_keys(TWINS[layer](4, 4, 3, bias=bias)) | set(added)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(), "operator=cosine)"),
        (dict(operator="sigmoid"), "operator=sigmoid, k=0.3)"),
        (dict(operator="sigmoid", k=0.1, eps=1e-6), "operator=sigmoid, k=0.1, eps=1e-06)"),
        (dict(operator="learnable"), "operator=learnable, k_shared=filter, k=0.5..0.5)"),
        (dict(operator="learnable", k_shared="layer", gain=True), "k_shared=layer, k=0.5..0.5, gain=True)"),
        (dict(operator="learnable", device="meta"), "operator=learnable, k_shared=filter)"),
    ],
    ids=str,
)
def test_the_printed_layer_says_its_operator_and_k(options, text):
    printed = repr(SphereConv2d(4, 8, 3, stride=2, **options))
    assert printed.startswith("SphereConv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), operator=")
    assert printed.endswith(text)


# from_conv


@each_operator
@each_layer
def test_from_conv_takes_over_the_very_parameters(layer, operator):
    plain = TWINS[layer](4, 4, 3)
    sphere = layer.from_conv(plain, operator=operator)
    assert type(sphere) is layer
    assert sphere.weight is plain.weight
    assert sphere.bias is plain.bias


@each_layer
def test_from_conv_leaves_the_source_untouched(layer):
    plain = TWINS[layer](4, 4, 3)
    names, out = set(vars(plain)), plain(image(layer))
    layer.from_conv(plain, operator="learnable", gain=True)
    assert type(plain) is TWINS[layer]
    assert set(vars(plain)) == names
    assert state_keys(plain) == {"weight", "bias"}
    assert torch.equal(plain(image(layer)), out)


@each_layer
def test_from_conv_keeps_the_window(layer):
    arguments = dict(stride=2, padding=1, dilation=2, groups=2, padding_mode="replicate", bias=False)
    plain = TWINS[layer](4, 4, 3, **arguments)
    sphere = layer.from_conv(plain, operator="linear")
    made = layer(4, 4, 3, **arguments, operator="linear")
    made.weight = plain.weight
    assert torch.equal(sphere(image(layer)), made(image(layer)))


def test_from_conv_keeps_hooks_but_new_ones_do_not_reach_the_source():
    plain, calls = nn.Conv2d(4, 4, 3), []
    plain.register_forward_hook(lambda *_: calls.append("old"))
    sphere = SphereConv2d.from_conv(plain)
    sphere.register_forward_hook(lambda *_: calls.append("new"))
    sphere(image(SphereConv2d))
    plain(image(SphereConv2d))
    assert calls == ["old", "new", "old"]


def test_from_conv_keeps_frozen_flags_and_the_mode():
    plain = nn.Conv2d(4, 4, 3).eval()
    plain.weight.requires_grad_(False)
    sphere = SphereConv2d.from_conv(plain)
    assert not sphere.weight.requires_grad
    assert sphere.bias.requires_grad
    assert not sphere.training


def test_from_conv_keeps_a_tied_weight_tied():
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    assert SphereConv2d.from_conv(first).weight is SphereConv2d.from_conv(second).weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_from_conv_makes_its_parameters_where_the_weight_stands(dtype):
    plain = nn.Conv2d(4, 4, 3, dtype=dtype, device="meta")
    sphere = SphereConv2d.from_conv(plain, operator="learnable", gain=True)
    assert {(parameter.dtype, parameter.device.type) for parameter in sphere.parameters()} == {(dtype, "meta")}


class SameConv(nn.Conv2d):
    """Another name and nothing else."""


class PaddingConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class StandardisingConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def conv_with_a_patched_forward() -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda x: x
    return conv


def test_from_conv_takes_a_subclass_that_computes_the_same():
    plain = SameConv(4, 4, 3)
    assert SphereConv2d.from_conv(plain).weight is plain.weight


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: nn.Linear(4, 4), "SphereConv2d.from_conv: got a Linear; give a Conv2d"),
        (lambda: nn.Conv1d(4, 4, 3), "SphereConv2d.from_conv: got a Conv1d; give a Conv2d"),
        (lambda: nn.ConvTranspose2d(4, 4, 3), "SphereConv2d.from_conv: got a ConvTranspose2d; give a Conv2d"),
        (lambda: SphereConv2d(4, 4, 3), "SphereConv2d.from_conv: got a SphereConv2d; give a Conv2d"),
        (
            lambda: PaddingConv(4, 4, 3),
            "PaddingConv has a forward of its own, which would be lost; give a plain Conv2d",
        ),
        (lambda: StandardisingConv(4, 4, 3), "StandardisingConv has a forward of its own, which would be lost"),
        (conv_with_a_patched_forward, "Conv2d has a forward of its own, which would be lost"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "SphereConv2d: the weight given is parametrized"),
        (lambda: nn.LazyConv2d(4, 3), "SphereConv2d: the weight given has no shape yet; call the LazyConv2d once"),
    ],
)
def test_from_conv_refuses_what_computes_something_else(source, message):
    with pytest.raises(ModelError, match=message):
        SphereConv2d.from_conv(source())


@each_layer
def test_from_conv_refuses_a_convolution_of_another_dimension(layer):
    other = nn.Conv3d if layer is not SphereConv3d else nn.Conv2d
    message = f"{layer.__name__}.from_conv: got a {other.__name__}; give a {TWINS[layer].__name__}"
    with pytest.raises(ModelError, match=message):
        layer.from_conv(other(4, 4, 3))


@pytest.mark.parametrize("make", [lambda **o: SphereConv2d(4, 4, 3, **o), None], ids=["constructor", "from_conv"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(operator="relu"), "operator 'relu' is unknown; choose one of: cosine, linear, sigmoid, learnable"),
        (dict(operator="cosine", k=0.3), "operator 'cosine' has no k"),
        (dict(operator="sigmoid", k=1e4), "k=10000.0 is out of range"),
        (dict(operator="learnable", k_shared="model"), "k_shared 'model' is unknown; choose one of: filter, layer, "),
        (dict(eps=0.0), "eps=0.0 is no positive number"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_when_the_layer_is_made(make, options, message):
    with pytest.raises(OptionError, match=message):
        (make or (lambda **o: SphereConv2d.from_conv(nn.Conv2d(4, 4, 3), **o)))(**options)
