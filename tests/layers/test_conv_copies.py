"""Copies of SphereConv1d, SphereConv2d and SphereConv3d: by hand, on disk, in another type, and on meta."""

import copy
import pickle

import pytest
import torch
from angular_samples import normal
from torch import nn
from torch.testing import assert_close

from spherify.layers import SphereConv1d, SphereConv2d, SphereConv3d

TWINS = {SphereConv1d: nn.Conv1d, SphereConv2d: nn.Conv2d, SphereConv3d: nn.Conv3d}
DIMS = {SphereConv1d: 1, SphereConv2d: 2, SphereConv3d: 3}
OPERATORS = ["cosine", "linear", "sigmoid", "learnable"]
each_layer = pytest.mark.parametrize("layer", TWINS)
each_operator = pytest.mark.parametrize("operator", OPERATORS)


def image(layer, batch: int = 2, dtype=torch.float32):
    return normal(batch, 4, *(8, 7, 6)[: DIMS[layer]], dtype=dtype)


def deepcopied(module, tmp_path):
    return copy.deepcopy(module)


def pickled(module, tmp_path):
    return pickle.loads(pickle.dumps(module))


def saved_and_loaded(module, tmp_path):
    torch.save(module, tmp_path / "layer.pt")
    return torch.load(tmp_path / "layer.pt", weights_only=False)


def rebuilt_from_its_state(module, tmp_path):
    torch.save(module.state_dict(), tmp_path / "state.pt")
    twin = type(module)(4, 4, 3, operator=module.operator, k=0.7 if module.k is not None else None, gain=True)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    return twin


@pytest.mark.parametrize("duplicate", [deepcopied, pickled, saved_and_loaded, rebuilt_from_its_state])
@pytest.mark.parametrize("taken_over", [True, False])
@each_operator
@each_layer
def test_a_copy_answers_the_same_and_shares_nothing(layer, operator, taken_over, duplicate, tmp_path):
    options = dict(operator=operator, k=0.7 if operator in ("sigmoid", "learnable") else None, gain=True)
    sphere = layer.from_conv(TWINS[layer](4, 4, 3), **options) if taken_over else layer(4, 4, 3, **options)
    copied = duplicate(sphere, tmp_path)
    assert type(copied) is layer
    assert torch.equal(copied(image(layer)), sphere(image(layer)))
    ids = {id(parameter) for parameter in sphere.parameters()}
    assert not ids & {id(parameter) for parameter in copied.parameters()}


@each_operator
def test_the_state_of_the_twin_loads_into_a_layer_without_operator_parameters(operator):
    plain, sphere = nn.Conv2d(4, 4, 3), SphereConv2d(4, 4, 3, operator=operator)
    report = sphere.load_state_dict(plain.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert report.missing_keys == (["k_logit"] if operator == "learnable" else [])
    assert torch.equal(sphere.weight, plain.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@each_operator
@each_layer
def test_the_layer_follows_a_change_of_type(layer, operator, dtype):
    sphere = layer(4, 4, 3, operator=operator, gain=True)
    before = sphere(image(layer))
    after = sphere.to(dtype)(image(layer, dtype=dtype))
    assert after.dtype == dtype
    assert {parameter.dtype for parameter in sphere.parameters()} == {dtype}
    assert_close(after.float(), before, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("change", "dtype"), [("half", torch.float16), ("double", torch.float64)])
def test_half_and_double_change_every_parameter(change, dtype):
    sphere = getattr(SphereConv2d(4, 4, 3, operator="learnable", gain=True), change)()
    assert sphere(image(SphereConv2d, dtype=dtype)).dtype == dtype


@each_operator
@each_layer
def test_the_layer_can_be_made_on_meta_and_filled_later(layer, operator):
    hollow = layer(4, 4, 3, operator=operator, gain=True, device="meta")
    full = layer(4, 4, 3, operator=operator, gain=True)
    assert hollow(image(layer).to("meta")).shape == full(image(layer)).shape
    hollow.to_empty(device="cpu").load_state_dict(full.state_dict())
    assert torch.equal(hollow(image(layer)), full(image(layer)))
