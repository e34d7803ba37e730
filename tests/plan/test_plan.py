"""The plan: what becomes of each layer, by which rule, and why; as data."""

import json

import pytest
import torch
from networks import (
    FromFunction,
    OwnWeight,
    Residual,
    ScaledLinear,
    conv_bn,
    decisions_of,
    hollow,
    image,
    small_net,
    timm_model,
)
from torch import nn

from spherify.convert import plan
from spherify.errors import RewriteError, SpherifyError
from spherify.graph.site import Site
from spherify.plan.options import Options
from spherify.plan.plan import Plan, draft
from spherify.plan.rules import RULES, Question, Verdict
from spherify.rewrite.swaps import SWAPS

RESNET18_SHORTCUTS = [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]


def site(**facts) -> Site:
    usual = dict(
        name="conv",
        aliases=(),
        source_type=nn.Conv2d,
        kind="conv2d",
        shape=(4, 3, 3, 3),
        fan_in=27,
        groups=1,
        has_bias=False,
        calls_eval=1,
        calls_train=1,
    )
    return Site(**{**usual, **facts})


def verdict_on(options=None, **facts) -> Verdict:
    question = Question(site(**facts), Options(**(options or {})), SWAPS.converts)
    return next(verdict for rule in RULES if (verdict := rule(question)) is not None)


LINEAR = dict(source_type=nn.Linear, kind="linear", shape=(4, 6), fan_in=6)
UNUSED = dict(calls_eval=0, calls_train=0)
VERDICTS = {  # facts, options, what is decided
    "body": ({}, {}, ("convert", "body", "")),
    "runs in train mode alone": (dict(calls_eval=0), {}, ("convert", "body", "")),
    "excluded": ({}, dict(exclude="con*"), ("keep", "exclude", "excluded by con*")),
    "not included": ({}, dict(include="fc"), ("keep", "include", "not among those included")),
    "included": ({}, dict(include="conv"), ("convert", "body", "")),
    "head": (dict(roles={"@head"}), {}, ("keep", "head", "the classifier; head=keep")),
    "head to convert": (dict(roles={"@head"}), dict(head="convert"), ("convert", "body", "")),
    "shortcut": (
        dict(roles={"@shortcut"}),
        dict(skip_shortcuts=True),
        ("keep", "shortcut", "1x1 projection on the short side of a residual add"),
    ),
    "shortcut to convert": (dict(roles={"@shortcut"}), {}, ("convert", "body", "")),
    "linear": (LINEAR, dict(linear=False), ("keep", "linear", "a linear layer; linear=false")),
    "linear to convert": (LINEAR, {}, ("convert", "body", "")),
    "conv without linear": ({}, dict(linear=False), ("convert", "body", "")),
    "functional": (
        dict(read_by=("attn",)),
        {},
        ("unsupported", "functional", "its weight is read by 'attn', past its own forward"),
    ),
    "functional, by many": (
        dict(read_by=("", "b", "c", "d")),
        {},
        ("unsupported", "functional", "its weight is read by the model itself, 'b' and 2 more, past its own forward"),
    ),
    "unused": (UNUSED, {}, ("keep", "unused", "runs neither in eval nor in train mode")),
    "obstacle": (dict(obstacle="its weight is odd"), {}, ("unsupported", "obstacle", "its weight is odd")),
    "transposed": (
        dict(source_type=nn.ConvTranspose2d, kind="other"),
        {},
        ("unsupported", "type", "ConvTranspose2d has no patch: each input is spread over many outputs"),
    ),
    "other": (
        dict(source_type=nn.LSTM, kind="other"),
        {},
        ("unsupported", "type", "LSTM multiplies by its weight in a forward of its own"),
    ),
    "subclass": (
        dict(LINEAR, source_type=ScaledLinear),
        {},
        ("unsupported", "type", "ScaledLinear may compute something else than its parent class"),
    ),
    "fan-in 1": (
        dict(shape=(4, 1, 1, 1), fan_in=1),
        {},
        ("keep", "fan-in", "fan-in 1: every angle would be 0 or pi"),
    ),
    # Which rule is asked first where two would speak:
    "exclude before include": ({}, dict(exclude="*", include="*"), ("keep", "exclude", "excluded by *")),
    "exclude before head": (dict(roles={"@head"}), dict(exclude="*"), ("keep", "exclude", "excluded by *")),
    "the first exclude": ({}, dict(exclude=["c*", "conv"]), ("keep", "exclude", "excluded by c*")),
    "include before head": (
        dict(roles={"@head"}),
        dict(include="fc"),
        ("keep", "include", "not among those included"),
    ),
    "head before include": (dict(roles={"@head"}), dict(include="*"), ("keep", "head", "the classifier; head=keep")),
    "head before shortcut": (
        dict(roles={"@head", "@shortcut"}),
        dict(skip_shortcuts=True),
        ("keep", "head", "the classifier; head=keep"),
    ),
    "head before linear": (
        dict(LINEAR, roles={"@head"}),
        dict(linear=False),
        ("keep", "head", "the classifier; head=keep"),
    ),
    "linear before functional": (
        dict(LINEAR, read_by=("a",)),
        dict(linear=False),
        ("keep", "linear", "a linear layer; linear=false"),
    ),
    "functional before unused": (
        dict(UNUSED, read_by=("a",)),
        {},
        ("unsupported", "functional", "its weight is read by 'a', past its own forward"),
    ),
    "unused before obstacle": (
        dict(UNUSED, obstacle="odd"),
        {},
        ("keep", "unused", "runs neither in eval nor in train mode"),
    ),
    "obstacle before type": (
        dict(LINEAR, source_type=ScaledLinear, obstacle="odd"),
        {},
        ("unsupported", "obstacle", "odd"),
    ),
    "type before fan-in": (
        dict(LINEAR, source_type=ScaledLinear, fan_in=1),
        {},
        ("unsupported", "type", "ScaledLinear may compute something else than its parent class"),
    ),
    "a weight of its own is not functional": (
        dict(source_type=OwnWeight, kind="other", read_by=("a",)),
        {},
        ("unsupported", "type", "OwnWeight multiplies by its weight in a forward of its own"),
    ),
}


