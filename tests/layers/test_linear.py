"""SphereLinear: the twin of nn.Linear, and what from_linear takes over."""

import copy
import pickle

import pytest
import torch
from angular_samples import normal
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from spherify.errors import ModelError, OptionError
from spherify.functional import sphere_linear
from spherify.layers import SphereConv2d, SphereLinear

OPERATORS = ["cosine", "linear", "sigmoid", "learnable"]
each_operator = pytest.mark.parametrize("operator", OPERATORS)


def vectors(*shape: int, dtype: torch.dtype = torch.float32):
    return normal(*(shape or (3, 5)), dtype=dtype)


def test_the_layer_is_a_subclass_of_its_twin():
    assert isinstance(SphereLinear(5, 4), nn.Linear)


def test_the_layer_takes_the_arguments_of_its_twin_in_the_same_places():
    sphere = SphereLinear(5, 4, False, "meta", torch.float64, operator="linear")
    assert (sphere.in_features, sphere.out_features, sphere.bias) == (5, 4, None)
    assert (sphere.weight.device.type, sphere.weight.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
@each_operator
def test_the_layer_answers_as_the_function(operator, bias, shape):
    sphere, x = SphereLinear(5, 4, bias, operator=operator, gain=True, eps=1e-3), vectors(*shape)
    options = dict(operator=operator, k=sphere.k, eps=1e-3, gain=sphere.gain)
    assert torch.equal(sphere(x), sphere_linear(x, sphere.weight, sphere.bias, **options))
    assert sphere(x).shape == (*shape[:-1], 4)


def test_the_hidden_operator_is_the_twin_bit_for_bit():
    plain = nn.Linear(5, 4)
    assert torch.equal(SphereLinear.from_linear(plain, operator="identity")(vectors()), plain(vectors()))


@pytest.mark.parametrize(
    ("options", "added"),
    [
        (dict(operator="cosine"), []),
        (dict(operator="learnable"), ["k_logit"]),
        (dict(operator="learnable", gain=True), ["gain", "k_logit"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_has_the_keys_of_the_twin_and_those_of_the_operator(bias, options, added):
    plain, sphere = nn.Linear(5, 4, bias), SphereLinear(5, 4, bias, **options)
    assert set(sphere.state_dict()) == set(plain.state_dict()) | set(added)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(), "SphereLinear(in_features=5, out_features=4, bias=True, operator=cosine)"),
        (dict(operator="sigmoid"), "SphereLinear(in_features=5, out_features=4, bias=True, operator=sigmoid, k=0.3)"),
    ],
    ids=str,
)
def test_the_printed_layer_says_its_operator_and_k(options, text):
    assert repr(SphereLinear(5, 4, **options)) == text


@each_operator
def test_from_linear_takes_over_the_very_parameters_and_leaves_the_source_untouched(operator):
    plain = nn.Linear(5, 4)
    names, out = set(vars(plain)), plain(vectors())
    sphere = SphereLinear.from_linear(plain, operator=operator, gain=True)
    assert sphere.weight is plain.weight
    assert sphere.bias is plain.bias
    assert type(plain) is nn.Linear
    assert set(vars(plain)) == names
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert torch.equal(plain(vectors()), out)


def test_from_linear_keeps_hooks_frozen_flags_and_the_mode():
    plain, calls = nn.Linear(5, 4).eval(), []
    plain.weight.requires_grad_(False)
    plain.register_forward_pre_hook(lambda *_: calls.append("old"))
    sphere = SphereLinear.from_linear(plain)
    sphere(vectors())
    assert calls == ["old"]
    assert (sphere.weight.requires_grad, sphere.bias.requires_grad, sphere.training) == (False, True, False)


class SameLinear(nn.Linear):
    """Another name and nothing else."""


class ScalingLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def linear_with_a_patched_forward() -> nn.Linear:
    linear = nn.Linear(5, 4)
    linear.forward = lambda x: x
    return linear


def test_from_linear_takes_a_subclass_that_computes_the_same():
    plain = SameLinear(5, 4)
    assert SphereLinear.from_linear(plain).weight is plain.weight


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: nn.Conv2d(5, 4, 1), "SphereLinear.from_linear: got a Conv2d; give a Linear"),
        (lambda: nn.Bilinear(5, 5, 4), "SphereLinear.from_linear: got a Bilinear; give a Linear"),
        (lambda: SphereLinear(5, 4), "SphereLinear.from_linear: got a SphereLinear; give a Linear"),
        (
            lambda: ScalingLinear(5, 4),
            "ScalingLinear has a forward of its own, which would be lost; give a plain Linear",
        ),
        (linear_with_a_patched_forward, "Linear has a forward of its own, which would be lost"),
        (lambda: parametrizations.weight_norm(nn.Linear(5, 4)), "SphereLinear: the weight given is parametrized"),
        (lambda: nn.LazyLinear(4), "SphereLinear: the weight given has no shape yet; call the LazyLinear once"),
    ],
)
def test_from_linear_refuses_what_computes_something_else(source, message):
    with pytest.raises(ModelError, match=message):
        SphereLinear.from_linear(source())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(operator="relu"), "operator 'relu' is unknown"),
        (dict(operator="sigmoid", k=0.0), "k=0.0 is out of range"),
        (dict(operator="learnable", k_shared="model"), "k_shared 'model' is unknown"),
        (dict(eps=-1.0), "eps=-1.0 is no positive number"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_when_the_layer_is_made(options, message):
    with pytest.raises(OptionError, match=message):
        SphereLinear(5, 4, **options)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@each_operator
def test_a_copy_answers_the_same_and_shares_nothing(operator, duplicate):
    sphere = SphereLinear.from_linear(nn.Linear(5, 4), operator=operator, gain=True)
    copied = duplicate(sphere)
    assert torch.equal(copied(vectors()), sphere(vectors()))
    assert not {id(p) for p in sphere.parameters()} & {id(p) for p in copied.parameters()}


@each_operator
def test_the_state_loads_into_a_layer_of_the_same_kind(operator, tmp_path):
    sphere = SphereLinear(5, 4, operator=operator, gain=True)
    torch.save(sphere.state_dict(), tmp_path / "state.pt")
    twin = SphereLinear(5, 4, operator=operator, gain=True)
    twin.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(twin(vectors()), sphere(vectors()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_operator
def test_the_layer_follows_a_change_of_type(operator, dtype):
    sphere = SphereLinear(5, 4, operator=operator, gain=True)
    before = sphere(vectors())
    after = sphere.to(dtype)(vectors(dtype=dtype))
    assert after.dtype == dtype
    assert_close(after.float(), before, rtol=0.03, atol=0.05)


@each_operator
def test_the_layer_can_be_made_on_meta_and_filled_later(operator):
    hollow, full = (SphereLinear(5, 4, operator=operator, gain=True, device=device) for device in ("meta", "cpu"))
    assert hollow(vectors().to("meta")).shape == (3, 4)
    hollow.to_empty(device="cpu").load_state_dict(full.state_dict())
    assert torch.equal(hollow(vectors()), full(vectors()))


@each_operator
def test_a_vector_is_answered_as_a_patch_of_the_same_numbers(operator):
    conv = SphereConv2d(3, 4, (2, 2), operator=operator)
    linear = SphereLinear(12, 4, operator=operator)
    linear.load_state_dict({name: p.reshape(linear.state_dict()[name].shape) for name, p in conv.state_dict().items()})
    x = vectors(6, 3, 2, 2)
    assert_close(linear(x.flatten(1)), conv(x).flatten(1), rtol=1e-5, atol=1e-6)
