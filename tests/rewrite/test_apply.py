"""Carrying out a plan changes classes, by identity, and nothing else; taking it back restores every bit."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from networks import FromFunction, Residual, image, small_net, timm_model, torchvision_model
from torch import nn

from spherify.convert import plan, spherify, unspherify
from spherify.errors import ModelError, RewriteError
from spherify.layers.angular import AngularLayer
from spherify.layers.conv import SphereConv2d
from spherify.layers.linear import SphereLinear
from spherify.layers.removed import Removed
from spherify.rewrite.apply import conversion_of, is_untouched, sum_of_bits, undo_

SMALL = {"test_resnet": 64, "test_vit": 160, "test_convnext": 64, "test_efficientnet": 64, "test_byobnet": 64}
micro = pytest.mark.parametrize("name", SMALL)


def input_for(name, seed=0):
    return image(1, 3, SMALL[name], SMALL[name], seed=seed)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(one, other):
    assert list(one) == list(other)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []


def added_keys(report):
    """What the plan says is added to the state dict."""
    for decision in report.converted:
        if decision.has_gain:
            yield f"{decision.site.name}.gain"
        if decision.adds_bias:
            yield f"{decision.site.name}.bias"
        if report.options.operator == "learnable":
            yield f"{decision.site.name}.k_logit"


def test_modules_and_parameters_are_the_very_same_objects():
    model = timm_model("test_resnet")
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(value) for name, value in model.named_parameters()}
    converted = spherify(model, inplace=True)
    assert converted is model
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: id(value) for name, value in model.named_parameters() if name in parameters} == parameters


def test_the_class_of_each_layer_and_of_no_other_module_changes():
    model = timm_model("test_resnet")
    types = {name: type(module) for name, module in model.named_modules()}
    report = plan(model)
    report.apply(inplace=True)
    changed = {name for name, module in model.named_modules() if type(module) is not types[name]}
    assert changed == {decision.site.name for decision in report.converted}
    assert {type(model.get_submodule(name)) for name in changed} == {SphereConv2d}


def test_a_converted_layer_is_still_its_torch_twin():
    model = spherify(small_net(), head="convert")
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[7], nn.Linear)
    assert (type(model[0]), type(model[7])) == (SphereConv2d, SphereLinear)
    assert (model[0].out_channels, model[0].kernel_size, model[7].in_features) == (8, (3, 3), 8)


@pytest.mark.parametrize("operator", ["cosine", "learnable"])
@micro
def test_the_state_dict_has_its_keys_and_those_the_plan_adds(name, operator):
    model = timm_model(name)
    before = state_of(model)
    report = plan(model, operator=operator)
    after = report.apply().state_dict()
    assert set(after) == {*before, *added_keys(report)}
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_dropped_bias_leaves_the_state_dict():
    assert set(spherify(small_net(), bias="drop").state_dict()) == set(small_net().state_dict()) - {"0.bias"} | {
        "3.gain"
    }


def test_new_biases_are_zero_and_old_ones_stay():
    model = small_net()
    converted = spherify(model, gain="learned")
    assert torch.equal(converted[0].bias, model[0].bias)
    assert torch.equal(converted[3].bias, torch.zeros(8))


def test_hooks_stay_and_fire():
    model = small_net()
    fired = []
    model[0].register_forward_hook(lambda *args: fired.append("forward"))
    model[0].register_forward_pre_hook(lambda *args: fired.append("before"))
    model[3].register_full_backward_hook(lambda *args: fired.append("backward"))
    spherify(model, inplace=True)
    assert fired == []
    model(image()).sum().backward()
    assert fired == ["before", "forward", "backward"]


def test_what_is_frozen_stays_frozen_with_what_is_added_to_it():
    model = small_net()
    model[3].weight.requires_grad_(False)
    converted = spherify(model, operator="learnable", gain="learned")
    assert not any(parameter.requires_grad for parameter in converted[3].parameters())
    assert len(list(converted[3].parameters())) == 4  # weight, gain, k_logit, bias
    assert all(parameter.requires_grad for parameter in converted[0].parameters())
    assert len(list(converted[0].parameters())) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_weights_is_that_of_what_is_added(dtype):
    converted = spherify(small_net().to(dtype), operator="learnable", example_input=image().to(dtype))
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    assert converted(image().to(dtype)).dtype == dtype


def test_train_and_eval_flags_stay():
    model = small_net().train()
    model[3].eval()
    flags = [part.training for part in model.modules()]
    converted = spherify(model, norm="remove", activation="remove")
    assert [part.training for part in converted.modules()] == flags


def test_the_model_keeps_its_class_and_the_api_of_timm():
    model = timm_model("test_resnet")
    converted = spherify(model)
    assert type(converted) is type(model)
    assert converted.pretrained_cfg == model.pretrained_cfg
    assert type(converted.get_classifier()) is nn.Linear
    features = converted.forward_features(input_for("test_resnet"))
    assert torch.equal(converted.forward_head(features), converted(input_for("test_resnet")))
    converted.reset_classifier(7)
    assert converted(input_for("test_resnet")).shape == (1, 7)


def test_a_module_under_two_names_is_converted_once():
    layer = nn.Linear(4, 4)
    model = FromFunction(lambda self, x: self.c(self.b(self.a(x))), a=layer, b=layer, c=nn.Linear(4, 4))
    converted = spherify(model, example_input=image(2, 4))
    assert converted.a is converted.b
    assert type(converted.a) is SphereLinear
    assert "b.gain" in converted.state_dict()
    assert type(unspherify(converted).b) is nn.Linear


def test_tied_weights_stay_tied():
    model = FromFunction(lambda self, x: self.b(self.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    converted = spherify(model, head="convert", example_input=image(2, 4))
    assert converted.a.weight is converted.b.weight
    assert converted.a.gain is not converted.b.gain


def test_one_k_for_the_network_is_one_parameter():
    converted = spherify(Residual(), operator="learnable", k_shared="network", example_input=image())
    logits = {id(part.k_logit) for part in converted.modules() if isinstance(part, AngularLayer)}
    assert len(logits) == 1
    assert converted.one[0].k_logit.shape == (1,)
    assert len([name for name, _ in converted.named_parameters() if "k_logit" in name]) == 1


@pytest.mark.parametrize(("k_shared", "shape"), [("filter", (8,)), ("layer", (1,))])
def test_otherwise_each_layer_has_its_own_k(k_shared, shape):
    converted = spherify(Residual(), operator="learnable", k_shared=k_shared, example_input=image())
    logits = [part.k_logit for part in converted.modules() if isinstance(part, AngularLayer)]
    assert {logit.shape for logit in logits} == {shape}
    assert len({id(logit) for logit in logits}) == 3


@micro
def test_the_donor_of_a_copy_is_untouched_bit_for_bit(name):
    model = timm_model(name)
    x = input_for(name)
    before, output = state_of(model), model(x)
    types, attributes = [type(part) for part in model.modules()], set(vars(model))
    converted = spherify(model, operator="learnable", norm="remove", activation="remove", bias="drop")
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    assert_equal_states(state_of(model), before)
    assert torch.equal(model(x), output)
    assert [type(part) for part in model.modules()] == types
    assert set(vars(model)) == attributes


def test_any_change_of_a_weight_is_seen():
    converted = spherify(small_net(), example_input=image())
    assert is_untouched(converted)
    weight = next(converted.parameters()).data.view(-1)
    before = weight[3].clone()
    weight[3] = torch.nextafter(before, before + 1)
    assert not is_untouched(converted)
    weight[3] = before
    assert is_untouched(converted)


def test_another_order_in_memory_changes_no_weight():
    converted = spherify(small_net(), example_input=image())
    assert is_untouched(converted.to(memory_format=torch.channels_last))
    assert is_untouched(copy.deepcopy(converted))
    assert not is_untouched(converted.half())


STATES = {
    "odd": torch.arange(7.0),
    "off a word": torch.arange(7.0)[1:],
    "turned": torch.arange(6.0).half().view(2, 3).T,
    "bool": torch.tensor(True),
    "number": torch.tensor(3.0),
    "empty": torch.zeros(0),
    "complex": torch.ones(2, dtype=torch.complex64),
}


@pytest.mark.parametrize("value", STATES.values(), ids=STATES)
def test_bits_are_summed_in_logical_order(value):
    words = value.contiguous().numpy().tobytes()
    whole = len(words) // 8 * 8
    truth = sum(int.from_bytes(words[at : at + 8], "little", signed=True) for at in range(0, whole, 8))
    assert sum_of_bits(value) == (truth + 2**63) % 2**64 - 2**63 + sum(words[whole:])


OPTIONS = {
    "plain": dict(),
    "learnable": dict(operator="learnable", gain="learned"),
    "network": dict(operator="learnable", k_shared="network"),
    "removing": dict(norm="remove", activation="remove", bias="drop"),
    "all": dict(norm="remove", activation="remove", bias="drop", gain="learned", head="convert"),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@each_option
@micro
def test_unspherify_restores_the_outputs_and_the_state_bit_for_bit(name, options):
    model = timm_model(name)
    x = input_for(name)
    before, output = state_of(model), model(x)
    types = [type(part) for part in model.modules()]
    attributes = [set(vars(part)) for part in model.modules()]
    converted = spherify(model, inplace=True, **options)
    assert not torch.equal(converted(x), output)
    restored = unspherify(converted, inplace=True)
    assert restored is model
    assert_equal_states(state_of(model), before)
    assert torch.equal(model(x), output)
    assert [type(part) for part in model.modules()] == types
    assert [set(vars(part)) for part in model.modules()] == attributes


def test_unspherify_gives_a_copy_where_none_is_said():
    converted = spherify(small_net())
    restored = unspherify(converted)
    assert type(restored[0]) is nn.Conv2d
    assert type(converted[0]) is SphereConv2d


def test_unspherify_keeps_trained_weights():
    model = small_net()
    converted = spherify(model, operator="learnable", bias="drop")
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.mul_(1.5)
    restored = unspherify(converted)
    assert torch.equal(restored[3].weight, 1.5 * model[3].weight)
    assert torch.equal(restored[0].bias, model[0].bias)  # the dropped one, as it was
    assert not [name for name in restored.state_dict() if "gain" in name or "k_logit" in name]


def test_unspherify_follows_a_change_of_type():
    restored = unspherify(spherify(small_net(), bias="drop", norm="remove").double())
    assert {value.dtype for value in restored.parameters()} == {torch.float64}
    assert restored(image().double()).dtype == torch.float64


def test_a_norm_of_another_type_than_the_model_keeps_it():
    model = small_net().half()
    model[1].float()
    restored = unspherify(spherify(model, norm="remove", example_input=image().half()))
    assert (restored[0].weight.dtype, restored[1].weight.dtype) == (torch.float16, torch.float32)


def test_what_was_removed_follows_to_meta():
    converted = spherify(small_net(), norm="remove").to("meta")
    assert all(value.is_meta for tensors in converted[1].stored_state for value in tensors.values())


def test_a_restored_model_can_be_converted_again():
    model = small_net()
    first = spherify(model, norm="remove", bias="drop")
    again = spherify(unspherify(first), norm="remove", bias="drop")
    assert torch.equal(again(image()), first(image()))


def test_a_plain_model_has_nothing_to_take_back():
    with pytest.raises(ModelError, match=r"^Sequential has no converted layer, so there is nothing to take back\.$"):
        unspherify(small_net())


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_and_loaded])
@each_option
def test_a_copy_answers_the_same_and_can_be_taken_back(duplicate, options):
    model, x = small_net(), image()
    converted = spherify(model, **options)
    copied = duplicate(converted)
    assert torch.equal(copied(x), converted(x))
    assert torch.equal(unspherify(copied)(x), model(x))
    assert conversion_of(copied) == conversion_of(converted)
    assert not {id(value) for value in copied.parameters()} & {id(value) for value in converted.parameters()}


@pytest.mark.parametrize("k_shared", ["filter", "layer", "network"])
def test_a_training_step_changes_weights_gains_and_k(k_shared):
    model = spherify(Residual(), operator="learnable", k_shared=k_shared, gain="learned", example_input=image())
    before = state_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(image()).square().mean().backward()
    optimizer.step()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {name.split(".")[-1] for name in trained} == {"weight", "bias", "gain", "k_logit"}
    assert [name for name, value in trained.items() if torch.equal(value, before[name])] == []
    assert all(value.isfinite().all() for value in trained.values())


def test_removed_modules_become_the_identity_and_say_what_they_were():
    converted = spherify(small_net(), norm="remove", activation="remove")
    assert [type(converted[index]) for index in (1, 2, 4)] == [Removed] * 3
    assert "was BatchNorm2d" in repr(converted)
    assert not [name for name in converted.state_dict() if name.startswith("1.")]
    x = image()
    assert torch.equal(converted[1](x), x)


def test_the_activation_inside_a_norm_stays_when_the_norm_goes():
    converted = spherify(timm_model("test_efficientnet"), norm="remove")
    norm = converted.bn1
    assert type(norm) is Removed
    x = image(2, 4, 3, 3)
    assert torch.equal(norm(x), norm.act(x))


class OddNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_norm_that_may_do_more_than_normalise_is_not_removed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), OddNorm(4))
    with pytest.raises(RewriteError, match=r"^1 \(OddNorm\): it may do more than normalise; use norm=keep\.$"):
        spherify(model, norm="remove", inplace=True, example_input=image())
    assert [type(part) for part in model] == [nn.Conv2d, OddNorm]


def test_a_layer_without_a_twin_is_refused_by_name():
    from spherify.plan.decision import Decision
    from spherify.rewrite.swaps import swap_

    model = FromFunction(lambda self, x: x, up=nn.ConvTranspose2d(3, 4, 3))
    report = plan(small_net())
    decision = Decision(site=report.decisions[0].site, action="convert", rule="body", reason="")
    with pytest.raises(RewriteError, match=r"^0 \(ConvTranspose2d\): nothing converts it, only Conv1d, Conv2d, .*\.$"):
        swap_(model.up, decision, report.options)


def test_the_plan_carried_out_stays_with_the_model():
    model = small_net()
    report = plan(model, exclude="0")
    assert conversion_of(report.apply()) == report


def test_a_plain_model_has_no_conversion():
    message = r"^Sequential is not a converted model; convert it with spherify\(model\) first\.$"
    with pytest.raises(RewriteError, match=message):
        conversion_of(small_net())


@pytest.mark.parametrize("options", [dict(bias="drop"), dict(norm="remove")], ids=["bias", "norm"])
def test_what_was_not_saved_cannot_be_put_back(options):
    model = spherify(small_net(), **options)
    for part in model.modules():  # as after loading a folder, which does not hold what the conversion removed
        if isinstance(part, Removed):
            part.stored_state = tuple(
                {key: value.to("meta") for key, value in tensors.items()} for tensors in part.stored_state
            )
        elif isinstance(part, AngularLayer) and part._spherify_origin.dropped_bias is not None:
            hollow_bias = nn.Parameter(part._spherify_origin.dropped_bias.to("meta"))
            part._spherify_origin = replace(part._spherify_origin, dropped_bias=hollow_bias)
    types = [type(part) for part in model.modules()]
    with pytest.raises(RewriteError, match=r"^[01]: the conversion removed a bias or norm here, and the folder .*\.$"):
        undo_(model)
    assert [type(part) for part in model.modules()] == types


def test_a_layer_made_by_hand_is_no_conversion():
    model = nn.Sequential(SphereConv2d(3, 4, 3))
    assert undo_(model) == 0


def test_a_model_of_torchvision_is_converted_and_taken_back():
    model, x = torchvision_model("squeezenet1_0", num_classes=10), image(1, 3, 64, 64)
    output = model(x)
    converted = spherify(model, example_input=x)
    assert not torch.equal(converted(x), output)
    assert torch.equal(unspherify(converted)(x), output)


def test_buffers_of_infinity_do_not_hinder_conversion_or_the_way_back():
    """Bounds of a clamp (Gemma's vision tower)."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].register_buffer("least", torch.tensor(-torch.inf))
    model[0].register_buffer("most", torch.tensor(torch.inf))
    x = torch.randn(1, 3, 8, 8)
    expected = model(x)
    converted_model = spherify(model, example_input=x)
    assert is_untouched(converted_model)
    assert torch.equal(unspherify(converted_model)(x), expected)
    with torch.no_grad():
        converted_model[0].weight.fill_(torch.nan)
    assert not is_untouched(converted_model)
