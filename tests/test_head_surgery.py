"""Heads by surgery, end to end: every form of classifier, another number of classes, saved, loaded, taken back."""

import copy
import json

import pytest
import timm
import torch
from networks import FromFunction, conv_bn, hollow, image, run_of, small_net, timm_model
from torch import nn
from torch.testing import assert_close

from spherify import load, plan, save, spherify, unspherify
from spherify.errors import ModelError, OptionError, RewriteError, SpherifyError
from spherify.heads import HEAD_KINDS, AngularConv2d, AngularHead, AngularLinear, criterion
from spherify.layers import SphereConv2d


def heads_in(model: nn.Module) -> dict[str, type]:
    return {name: type(part) for name, part in model.named_modules() if isinstance(part, AngularHead)}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


# ---------------------------------------------------------------------------------------------- the conversion


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_kind_is_made_trained_and_taken_back(kind):
    model = small_net()
    before, given, out = state_of(model), model[-1].weight, model(image())
    converted = spherify(model, head=kind, inplace=True)
    assert isinstance(converted[-1], AngularLinear)
    assert converted[-1].weight is given
    assert converted[-1].settings.kind == kind
    loss_of = criterion(converted.train())
    loss_of(converted(image()), torch.tensor([1, 2])).backward()
    assert given.grad is not None and given.grad.isfinite().all()
    assert converted.eval()(image()).shape == (2, 5)
    unspherify(converted.eval(), inplace=True)
    assert type(converted[-1]) is nn.Linear
    for name, value in converted.state_dict().items():  # train mode moved the running statistics
        assert "running" in name or "num_batches" in name or torch.equal(value, before[name])
    converted[1].load_state_dict({name.removeprefix("1."): v for name, v in before.items() if name.startswith("1.")})
    assert torch.equal(converted(image()), out)


def test_a_conversion_taken_back_is_bit_for_bit_what_it_was():
    model = small_net()
    before, out = state_of(model), model(image())
    again = unspherify(spherify(model, head="ga-softmax", num_classes=9))
    assert_same_state(again, before)
    assert torch.equal(again(image()), out)
    assert "out_features=5" in repr(again[-1])


def test_options_reach_the_head():
    model = spherify(small_net(), head="ga-softmax", head_operator="sigmoid", head_k=0.5, margin=3, eps=1e-3)
    settings = model[-1].settings
    assert (settings.operator, settings.k, settings.margin, settings.eps) == ("sigmoid", 0.5, 3.0, 1e-3)
    assert spherify(small_net(), head="s-softmax", scale=20).get_submodule("7").settings.scale == 20.0


def test_include_speaks_of_the_body_and_the_head_alone_can_be_converted():
    model = spherify(small_net(), head="w-softmax", include="@head")
    assert heads_in(model) == {"7": AngularLinear}
    assert type(model[0]) is nn.Conv2d
    assert heads_in(spherify(small_net(), head="w-softmax", include="0")) == {"7": AngularLinear}


def test_the_row_says_what_becomes_of_the_classifier():
    report = plan(small_net(), head="ga-softmax", num_classes=9)
    row = report.decisions[-1]
    assert (row.action, row.rule) == ("convert", "head")
    assert row.reason == "the classifier: ga-softmax, operator=linear, margin=4; its bias is taken off; new, 9 classes"
    assert "num_classes=9: 7 had 5; the class weights are new, drawn at random." in report.notes
    assert "2 converted to cosine, 1 to ga-softmax, 0 kept" in str(report)
    assert [d.site.name for d in report.heads] == ["7"]
    assert [d.site.name for d in report.converted] == ["0", "3"]


@pytest.mark.parametrize("head", ["keep", "softmax"])
def test_a_plain_head_is_kept_and_says_so(head):
    model = spherify(small_net(), head=head)
    assert type(model[-1]) is nn.Linear
    assert plan(small_net(), head=head).decisions[-1].reason == f"the classifier; head={head}"


@pytest.mark.parametrize("head", ["keep", "convert", "w-softmax"])
def test_another_number_of_classes_gives_a_new_classifier_and_the_same_number_keeps_it(head):
    donor = small_net()
    new = spherify(donor, head=head, num_classes=9)
    assert new(image()).shape == (2, 9)
    assert new[-1].weight.requires_grad
    same = spherify(donor, head=head, num_classes=5)
    assert torch.equal(same[-1].weight, donor[-1].weight)
    assert not [note for note in plan(donor, head=head, num_classes=5).notes if "num_classes" in note]


# ---------------------------------------------------------------------------------------------- forms of classifiers

