"""Regularisers over converted layers: which layers, which groups, sampling, gradients, refusals."""

import pytest
import torch
from networks import image, small_net
from torch import nn
from torch.testing import assert_close

from spherify import spherify
from spherify.errors import ModelError, OptionError
from spherify.functional import orthogonality_gap, pair_energy
from spherify.heads import AngularLinear
from spherify.layers import SphereConv2d, SphereLinear
from spherify.layers.attention import SphereMultiheadAttention
from spherify.regularizers import filters_by_group, hyperspherical_energy, orthogonality


def converted() -> nn.Module:
    return spherify(small_net(), head="ga-softmax")


def rows(layer: nn.Module) -> torch.Tensor:
    return layer.weight.detach().flatten(1)[None]


def test_both_are_sums_over_the_converted_layers_alone():
    model = converted()
    body = [rows(model[0]), rows(model[3])]
    assert_close(orthogonality(model).detach(), sum(orthogonality_gap(part) for part in body)[0])
    assert_close(hyperspherical_energy(model, s=1).detach(), sum(pair_energy(part, s=1) for part in body)[0])
    with_head = [*body, rows(model[7])]
    assert_close(orthogonality(model, heads=True).detach(), sum(orthogonality_gap(part) for part in with_head)[0])
    assert_close(hyperspherical_energy(model, heads=True).detach(), sum(pair_energy(part) for part in with_head)[0])


def test_filters_are_compared_within_their_group():
    layer = SphereConv2d(8, 12, 3, groups=4, bias=False)
    model = nn.Sequential(layer)
    dense = torch.zeros(12, 8, 3, 3)
    for group in range(4):
        dense[3 * group : 3 * group + 3, 2 * group : 2 * group + 2] = layer.weight[3 * group : 3 * group + 3].detach()
    expected = orthogonality_gap(dense.flatten(1)[None]).sum()  # of the same convolution written without groups
    assert_close(orthogonality(model).detach(), expected)
    assert filters_by_group(layer).shape == (4, 3, 18)


def test_depthwise_layers_have_lengths_but_no_pairs():
    model = nn.Sequential(SphereConv2d(4, 4, 3, groups=4, bias=False))
    lengths = model[0].weight.detach().flatten(1).square().sum(1)
    assert_close(orthogonality(model).detach(), (lengths - 1).square().sum())
    assert hyperspherical_energy(model).item() == 0.0


def test_queries_keys_and_values_are_three_sets():
    attention = nn.MultiheadAttention(8, 2)
    attention.__class__ = SphereMultiheadAttention
    attention.set_operator()  # type: ignore[operator]
    assert filters_by_group(attention).shape == (3, 8, 8)  # type: ignore[arg-type]


def test_a_shared_weight_counts_once():
    one, two = SphereLinear(6, 5), SphereLinear(6, 5)
    two.weight = one.weight
    assert_close(orthogonality(nn.Sequential(one, two)), orthogonality(nn.Sequential(one)))


def test_lengths_do_not_count_where_normalised():
    model = converted()
    before = orthogonality(model, normalized=True).item()
    with torch.no_grad():
        model[0].weight.mul_(3)
    assert orthogonality(model, normalized=True).item() == pytest.approx(before, rel=1e-4)
    assert orthogonality(model).item() > before


def test_the_floor_is_what_a_wide_layer_cannot_get_below():
    model = nn.Sequential(SphereLinear(4, 9, bias=False))
    assert_close(
        orthogonality(model, subtract_floor=False) - orthogonality(model), torch.tensor(5.0), atol=1e-4, rtol=0
    )


def test_sampled_rows_are_drawn_by_the_generator_and_right_on_average():
    model = nn.Sequential(SphereLinear(16, 40, bias=False))
    draws = [
        hyperspherical_energy(model, s=2, rows=10, generator=torch.Generator().manual_seed(seed)).item()
        for seed in (*range(200), 0)
    ]
    assert draws[0] == draws[-1] != draws[1]
    assert sum(draws[:200]) / 200 == pytest.approx(hyperspherical_energy(model, s=2).item(), rel=0.01)


@pytest.mark.parametrize("measure", [orthogonality, hyperspherical_energy])
def test_descent_makes_them_smaller_under_autocast_too(measure):
    model = converted()
    start = measure(model).item()
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = measure(model)
        assert value.dtype == torch.float32
        for parameter, gradient in zip(
            (model[0].weight, model[3].weight),
            torch.autograd.grad(value, (model[0].weight, model[3].weight)),
            strict=True,
        ):
            parameter.data -= 0.05 * gradient
    assert measure(model).item() < start


def test_they_join_a_training_step():
    model = converted().train()
    loss = model(image()).mean() + 1e-4 * orthogonality(model) + hyperspherical_energy(model, half_space=True)
    loss.backward()
    assert model[0].weight.grad is not None and model[0].weight.grad.isfinite().all()


def test_a_plain_model_and_too_few_rows_are_refused():
    with pytest.raises(
        ModelError, match=r"^Sequential has no converted layer; convert it with spherify\(model\) first\.$"
    ):
        orthogonality(small_net())
    with pytest.raises(ModelError, match=r"^AngularLinear has no converted layer"):
        hyperspherical_energy(AngularLinear(4, 3))
    with pytest.raises(OptionError, match=r"^rows=1 leaves no pair of filters; give 2 or more\.$"):
        hyperspherical_energy(converted(), rows=1)
