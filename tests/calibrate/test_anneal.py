"""Annealing: the donor at the start, the converted network at the end, gradients between, nothing left behind."""

import copy

import pytest
import torch
from networks import Residual, image, small_net, timm_model
from torch import nn

from spherify import OptionError, spherify
from spherify.calibrate.anneal import Annealing, distillation
from spherify.layers.attention import SphereMultiheadAttention

IMAGES = image(4, 3, 16, 16)


@pytest.mark.parametrize("operator", ["cosine", "linear", "sigmoid", "learnable"])
def test_at_the_start_it_is_the_donor_and_at_the_end_the_converted_network(operator):
    donor = small_net()
    model = spherify(donor, operator=operator, gain="none").eval()
    angular = model(IMAGES)
    with Annealing(model, until=0.5) as annealing:
        annealing.on_step(0, 10)
        torch.testing.assert_close(model(IMAGES), donor(IMAGES), rtol=1e-4, atol=1e-5)
        annealing.on_step(2, 10)
        between = model(IMAGES)
        annealing.on_step(5, 10)
        assert torch.equal(model(IMAGES), angular)
    assert not torch.allclose(between, angular) and not torch.allclose(between, donor(IMAGES))
    assert torch.equal(model(IMAGES), angular)
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_byobnet"])
def test_grouped_dynamic_and_linear_layers_start_as_the_donor(name):
    donor = timm_model(name)
    images = image(2, 3, 160, 160)
    model = spherify(donor, gain="none").eval()
    with torch.no_grad(), Annealing(model):
        torch.testing.assert_close(model(images), donor(images), rtol=1e-2, atol=1e-3)


class Attends(nn.Module):
    """To itself, then to the middle of itself: a packed weight taken at once, and rows of it apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = (nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))
        for attention in (self.one, self.other):
            nn.init.normal_(attention.in_proj_bias)

    def forward(self, x):
        x = self.one(x, x, x)[0]
        return self.other(x, x[:, 2:5], x[:, 2:5])[0]


@pytest.mark.parametrize("operator", ["cosine", "learnable"])
def test_attention_with_a_packed_weight_goes_from_the_donor_to_the_converted_one(operator):
    donor, tokens = Attends().eval(), image(3, 7, 16)
    model = spherify(donor, operator=operator, gain="none", head="convert", example_input=tokens).eval()
    assert all(isinstance(attention, SphereMultiheadAttention) for attention in (model.one, model.other))
    angular = model(tokens)
    with Annealing(model, until=1) as annealing:
        annealing.on_step(0, 10)
        torch.testing.assert_close(model(tokens), donor(tokens), rtol=1e-4, atol=1e-5)
        copied = copy.deepcopy(model)
        annealing.on_step(5, 10)
        between = model(tokens)
        between.square().sum().backward()
        assert torch.equal(copied(tokens), between)
        with torch.no_grad():
            model.one.in_proj_weight.neg_()
        assert torch.equal(copied(tokens), between) and not torch.allclose(model(tokens), between)
        with torch.no_grad():
            model.one.in_proj_weight.neg_()
        annealing.on_step(10, 10)
        assert torch.equal(model(tokens), angular)
    assert not torch.allclose(between, angular) and not torch.allclose(between, donor(tokens))
    assert model.other.in_proj_weight.grad.abs().sum() > 0 and torch.equal(model(tokens), angular)


def test_progressive_conversion_takes_one_layer_after_the_other():
    annealing = Annealing(spherify(Residual(), head="convert", example_input=IMAGES), schedule="progressive", until=1)
    annealing.on_step(5, 10)
    assert annealing.powers == [1.0, 0.5, 0.0]


def test_gradients_reach_every_weight():
    model = spherify(small_net(), operator="sigmoid")
    with Annealing(model) as annealing:
        annealing.on_step(3, 10)
        model(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_norms_have_the_statistics_of_the_angular_answers_soon_after_all_layers_are_angular():
    model = spherify(small_net(), gain="none").train()
    norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms
    with Annealing(model, until=0.5) as annealing:
        for step in range(20):
            annealing.on_step(step, 20)
            model(10 * IMAGES)
    seen = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, inputs: seen.append(inputs[0].var((0, 2, 3))))
    model(10 * IMAGES)
    for norm, variance in zip(norms, seen, strict=True):
        torch.testing.assert_close(norm.running_var, variance, rtol=0.02, atol=1e-6)
    assert {norm.momentum for norm in norms} == {0.1}


def test_distillation_is_zero_for_the_donor_itself():
    donor = small_net()
    loss = distillation(donor)
    assert loss(donor(IMAGES), IMAGES).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(donor(IMAGES) * 3, IMAGES).item() > 1e-4


def test_what_is_refused():
    model = spherify(small_net())
    with pytest.raises(OptionError, match="annealing schedule 'x' is unknown; choose one of: together, progressive"):
        Annealing(model, schedule="x")
    with pytest.raises(OptionError, match="until=0 is out of range"):
        Annealing(model, until=0)
    with pytest.raises(OptionError, match="no converted layer"):
        Annealing(small_net())
    with pytest.raises(OptionError, match="temperature=0 is not positive"):
        distillation(small_net(), temperature=0)