FORMS = {  # model: arguments of timm, paths of its heads
    "test_resnet": ({}, {"fc": AngularLinear}),
    "test_vit": ({}, {"head": AngularLinear}),
    "test_convnext": ({}, {"head.fc": AngularLinear}),
    "test_mambaout": ({}, {"head.fc": AngularLinear}),
    "resnetv2_18": (dict(layers=(1, 1, 1, 1), channels=(16, 16, 16, 16)), {"head.fc": AngularConv2d}),
    "deit_tiny_distilled_patch16_224": (dict(depth=1), {"head": AngularLinear, "head_dist": AngularLinear}),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_timms_classifiers(name):
    arguments, expected = FORMS[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, **arguments)
    converted = spherify(model, head="ga-softmax", num_classes=4)
    assert heads_in(converted) == expected
    assert converted.num_classes == 4
    given = converted.get_classifier()
    first = given[0] if isinstance(given, tuple) else given
    assert any(isinstance(part, AngularHead) for part in first.modules())
    classifier = converted.pretrained_cfg["classifier"]
    assert {classifier} <= set(expected) if isinstance(classifier, str) else set(classifier) == set(expected)
    out = run_of(converted, image(2, *converted.pretrained_cfg["input_size"]), training=True).output_shapes
    assert {shape[-1] for shape in out} == {5}
    restored = unspherify(converted)
    assert restored.num_classes == 7
    assert not heads_in(restored)


def test_distilled_heads_train_together():
    model = spherify(
        timm_model("deit_tiny_distilled_patch16_224", depth=1, img_size=32, num_classes=4), head="a-softmax"
    )
    loss_of = criterion(model)
    model.train()
    model.set_distilled_training(True)
    pair = model(image(2, 3, 32, 32))
    assert [part.shape for part in pair] == [(2, 5), (2, 5)]
    assert loss_of(pair, torch.tensor([0, 3])).isfinite()
    model.set_distilled_training(False)
    assert loss_of(model(image(2, 3, 32, 32)), torch.tensor([0, 3])).isfinite()


def test_timms_interface_stays_true():
    model = spherify(timm_model("test_vit", num_classes=6), head="ga-softmax")
    x = image(2, 3, 160, 160)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert_close(model.get_classifier()(features), model(x))
    with pytest.raises(
        ModelError, match=r"^head was converted to an angular head and is a Linear now, without a margin"
    ):
        model.reset_classifier(3)
        criterion(model)
    assert model(x).shape == (2, 3)
    assert type(unspherify(model).head) is nn.Linear


def test_the_mean_over_positions_behind_a_convolution():
    model = spherify(hollow("torchvision:squeezenet1_1"), head="ga-softmax", num_classes=4)
    assert heads_in(model) == {"classifier.1": AngularConv2d}
    assert type(model.classifier[2]).__name__ == "Removed"
    assert run_of(model, image(2, 3, 64, 64), training=True).output_shapes == ((2, 5),)
    assert type(unspherify(model).classifier[2]) is nn.ReLU
    report = plan(hollow("torchvision:squeezenet1_1"), head="w-softmax")
    assert (
        "head='w-softmax': the activation classifier.2 behind the classifier would cut off logits and is removed."
        in report.notes
    )


def test_a_user_s_own_angular_head_is_kept_and_its_body_converted():
    model = nn.Sequential(conv_bn(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), AngularLinear(8, 4))
    converted = spherify(model, example_input=image())
    assert isinstance(converted[0][0], SphereConv2d)
    assert isinstance(converted[3], AngularLinear)
    assert criterion(converted).settings is not None


# ---------------------------------------------------------------------------------------------- refusals


def net(function, **layers: nn.Module) -> nn.Module:
    return FromFunction(function, body=nn.Conv2d(3, 8, 3), **layers)


def pooled(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.body(x).mean((2, 3))


class OddLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


REFUSED = {
    "softmax behind it": (
        lambda: net(lambda m, x: m.fc(pooled(m, x)).softmax(1), fc=nn.Linear(8, 4)),
        r"^head='ga-softmax': the logits of fc go through softmax in the model itself; end the model with its logits",
    ),
    "relu behind it": (
        lambda: net(lambda m, x: m.fc(pooled(m, x)).relu(), fc=nn.Linear(8, 4)),
        r"^head='ga-softmax': no classifier was found in FromFunction; give a model that ends in one, or head=keep\.$",
    ),
    "a tensor added": (
        lambda: net(lambda m, x: m.fc(pooled(m, x)) + m.norm.weight, fc=nn.Linear(8, 4), norm=nn.LayerNorm(4)),
        r"^head='ga-softmax': the logits of fc go through add in the model itself",
    ),
    "two widths": (
        lambda: net(lambda m, x: (m.fc(pooled(m, x)), m.box(pooled(m, x))), fc=nn.Linear(8, 4), box=nn.Linear(8, 16)),
        r"^head='ga-softmax': FromFunction predicts with layers of different widths \(fc 4, box 16\), so it is no",
    ),
    "own forward": (
        lambda: net(lambda m, x: m.fc(pooled(m, x)), fc=OddLinear(8, 4)),
        r"^head='ga-softmax': the classifier fc \(OddLinear\) is no plain linear layer or convolution\.$",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_an_angular_head_is_refused_in_one_line(make, message):
    with pytest.raises(OptionError, match=message):
        plan(make(), head="ga-softmax", example_input=image())


def test_without_a_margin_a_softmax_behind_the_classifier_does_no_harm():
    model = net(lambda m, x: m.fc(pooled(m, x)).log_softmax(1), fc=nn.Linear(8, 4))
    assert heads_in(spherify(model, head="w-softmax", example_input=image())) == {"fc": AngularLinear}


def test_encoders_and_detectors_are_refused():
    with pytest.raises(
        OptionError, match=r"^num_classes=3: no classifier was found in VisionTransformer; give a model"
    ):
        plan(timm_model("test_vit", num_classes=0), num_classes=3)
    six = nn.ModuleList(nn.Linear(8, 4 + index) for index in range(6))
    model = net(lambda m, x: tuple(part(pooled(m, x)) for part in m.parts), parts=six)
    message = r"different widths \(parts\.0 4, .* and 2 more\), so it is no classifier alone; use head=keep\.$"
    with pytest.raises(OptionError, match=message):
        plan(model, head="arcface", example_input=image())


def test_a_shared_class_weight_keeps_its_size():
    model = net(lambda m, x: m.fc(m.other(pooled(m, x))), other=nn.Linear(8, 8), fc=nn.Linear(8, 8))
    model.other.weight = model.fc.weight
    with pytest.raises(
        RewriteError, match=r"^fc: another module shares its weight; a new number of classes would part"
    ):
        spherify(model, num_classes=3, example_input=image())
    assert spherify(model, head="w-softmax", example_input=image()).get_submodule("fc").weight.shape == (8, 8)


def test_options_that_do_not_go_with_the_head_are_refused():
    with pytest.raises(
        OptionError, match=r"^margin=4 goes with an angular head, and head='keep'; choose head from: w-soft"
    ):
        plan(small_net(), margin=4)
    with pytest.raises(
        OptionError, match=r"^head='w-softmax': exclude='7' keeps the classifier 7 \(Linear\); leave one"
    ):
        plan(small_net(), head="w-softmax", exclude="7")


def test_a_model_with_an_angular_head_alone_is_already_converted():
    model = spherify(small_net(), head="w-softmax", include="@head")
    with pytest.raises(ModelError, match=r"^Sequential is already converted: 7 is a AngularLinear; call unspherify"):
        spherify(model)


# ---------------------------------------------------------------------------------------------- on disk


def test_a_saved_model_comes_back_with_its_head(tmp_path):
    model = spherify("timm:test_resnet", head="ga-softmax", margin=3, num_classes=6, seed=0)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.fc.settings == model.fc.settings
    assert torch.equal(again.eval()(image(2, 3, 64, 64)), model.eval()(image(2, 3, 64, 64)))
    assert criterion(again).num_classes == 6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["head"]["settings"]["margin"] == 3.0
    assert config["head"]["layers"] == ["fc"]


def test_a_loaded_model_is_taken_back_with_the_bias_its_classifier_had(tmp_path):
    donor = timm_model("test_resnet", num_classes=6)
    save(spherify(donor, head="arcface"), tmp_path / "out")
    again = unspherify(load(tmp_path / "out")).eval()
    x = image(2, 3, 64, 64)
    assert torch.equal(again(x), donor(x))
    save(load(tmp_path / "out"), tmp_path / "twice")
    assert torch.equal(unspherify(load(tmp_path / "twice")).fc.bias, donor.fc.bias)


def test_a_resized_model_of_ones_own_comes_back_on_its_old_base(tmp_path):
    donor = small_net()
    model = spherify(donor, head="ga-softmax", num_classes=9)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out", base=donor).eval()
    assert torch.equal(again(image()), model(image()))
    assert torch.equal(unspherify(again)(image()), donor(image()))


def test_a_resized_model_of_timm_needs_no_base(tmp_path):
    model = spherify(timm_model("test_resnet"), head="s-softmax", num_classes=9)
    save(model, tmp_path / "out")
    again = load(tmp_path / "out").eval()
    assert torch.equal(again(image(2, 3, 64, 64)), model(image(2, 3, 64, 64)))
    assert again.num_classes == 9


def test_a_head_replaced_before_saving_is_told_after_loading(tmp_path):
    model = spherify(timm_model("test_resnet"), head="ga-softmax")
    model.reset_classifier(4)
    save(model, tmp_path / "out")
    with pytest.raises(ModelError, match=r"^fc was converted to an angular head and is a Linear now"):
        criterion(load(tmp_path / "out"))


def test_copies_keep_their_head():
    model = spherify(small_net(), head="ga-softmax", num_classes=9)
    again = copy.deepcopy(model)
    assert torch.equal(again(image()), model(image()))
    assert torch.equal(unspherify(again)(image()), small_net()(image()))


def test_a_plan_without_anything_to_do_is_refused_still():
    with pytest.raises(SpherifyError, match="nothing would be converted"):
        spherify(small_net(), include="7")