@pytest.mark.parametrize(("facts", "options", "expected"), VERDICTS.values(), ids=VERDICTS)
def test_what_is_decided_about_a_layer(facts, options, expected):
    verdict = verdict_on(options, **facts)
    assert (verdict.action, verdict.rule, verdict.reason) == expected


COMPLETED = {  # facts, options, (gain, bias added, bias dropped), reason
    "BatchNorm": (dict(norm="bn"), {}, (False, False, False), "BatchNorm bn follows"),
    "no BatchNorm": ({}, {}, (True, True, False), "no BatchNorm follows; gain and bias learned"),
    "no BatchNorm, biased": (
        dict(has_bias=True),
        {},
        (True, False, False),
        "no BatchNorm follows; gain and bias learned",
    ),
    "gain=none": ({}, dict(gain="none"), (False, False, False), "no BatchNorm follows"),
    "gain=learned": (
        dict(norm="bn"),
        dict(gain="learned"),
        (True, True, False),
        "BatchNorm bn follows; gain and bias learned",
    ),
    "norm=remove": (
        dict(norm="bn"),
        dict(norm="remove"),
        (True, True, False),
        "BatchNorm bn removed; gain and bias learned",
    ),
    "bias=drop": (
        dict(norm="bn", has_bias=True),
        dict(bias="drop"),
        (False, False, True),
        "BatchNorm bn follows; bias dropped",
    ),
    "bias=drop without a bias": ({}, dict(bias="drop"), (True, False, False), "no BatchNorm follows; gain learned"),
    "activation=remove": (
        dict(norm="bn", activation="act"),
        dict(activation="remove"),
        (False, False, False),
        "BatchNorm bn follows; activation act removed",
    ),
}


