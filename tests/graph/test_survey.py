"""From recorded runs to sites: which layers there are, and the facts about each."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import (
    FromFunction,
    OwnWeight,
    ReadsAWeight,
    ScaledLinear,
    conv_bn,
    hollow,
    image,
    sites_of,
    small_net,
    timm_model,
)
from torch import nn
from torch.nn.utils import parametrizations

X = torch.rand(2, 6)


def test_resnet18_has_21_sites_in_the_order_of_its_modules():
    model = hollow("resnet18")
    sites = sites_of(model)
    assert len(sites) == 21
    assert list(sites) == [name for name, part in model.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]


def test_a_site_has_shape_kind_fan_in_groups_and_bias():
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5), groups=2), nn.Conv2d(6, 5, 1, bias=False))
    one, two = sites_of(model, image(2, 4, 8, 8)).values()
    assert (one.kind, one.shape, one.fan_in, one.groups, one.has_bias) == ("conv2d", (6, 2, 3, 5), 30, 2, True)
    assert (two.kind, two.shape, two.fan_in, two.groups, two.has_bias) == ("conv2d", (5, 6, 1, 1), 6, 1, False)
    assert (one.source_type, one.type) == (nn.Conv2d, "Conv2d")


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.Conv1d(3, 4, 3), (2, 3, 9), "conv1d"),
        (nn.Conv3d(3, 4, 3), (2, 3, 5, 5, 5), "conv3d"),
        (nn.Linear(6, 4), (2, 6), "linear"),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5), "other"),
        (ScaledLinear(6, 4), (2, 6), "linear"),
    ],
)
def test_kinds(layer, shape, kind):
    assert sites_of(nn.Sequential(layer), image(*shape))["0"].kind == kind


def test_the_model_itself_can_be_a_site():
    sites = sites_of(nn.Conv2d(3, 4, 3), image())
    assert list(sites) == [""]
    assert sites[""].calls_eval == 1


def test_one_object_under_two_names_is_one_site_with_an_alias():
    layer = nn.Linear(6, 6)
    sites = sites_of(FromFunction(lambda self, x: self.b(self.a(x)), a=layer, b=layer), X)
    assert list(sites) == ["a"]
    assert sites["a"].aliases == ("b",)
    assert sites["a"].names == ("a", "b")
    assert (sites["a"].calls_eval, sites["a"].calls_train) == (2, 2)
    assert sites["a"].read_by == ()


def test_a_layer_inside_a_shared_block_has_all_its_names():
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    sites = sites_of(FromFunction(lambda self, x: self.b(self.a(x)), a=block, b=block), X)
    assert sites["a.0"].aliases == ("b.0",)


def test_a_module_called_twice_is_one_site_with_two_calls():
    sites = sites_of(FromFunction(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(6, 6)), X)
    assert sites["fc"].calls_eval == 2


def test_tied_weights_are_two_sites_that_no_one_else_reads():
    model = FromFunction(lambda self, x: self.b(self.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.b.weight = model.a.weight
    sites = sites_of(model, X)
    assert (sites["a"].read_by, sites["b"].read_by) == ((), ())
    assert (sites["a"].calls_eval, sites["b"].calls_eval) == (1, 1)


def test_a_weight_tied_to_an_embedding_is_read_by_it():
    model = FromFunction(lambda self, x: self.fc(self.words(x)), words=nn.Embedding(9, 6), fc=nn.Linear(6, 9))
    model.fc.weight = model.words.weight
    sites = sites_of(model, torch.zeros(2, 3, dtype=torch.long))
    assert list(sites) == ["fc"]
    assert sites["fc"].read_by == ("words",)


def test_an_unused_layer_has_no_calls():
    sites = sites_of(FromFunction(lambda self, x: self.fc(x), fc=nn.Linear(6, 4), lost=nn.Linear(6, 4)), X)
    assert (sites["lost"].calls_eval, sites["lost"].calls_train) == (0, 0)


def test_an_auxiliary_layer_runs_in_train_mode_alone():
    model = FromFunction(
        lambda self, x: (self.fc(x), self.aux(x)) if self.training else self.fc(x),
        fc=nn.Linear(6, 4),
        aux=nn.Linear(6, 4),
    )
    aux = sites_of(model, X)["aux"]
    assert (aux.calls_eval, aux.calls_train) == (0, 1)


def test_a_weight_used_by_the_parent_is_read_by_it():
    sites = sites_of(nn.Sequential(ReadsAWeight()), X)
    assert sites["0.fc"].read_by == ("0",)
    assert sites["0.fc"].calls_eval == 0
    assert sites["0.body"].read_by == ()


def test_a_weight_used_by_the_model_itself_is_read_by_the_empty_name():
    assert sites_of(ReadsAWeight(), X)["fc"].read_by == ("",)


def test_a_weight_that_is_merely_looked_at_is_read_too():
    model = FromFunction(lambda self, x: self.fc(x) * self.fc.weight.norm(), fc=nn.Linear(6, 4))
    assert sites_of(model, X)["fc"].read_by == ("",)


def test_a_weight_changed_on_its_way_to_the_product_is_read():
    model = FromFunction(lambda self, x: F.linear(x, self.fc.weight.tanh() + 1), fc=nn.Linear(6, 4))
    assert sites_of(model, X)["fc"].read_by == ("",)


def test_a_bias_read_elsewhere_is_no_weight_read_elsewhere():
    model = FromFunction(lambda self, x: self.fc(x) + self.fc.bias, fc=nn.Linear(6, 4))
    assert sites_of(model, X)["fc"].read_by == ()


def test_attention_is_a_site_and_reads_the_weight_of_its_projection():
    model = FromFunction(lambda self, x: self.attn(x, x, x)[0], attn=nn.MultiheadAttention(6, 2, batch_first=True))
    sites = sites_of(model, torch.rand(2, 5, 6))
    assert list(sites) == ["attn", "attn.out_proj"]
    assert (sites["attn"].type, sites["attn"].kind) == ("MultiheadAttention", "other")
    assert sites["attn"].shape == (18, 6)  # the packed weight
    assert sites["attn.out_proj"].read_by == ("attn",)
    assert sites["attn.out_proj"].calls_eval == 0


def test_the_layers_of_a_transformer_encoder_are_read_by_its_fast_path():
    encoder = nn.TransformerEncoderLayer(6, 2, dim_feedforward=12, batch_first=True)
    sites = sites_of(nn.Sequential(encoder), torch.rand(2, 5, 6))
    assert list(sites) == ["0.self_attn", "0.self_attn.out_proj", "0.linear1", "0.linear2"]
    assert sites["0.linear1"].read_by == sites["0.linear2"].read_by == ("0",)
    assert sites["0.self_attn.out_proj"].read_by == ("0", "0.self_attn")


@pytest.mark.parametrize("layer", [nn.LSTM(6, 4), nn.GRU(6, 4), nn.RNN(6, 4)], ids=["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_is_a_site(layer):
    sites = sites_of(FromFunction(lambda self, x: self.rnn(x)[0], rnn=layer), torch.rand(2, 5, 6))
    assert sites["rnn"].kind == "other"
    assert sites["rnn"].calls_eval == 1


def test_a_module_that_multiplies_by_its_own_parameter_is_a_site():
    own = sites_of(nn.Sequential(nn.Linear(6, 6), OwnWeight()), X)["1"]
    assert (own.type, own.kind, own.shape) == ("OwnWeight", "other", (4, 6))
    assert own.read_by == ()


def test_a_module_whose_parameter_is_no_factor_is_no_site():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm([2, 6]))
    assert list(sites_of(model, X)) == ["0"]


def test_a_routed_convolution_is_a_site():
    sites = sites_of(hollow("tf_efficientnet_cc_b0_4e"), torch.empty(2, 3, 64, 64, device="meta"))
    assert {site.kind for site in sites.values() if site.type == "CondConv2d"} == {"other"}


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        return torch.nn.utils.weight_norm(layer)


def forward_replaced(layer):
    layer.forward = lambda x: 2 * F.linear(x, layer.weight)
    return layer


def as_integers(layer):
    weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int64), requires_grad=False)
    layer.weight, layer.bias = weight, None
    return layer


def as_complex(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.complex64))
    layer.bias = None
    return layer


OBSTACLES = {
    "weight_norm hook": (old_weight_norm, "its weight is computed by a hook (weight_norm or spectral_norm)"),
    "spectral_norm hook": (torch.nn.utils.spectral_norm, "its weight is computed by a hook"),
    "weight_norm": (parametrizations.weight_norm, "its weight is parametrised; remove the parametrisation first"),
    "spectral_norm": (parametrizations.spectral_norm, "its weight is parametrised"),
    "forward": (forward_replaced, "its forward was replaced on the object"),
    "integers": (as_integers, "its weight is of type torch.int64, and angles need floating-point numbers"),
    "complex": (as_complex, "its weight is of type torch.complex64"),
}


@pytest.mark.parametrize(("change", "words"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_stands_in_the_way_of_a_layer(change, words):
    layer = change(nn.Linear(6, 4))
    x = X.to(layer.weight.dtype)
    site = sites_of(nn.Sequential(layer), x)["0"]
    assert site.obstacle.startswith(words)
    assert site.shape == (4, 6)


def test_a_plain_layer_has_no_obstacle():
    assert {site.obstacle for site in sites_of(small_net(), image()).values()} == {None}


def followers(model, x=None):
    return {name: (site.norm, site.activation) for name, site in sites_of(model, x).items()}


def test_norm_and_activation_that_follow():
    found = followers(small_net(), image())
    assert found == {"0": ("1", "2"), "3": (None, "4"), "7": (None, None)}


def test_norms_and_activations_of_timm_that_are_one_module():
    found = followers(hollow("test_efficientnet"))
    assert found["conv_stem"] == ("bn1", "bn1.act")


def test_a_batch_norm_behind_a_flatten_follows():
    model = nn.Sequential(nn.Conv2d(3, 4, 4), nn.Flatten(), nn.BatchNorm1d(4), nn.ReLU())
    assert followers(model, image(2, 3, 4, 4)) == {"0": ("2", "3")}


def test_a_batch_norm_behind_an_activation_does_not_follow():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    assert followers(model, image()) == {"0": (None, "1")}


def test_a_batch_norm_beside_another_use_of_the_output_does_not_follow():
    model = FromFunction(lambda self, x: self.bn(y := self.conv(x)) + y, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    assert followers(model, image()) == {"conv": (None, None)}


def test_a_batch_norm_shared_by_two_layers_is_the_norm_of_both():
    bn = nn.BatchNorm2d(4)
    model = FromFunction(
        lambda self, x: self.bn(self.two(self.bn(self.one(x)))),
        one=nn.Conv2d(3, 4, 3),
        two=nn.Conv2d(4, 4, 3),
        bn=bn,
    )
    assert followers(model, image()) == {"one": ("bn", None), "two": ("bn", None)}


def test_a_layer_followed_differently_at_each_call_has_no_norm():
    model = FromFunction(
        lambda self, x: self.two(self.conv(self.one(self.conv(x)))),
        conv=nn.Conv2d(3, 3, 3),
        one=nn.BatchNorm2d(3),
        two=nn.BatchNorm2d(3),
    )
    assert followers(model, image()) == {"conv": (None, None)}


@pytest.mark.parametrize("layer", [nn.Softmax(-1), nn.LayerNorm(4), nn.Dropout(0.5), nn.Identity()])
def test_what_is_no_activation(layer):
    assert followers(nn.Sequential(nn.Linear(6, 4), layer), X) == {"0": (None, None)}


@pytest.mark.parametrize("layer", [nn.GELU(), nn.PReLU(), nn.Hardswish(), timm.layers.Swish(), timm.layers.HardMish()])
def test_activations_of_torch_and_timm(layer):
    assert followers(nn.Sequential(nn.Linear(6, 4), layer), X) == {"0": (None, "1")}


def test_layer_norm_is_no_batch_norm():
    found = followers(hollow("test_convnext"))
    assert {norm for norm, _ in found.values()} == {None}


def test_a_norm_in_a_block_goes_by_its_full_path():
    model = nn.Sequential(conv_bn(3, 4), conv_bn(4, 4, 1))
    assert followers(model, image()) == {"0.0": ("0.1", None), "1.0": ("1.1", None)}


def test_the_survey_changes_nothing():
    model = timm_model("test_resnet")
    x = image(2, 3, 64, 64)
    before = model(x)
    sites_of(model)
    assert torch.equal(model(x), before)


def test_a_torchvision_transformer_has_its_attention_as_sites():
    sites = sites_of(hollow("torchvision:vit_b_16"))
    path = "encoder.layers.encoder_layer_3.self_attention"
    assert sites[path].kind == "other"
    assert sites[f"{path}.out_proj"].read_by == (path,)
