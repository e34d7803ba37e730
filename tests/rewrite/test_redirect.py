"""Modules that used a layer's weight past its own forward call the converted layer instead."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, hollow, image, timm_model, torchvision_model
from torch import nn

from spherify import load, plan, save, spherify, unspherify
from spherify.layers import SphereLinear

TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Uses the weight of ``qkv`` with a bias of its own, as EVA and BEiT do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.q_bias = nn.Parameter(torch.randn(8))
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        bias = torch.cat([self.q_bias, self.q_bias.new_zeros(16)])
        q, k, v = F.linear(x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


@pytest.fixture
def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Attention(), nn.Linear(8, 8)).eval()


def test_a_weight_used_by_its_parent_is_converted_and_the_parent_is_named(attention):
    decision = {d.site.name: d for d in plan(attention).decisions}["1.qkv"]
    assert decision.action == "convert"
    assert "called by 1 instead of using its weight" in decision.reason


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_operator_really_runs(attention, training, grad):
    outs = []
    for operator in ("identity", "cosine", "linear"):
        model = spherify(attention, operator=operator, include="1.qkv", gain="none").train(training)
        with torch.set_grad_enabled(grad):
            outs.append(model(TOKENS))
    plain = attention.train(training)(TOKENS)
    assert torch.equal(outs[0], plain)
    assert not torch.allclose(outs[1], plain, atol=1e-4)
    assert not torch.allclose(outs[1], outs[2], atol=1e-4)


def test_the_parents_bias_is_added_to_the_response(attention):
    model = spherify(attention, include="1.qkv")
    part = model[1]
    x = attention[0](TOKENS)
    bias = torch.cat([part.q_bias, part.q_bias.new_zeros(16)])
    responses = []
    part.qkv.register_forward_hook(lambda module, args, out: responses.append(out))
    model(TOKENS)
    assert torch.allclose(responses[0], part.qkv(x, bias=bias))
    assert part.qkv.bias is None  # the parent's own is enough


def test_every_parameter_of_a_redirected_model_gets_a_gradient(attention):
    model = spherify(attention, operator="learnable")
    model(TOKENS).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_redirected_model_copies_pickles_and_keeps_the_class_names(attention):
    model = spherify(attention)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(TOKENS), model(TOKENS))
        assert isinstance(twin[1], Attention)
        assert type(twin[1]) is type(model[1])
    assert "(1): Attention(" in repr(model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_redirected_model_compiles_without_a_break(attention, backend):
    model = spherify(attention)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend=backend)(TOKENS), model(TOKENS), atol=1e-6)


def test_a_redirected_model_exports(attention):
    model = spherify(attention)
    assert torch.allclose(torch.export.export(model, (TOKENS,)).module()(TOKENS), model(TOKENS), atol=1e-6)


def test_undoing_restores_classes_and_outputs(attention):
    restored = unspherify(spherify(attention))
    assert [type(part) for part in restored.modules()] == [type(part) for part in attention.modules()]
    assert torch.equal(restored(TOKENS), attention(TOKENS))


def test_a_redirected_model_is_saved_and_loaded(attention, tmp_path):
    model = spherify(attention, operator="sigmoid")
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", base=attention).eval()
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert not torch.allclose(again(TOKENS), attention(TOKENS), atol=1e-4)


def test_a_weight_that_is_changed_before_it_is_used_is_unsupported():
    model = FromFunction(
        lambda self, x: F.linear(self.fc(x), 2 * self.two.weight), fc=nn.Linear(8, 8), two=nn.Linear(8, 8)
    )
    decision = {d.site.name: d for d in plan(model, example_input=TOKENS).decisions}["two"]
    assert (decision.action, decision.rule) == ("unsupported", "functional")


def test_a_weight_read_by_a_stranger_is_unsupported():
    stranger = FromFunction(lambda self, x: F.linear(x, self.borrowed), inner=nn.Identity())
    owner = nn.Linear(8, 8)
    object.__setattr__(stranger, "borrowed", owner.weight)
    model = FromFunction(lambda self, x: self.stranger(self.owner(x)), owner=owner, stranger=stranger)
    decision = {d.site.name: d for d in plan(model, example_input=TOKENS).decisions}["owner"]
    assert (decision.action, decision.rule) == ("unsupported", "functional")


# Networks of the libraries


NETWORKS = {
    "eva": lambda: timm_model("eva02_tiny_patch14_224", depth=2, img_size=56),
    "beit": lambda: timm_model("beit_base_patch16_224", depth=2, img_size=64),
    "swinv2": lambda: timm_model("swinv2_tiny_window8_256", depths=(1, 1, 1, 1), img_size=64, window_size=2),
    "torchvision swin": lambda: torchvision_model("swin_t"),
    "torchvision swin v2": lambda: torchvision_model("swin_v2_t"),
}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_every_functional_weight_of_a_network_is_converted_and_runs(build):
    model = build()
    side = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 64
    x = image(1, 3, side, side)
    converted = spherify(model, example_input=x)
    functional = [d.site.name for d in converted.spherify_conversion.converted if d.site.stood_in_by]
    assert functional
    ran = set()
    for name in functional:
        layer = converted.get_submodule(name)
        assert isinstance(layer, SphereLinear)
        layer.register_forward_hook(lambda *_, name=name: ran.add(name))
    for training in (False, True):
        ran.clear()
        with torch.no_grad():
            converted.train(training)(torch.cat([x, x]))
        assert ran == set(functional)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_the_identity_through_a_redirected_network_is_bit_equal(build):
    model = build()
    side = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 64
    x = image(1, 3, side, side)
    assert torch.equal(spherify(model, operator="identity", example_input=x)(x), model(x))


def test_the_fast_path_of_the_transformer_encoder_is_not_taken():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2).eval()
    converted = spherify(model, example_input=TOKENS)
    assert isinstance(converted.layers[0].linear1, SphereLinear)
    with torch.no_grad():
        evaluated = converted(TOKENS)
    assert torch.allclose(evaluated, converted.train()(TOKENS), atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(evaluated, model(TOKENS), atol=1e-3)


def test_a_padding_mask_makes_no_nested_tensors_of_what_goes_through_converted_layers():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2).eval()
    plain = spherify(model, operator="identity", example_input=TOKENS)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model.train()(TOKENS, src_key_padding_mask=padding)  # the fast path is not taken in train mode
    with torch.no_grad():
        out = plain(TOKENS, src_key_padding_mask=padding)
    assert torch.allclose(out[~padding], expected[~padding], atol=1e-5)


def test_no_layer_of_beit_is_left_out():
    assert plan(hollow("beit_base_patch16_224")).summary() == {"converted": 49, "kept": 1, "unsupported": 0}