@pytest.mark.parametrize(("facts", "options", "changes", "reason"), COMPLETED.values(), ids=COMPLETED)
def test_what_a_conversion_comes_with(facts, options, changes, reason):
    (decision,) = draft([site(**facts)], Options(**options), model="x", converts=SWAPS.converts).decisions
    assert (decision.has_gain, decision.adds_bias, decision.drops_bias) == changes
    assert decision.reason == reason


def test_removed_modules_are_named_once_and_for_converted_layers_alone():
    sites = [
        site(name="a", norm="bn", activation="act"),
        site(name="b", norm="bn"),
        site(name="c", norm="other", activation="late"),
    ]
    options = Options(norm="remove", activation="remove", exclude="c")
    report = draft(sites, options, model="x", converts=SWAPS.converts)
    assert (report.removed_norms, report.removed_activations) == (("bn",), ("act",))


def test_nothing_is_removed_where_nothing_is_to_be():
    report = draft([site(norm="bn", activation="act")], Options(), model="x", converts=SWAPS.converts)
    assert (report.removed_norms, report.removed_activations) == ((), ())


def test_rules_of_ones_own_are_asked_first():
    def keep_all(question):
        return Verdict("keep", "mine", "because")

    report = draft([site()], Options(), model="x", converts=SWAPS.converts, rules=(keep_all, *RULES))
    assert report.decisions[0].rule == "mine"


def test_resnet18_has_17_converted_and_its_shortcuts_and_head_kept():
    report = plan("resnet18", skip_shortcuts=True)
    by_rule = {}
    for decision in report.decisions:
        by_rule.setdefault(decision.rule, []).append(decision.site.name)
    assert by_rule["shortcut"] == RESNET18_SHORTCUTS
    assert by_rule["head"] == ["fc"]
    assert len(by_rule["body"]) == 17
    assert report.summary() == {"converted": 17, "kept": 4, "unsupported": 0}


def test_resnet18_has_20_converted_with_its_shortcuts():
    report = plan("resnet18")
    assert report.model == "timm:resnet18"
    assert report.summary() == {"converted": 20, "kept": 1, "unsupported": 0}


def test_the_head_is_converted_where_that_is_asked():
    assert decisions_of(hollow("resnet18"), head="convert")["fc"].action == "convert"


def test_weights_read_past_their_layer_are_unsupported():
    model = FromFunction(lambda self, x: self.fc(x) * self.fc.weight.norm(), fc=nn.Linear(6, 4))
    decision = decisions_of(model, torch.rand(2, 6))["fc"]
    assert (decision.action, decision.rule) == ("unsupported", "functional")
    assert "read by the model itself" in decision.reason


def test_attention_of_torchvision_is_converted_with_its_projection():
    decisions = decisions_of(hollow("torchvision:vit_b_16"))
    path = "encoder.layers.encoder_layer_0.self_attention"
    assert decisions[path].action == "convert"
    assert decisions[f"{path}.out_proj"].reason.startswith(f"called by {path} instead of using its weight")


DICT_KEYS = ["model", "options", "summary", "layers"]
LAYER_KEYS = ["name", "aliases", "type", "shape", "fan_in", "roles", "action", "rule", "reason"]


def test_the_dict_has_just_the_keys_of_the_design_and_goes_to_json():
    found = plan(small_net(), exclude=["0"]).to_dict()
    assert list(found) == DICT_KEYS
    assert list(found["summary"]) == ["converted", "kept", "unsupported"]
    assert all(list(layer) == LAYER_KEYS for layer in found["layers"])
    assert json.loads(json.dumps(found)) == found
    assert found["layers"][0] == {
        "name": "0",
        "aliases": [],
        "type": "Conv2d",
        "shape": [8, 3, 3, 3],
        "fan_in": 27,
        "roles": ["@stem"],
        "action": "keep",
        "rule": "exclude",
        "reason": "excluded by 0",
    }


def test_a_plan_survives_the_way_to_a_record_and_back():
    model = Residual()
    report = plan(model, norm="remove", skip_shortcuts=True, example_input=image())
    record = json.loads(json.dumps(report.to_record()))
    assert Plan.from_record(record, lambda name: type(model.get_submodule(name))) == report


