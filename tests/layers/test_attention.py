"""SphereMultiheadAttention against its torch twin and against a reference made by hand."""

import copy
import math

import pytest
import reference
import torch
from angular_samples import normal
from torch import nn
from torch.testing import assert_close

from spherify import ModelError, plan, spherify, unspherify
from spherify.functional import RESPONSES
from spherify.layers.attention import SphereMultiheadAttention
from spherify.rewrite.swaps import SWAPS

BOOLEAN = torch.ones(5, 5).tril() == 0
MASKS = {
    "none": {},
    "boolean": dict(attn_mask=BOOLEAN),
    "numbers": dict(attn_mask=normal(5, 5)),
    "per head": dict(attn_mask=normal(3 * 2, 5, 5)),
    "padding": dict(key_padding_mask=torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])),
    "both": dict(attn_mask=BOOLEAN, key_padding_mask=torch.tensor([[False] * 4 + [True]] * 3)),
}


def pair(operator: str = "identity", **arguments) -> tuple[nn.MultiheadAttention, SphereMultiheadAttention]:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, **{"batch_first": True, **arguments}).double().eval()
    nn.init.normal_(plain.in_proj_bias) if plain.in_proj_bias is not None else None
    sphere = copy.deepcopy(plain)
    sphere.__class__ = SphereMultiheadAttention
    sphere.set_operator(operator)
    return plain, sphere


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("is_self", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_with_the_identity_it_is_the_twin(batch_first, is_self, need_weights, average, mask):
    plain, sphere = pair(batch_first=batch_first)
    x = normal(3, 5, 8)
    inputs = [x, x, x] if is_self else [x, normal(3, 5, 8, seed=1), normal(3, 5, 8, seed=2)]
    inputs = inputs if batch_first else [tensor.transpose(0, 1) for tensor in inputs]
    if is_self:
        inputs = [inputs[0]] * 3
    arguments = dict(need_weights=need_weights, average_attn_weights=average, **mask)
    out, weights = sphere(*inputs, **arguments)
    expected, expected_weights = plain(*inputs, **arguments)
    assert_close(out, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        assert_close(weights, expected_weights)


def test_without_a_batch_it_is_the_twin():
    plain, sphere = pair()
    x = normal(5, 8)
    for part, expected in zip(sphere(x, x, x), plain(x, x, x), strict=True):
        assert_close(part, expected)


def test_queries_keys_and_values_are_responses_of_angles():
    plain, sphere = pair("sigmoid", bias=False)
    x = normal(3, 5, 8)
    projected = reference.sphere_linear(x, plain.in_proj_weight.detach(), operator="sigmoid", k=0.3)
    q, k, v = (part.view(3, 5, 2, 4).transpose(1, 2) for part in projected.chunk(3, -1))
    mixed = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(4), -1) @ v
    expected = mixed.transpose(1, 2).reshape(3, 5, 8) @ plain.out_proj.weight.detach().T
    assert_close(sphere(x, x, x)[0], expected)
    other = normal(3, 5, 8)  # equal to x, and another object: the way for different queries, keys and values
    assert_close(sphere(x, other, other)[0], expected)


@pytest.mark.parametrize("operator", ["cosine", "learnable"])
@pytest.mark.parametrize("gain", ["auto", "none"])
def test_a_converted_attention_has_a_gain_and_a_k_for_each_row_and_undoes(operator, gain):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
    x = normal(2, 5, 8)
    converted = spherify(model, example_input=x, operator=operator, gain=gain)
    assert isinstance(converted.self_attn, SphereMultiheadAttention)
    added = set(converted.self_attn.state_dict()) - set(model.self_attn.state_dict())
    expected = {"gain", "out_proj.gain"} if gain == "auto" else set()
    assert added == expected | ({"k_logit", "out_proj.k_logit"} if operator == "learnable" else set())
    with torch.no_grad():
        assert torch.equal(unspherify(converted)(x), model(x))
        assert not torch.allclose(converted(x), model(x), atol=1e-3)


def test_every_parameter_gets_a_gradient():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    converted = spherify(model, example_input=torch.zeros(2, 5, 8), operator="learnable")
    converted(normal(2, 5, 8, dtype=torch.float32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


def test_the_gain_gives_the_projections_the_scale_of_the_twin():
    plain, sphere = pair(bias=False)
    expected = plain.in_proj_weight.norm(dim=1) / RESPONSES["linear"].spread(None, 8)
    assert_close(sphere.matching_gain("linear", None), expected.detach())


def test_the_output_projection_is_left_where_the_attention_is():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = plan(model, example_input=torch.zeros(2, 5, 8), exclude="self_attn")
    decision = {d.site.name: d for d in report.decisions}["self_attn.out_proj"]
    assert (decision.action, decision.rule) == ("unsupported", "functional")
    assert decision.reason == "its weight is used by self_attn, which is not converted"
    report.apply()


@pytest.mark.parametrize("arguments", [dict(kdim=4), dict(add_bias_kv=True), dict(add_zero_attn=True)], ids=str)
def test_attention_of_another_form_is_unsupported_with_the_reason(arguments):
    class Crossing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)
            self.fc = nn.Linear(8, 8)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            key = x[..., : self.attention.kdim]
            return self.out(self.attention(self.fc(x), key, x)[0])

    report = plan(Crossing(), example_input=torch.zeros(2, 5, 8))
    decision = {d.site.name: d for d in report.decisions}["attention"]
    assert (decision.action, decision.rule) == ("unsupported", "obstacle")
    assert decision.reason == "it has separate weights for keys and values, bias_k, or add_zero_attn"


def test_the_causal_hint_without_a_mask_is_refused():
    _, sphere = pair()
    x = normal(3, 5, 8)
    with pytest.raises(ModelError, match="is_causal is a hint about attn_mask; give the mask too"):
        sphere(x, x, x, is_causal=True)


def test_the_table_of_twins_knows_the_attention():
    assert SWAPS.twin_of(nn.MultiheadAttention) is SphereMultiheadAttention