def test_the_text_has_a_row_for_each_layer_and_ends_with_the_summary():
    lines = str(plan(Residual(), skip_shortcuts=True, example_input=image())).splitlines()
    assert lines[0].split() == ["layer", "type", "shape", "action", "rule", "reason"]
    assert [line.split()[0] for line in lines[1:4]] == ["one.0", "two.0", "projection.0"]
    assert lines[3].split()[1:5] == ["Conv2d", "8x3x1x1", "keep", "shortcut"]
    assert lines[-1] == "Residual: 3 layers, 2 converted to cosine, 1 kept, 0 unsupported"


def test_the_summary_line_tells_k():
    assert str(plan(small_net(), operator="sigmoid")).endswith("2 converted to sigmoid, k=0.3, 1 kept, 0 unsupported")


NOTES = {
    "skip_shortcuts": (dict(skip_shortcuts=True), "skip_shortcuts: this model has no 1x1 shortcut."),
    "bias": (dict(bias="drop", include="1.*"), "bias=drop: no converted layer has a bias."),
    "norm": (dict(norm="remove", include="0"), "norm=remove: no converted layer is followed by a BatchNorm."),
    "activation": (
        dict(activation="remove"),
        "activation=remove: no converted layer is followed by an activation module.",
    ),
    "linear": (dict(linear=False), "linear=false: this model has no linear layer."),
    "head": ({}, "No classifier was found: the model ends without one, and every layer counts as body."),
}


@pytest.mark.parametrize(("options", "note"), NOTES.values(), ids=NOTES)
def test_an_option_without_effect_is_noted(options, note):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), conv_bn(4, 4))
    report = plan(model, example_input=image(), **options)
    assert note in report.notes
    assert f"note: {note}" in str(report)


def test_options_with_effect_are_not_noted():
    options = dict(skip_shortcuts=True, norm="remove", activation="remove", bias="drop", linear=False)
    report = plan(timm_model("test_byobnet"), **options)
    assert report.notes == ()


def test_a_model_that_cannot_be_trained_without_targets_is_noted():
    def forward(self, x, target=None):
        if self.training:
            raise ValueError("targets missing")
        return self.b(self.a(x))

    report = plan(FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), example_input=torch.rand(2, 4))
    assert report.notes[0].startswith("Train mode could not be recorded (it may need targets)")


def test_planning_changes_nothing():
    model = small_net()
    x = image()
    before, types = model(x), [type(part) for part in model.modules()]
    plan(model, norm="remove", activation="remove", bias="drop")
    assert torch.equal(model(x), before)
    assert [type(part) for part in model.modules()] == types


def test_a_plan_is_carried_out_on_its_model_by_apply():
    model = small_net()
    report = plan(model)
    converted = report.apply()
    assert type(converted[0]).__name__ == "SphereConv2d"
    assert type(model[0]) is nn.Conv2d
    assert report.apply(inplace=True) is model


def test_a_plan_is_carried_out_on_another_model_of_the_same_build():
    report = plan(small_net())
    twin = small_net()
    assert type(report.apply(twin, inplace=True)[3]).__name__ == "SphereConv2d"


def test_a_plan_is_refused_by_a_model_it_does_not_fit():
    other = small_net()
    other[0], other[3] = nn.Conv2d(3, 6, 3), nn.Linear(2, 2)
    del other[7]
    types = [type(part) for part in other.modules()]
    message = (
        r"^the plan for Sequential does not fit this Sequential: 0 has shape \(6, 3, 3, 3\), not \(8, 3, 3, 3\); "
        r"3 is a Linear, not a Conv2d; 7 is missing\.$"
    )
    with pytest.raises(RewriteError, match=message):
        plan(small_net()).apply(other, inplace=True)
    assert [type(part) for part in other.modules()] == types


def test_a_plan_without_a_model_is_refused():
    report = draft([site()], Options(), model="x", converts=SWAPS.converts)
    with pytest.raises(SpherifyError, match=r"^this plan is bound to no model; make it with spherify\.plan\(model, "):
        report.apply()
