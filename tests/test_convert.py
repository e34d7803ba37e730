"""The route as a whole: any network in, the same network on angles out."""

import inspect
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import (
    FromFunction,
    ScaledLinear,
    TakesDict,
    decisions_of,
    hollow,
    image,
    small_net,
    timm_model,
    torchvision_model,
)
from torch import nn

from spherify.convert import as_inputs, copy_of, plan, spherify, unspherify
from spherify.errors import ModelError, OptionError, SpherifyError
from spherify.graph.record import Inputs
from spherify.layers.angular import AngularLayer
from spherify.layers.conv import SphereConv1d, SphereConv2d, SphereConv3d
from spherify.layers.linear import SphereLinear
from spherify.models.resolve import SOURCE
from spherify.plan.options import Options


def types_of(model):
    return [type(part).__name__ for part in model.modules() if isinstance(part, AngularLayer)]


def test_resnet18_is_converted_by_its_name_in_seconds():
    start = time.perf_counter()
    model = spherify("resnet18", skip_shortcuts=True)
    assert time.perf_counter() - start < 10  # about one second on one core; this is no benchmark
    assert len(types_of(model)) == 17
    assert getattr(model, SOURCE).label == "timm:resnet18"


def test_a_name_takes_its_number_of_classes_and_its_seed():
    one = spherify("test_resnet", num_classes=7, seed=3)
    other = spherify("test_resnet", num_classes=7, seed=3)
    assert one.num_classes == 7
    assert torch.equal(one.conv1[0].weight, other.conv1[0].weight)


def test_a_name_takes_weights_from_a_file(tmp_path):
    donor = timm_model("test_resnet")
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = spherify("test_resnet", checkpoint=tmp_path / "weights.pth")
    assert torch.equal(model.conv1[0].weight, donor.conv1[0].weight)


def test_a_model_of_torchvision_is_converted_by_its_name():
    model = spherify("torchvision:squeezenet1_0", num_classes=5)
    assert len(types_of(model)) == 25
    assert getattr(model, SOURCE).label == "torchvision:squeezenet1_0"


@pytest.mark.parametrize(
    "argument",
    [dict(pretrained=True), dict(checkpoint="x.pth"), dict(seed=0)],
    ids=lambda a: next(iter(a)),
)
def test_what_goes_with_a_name_is_refused_with_a_module(argument):
    message = r"^pretrained, checkpoint and seed go with a model's name, not with a module\.$"
    with pytest.raises(OptionError, match=message):
        spherify(small_net(), **argument)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(operator="cos"), "operator 'cos' is unknown; choose one of: cosine, linear, sigmoid, learnable"),
        (dict(k=2), "operator 'cosine' has no k"),
        (dict(eps=0.0), "eps=0.0 is no positive number"),
        (dict(head="none"), "head 'none' is unknown; choose one of: keep, convert"),
        (dict(exclude="layer9"), "selector 'layer9' matches no layer; the nearest is"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_changed(options, message):
    model = small_net()
    with pytest.raises(OptionError, match=message):
        spherify(model, inplace=True, **options)
    assert types_of(model) == []


def test_spherify_takes_every_option():
    fields = inspect.signature(Options).parameters
    taken = inspect.signature(spherify).parameters
    assert set(fields) <= set(taken)
    assert {name: taken[name].default for name in fields} == {name: fields[name].default for name in fields}


def test_a_copy_is_converted_where_nothing_is_said():
    model = small_net()
    converted = spherify(model)
    assert types_of(model) == []
    assert types_of(converted) == ["SphereConv2d", "SphereConv2d"]


def test_a_multilayer_perceptron():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    converted = spherify(model)
    assert types_of(converted) == ["SphereLinear"] * 2
    assert converted(torch.rand(2, 6)).shape == (2, 3)


def test_a_network_of_one_dimension():
    model = nn.Sequential(nn.Conv1d(2, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    model.append(nn.Linear(8, 3))
    converted = spherify(model)
    assert type(converted[0]) is SphereConv1d
    assert converted(torch.rand(2, 2, 20)).shape == (2, 3)


def test_a_network_of_three_dimensions():
    model = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    model.append(nn.Linear(8, 3))
    converted = spherify(model, example_input=torch.rand(1, 3, 4, 8, 8))
    assert type(converted[0]) is SphereConv3d
    assert converted(torch.rand(2, 3, 5, 6, 6)).shape == (2, 3)


class OnlyRenamed(nn.Conv2d):
    """Made in another way, computes the same."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)


def test_a_subclass_that_computes_the_same_is_converted():
    model = nn.Sequential(OnlyRenamed(3))
    converted = spherify(model)
    assert type(converted[0]) is SphereConv2d
    assert type(unspherify(converted)[0]) is OnlyRenamed


def test_a_subclass_that_computes_something_else_is_not():
    decision = decisions_of(nn.Sequential(ScaledLinear(6, 6), nn.Linear(6, 3)))["0"]
    assert (decision.action, decision.rule) == ("unsupported", "type")


def test_a_video_network_is_converted():
    summary = plan(hollow("torchvision:r3d_18")).summary()
    assert summary["converted"] + summary["unsupported"] == 20
    assert summary["kept"] == 1


@pytest.mark.parametrize(
    ("layer", "x", "twin"),
    [
        (nn.Conv2d(3, 4, 3), image(), SphereConv2d),
        (nn.Conv1d(3, 4, 3), image(2, 3, 9), SphereConv1d),
        (nn.Linear(6, 4), torch.rand(2, 6), SphereLinear),
    ],
)
def test_a_model_that_is_one_layer(layer, x, twin):
    output = layer(x)
    converted = spherify(layer, head="convert", example_input=x)
    assert type(converted) is twin
    assert not torch.equal(converted(x), output)
    assert torch.equal(unspherify(converted)(x), output)


def test_a_model_called_with_keywords():
    example = dict(pixels=image(), words=torch.rand(2, 5))
    converted = spherify(TakesDict(), example_input=example)
    assert types_of(converted) == ["SphereConv2d", "SphereLinear"]
    assert converted(**example)["map"].shape == (2, 4, 14, 14)


def test_a_model_called_with_two_inputs():
    model = FromFunction(lambda self, x, y: self.b(self.a(x) + y), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    example = (torch.rand(2, 4), torch.rand(2, 4))
    assert types_of(spherify(model, example_input=example)) == ["SphereLinear"]


def test_an_example_is_a_tensor_a_tuple_or_a_dict():
    x = torch.rand(2)
    assert as_inputs(x) == Inputs((x,))
    assert as_inputs((x, 1)) == Inputs((x, 1))
    assert as_inputs([x]) == Inputs(([x],))
    assert as_inputs({"x": x}) == Inputs((), {"x": x})


def test_an_example_without_data_is_enough():
    assert types_of(spherify(small_net(), example_input=torch.empty(2, 3, 8, 8, device="meta")))


def test_a_model_without_any_layer_to_guess_from_asks_for_an_example():
    with pytest.raises(ModelError, match=r"^Sequential: no input can be guessed; pass example_input=\.\.\. \.$"):
        spherify(nn.Sequential(nn.ReLU()))


def test_a_model_that_runs_on_no_guess_asks_for_an_example():
    model = FromFunction(lambda self, x, mask: self.fc(x) * mask, fc=nn.Linear(4, 2))
    message = (
        r"^FromFunction does not run in eval mode on an input of shape \(2, 4\) \(TypeError: .*'mask'\); pass example"
    )
    with pytest.raises(ModelError, match=message):
        spherify(model)


def test_an_example_that_does_not_fit_is_told():
    with pytest.raises(ModelError, match=r"Sequential does not run in eval mode on an input of shape \(2, 5, 8, 8\)"):
        spherify(small_net(), example_input=image(2, 5, 8, 8))


def test_a_model_that_reads_its_data_is_converted():
    model = FromFunction(lambda self, x: self.b(F.relu(self.a(x))[x.sum(1) > 0]), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    assert types_of(spherify(model)) == ["SphereLinear"]


def test_a_model_that_cannot_be_copied_is_refused_and_converted_in_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        torch.nn.utils.weight_norm(model[0])
    model(image()).sum().backward()  # leaves a non-leaf tensor in model[0].weight
    message = r"^Sequential cannot be copied \(RuntimeError: Only Tensors created .*\); pass inplace=True\.$"
    with pytest.raises(ModelError, match=message):
        spherify(model)
    assert types_of(spherify(model, inplace=True)) == ["SphereConv2d"]
    with pytest.raises(ModelError, match=message):
        unspherify(model)


def test_whatever_stops_a_copy_is_told():
    model = small_net()
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"^Sequential cannot be copied \(TypeError: .*\); pass inplace=True\.$"):
        copy_of(model)


def test_norm_and_activation_of_a_hand_made_network_are_removed():
    model = small_net()
    converted = spherify(model, norm="remove", activation="remove")
    x = image()
    expected = converted[7](converted[5](converted[3](converted[0](x))).flatten(1))
    assert torch.equal(converted(x), expected)


def test_k_and_eps_reach_every_layer():
    converted = spherify(small_net(), operator="sigmoid", k=0.7, eps=1e-3)
    layers = [part for part in converted.modules() if isinstance(part, AngularLayer)]
    assert {(layer.operator, layer.k, layer.eps) for layer in layers} == {("sigmoid", 0.7, 1e-3)}


def test_a_recurrent_network_keeps_its_recurrence_and_says_so():
    model = FromFunction(
        lambda self, x: self.fc(self.body(self.rnn(x)[0])[:, -1]),
        rnn=nn.LSTM(6, 4, batch_first=True),
        body=nn.Linear(4, 4),
        fc=nn.Linear(4, 2),
    )
    decisions = decisions_of(model, torch.rand(2, 5, 6))
    assert {name: decision.action for name, decision in decisions.items()} == {
        "rnn": "unsupported",
        "body": "convert",
        "fc": "keep",
    }


def test_a_transformer_encoder_answers_alike_in_eval_and_train_mode():
    encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 8), encoder, nn.Linear(8, 3))
    x = torch.rand(2, 5, 6)
    converted = spherify(model, example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(converted.eval()(x), converted.train()(x))


MICRO = {
    "test_resnet": (lambda: timm_model("test_resnet"), 64),
    "test_vit": (lambda: timm_model("test_vit"), 160),
    "test_convnext": (lambda: timm_model("test_convnext"), 64),
    "test_efficientnet": (lambda: timm_model("test_efficientnet"), 64),
    "test_byobnet": (lambda: timm_model("test_byobnet"), 64),
    "test_nfnet": (lambda: timm_model("test_nfnet"), 64),
    "squeezenet1_0": (lambda: torchvision_model("squeezenet1_0", num_classes=10), 64),
    "mobilenet_v3_small": (lambda: torchvision_model("mobilenet_v3_small", num_classes=10), 64),
}


def outputs_and_gradients(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(0)  # of dropout
    output = model(x)
    output.square().sum().backward()
    return {"output": output, "input": x.grad, **{name: value.grad for name, value in model.named_parameters()}}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("make", "size"), MICRO.values(), ids=MICRO)
def test_the_plain_product_through_the_same_machinery_is_bit_equal(make, size, training):
    x = image(2, 3, size, size)
    converted = spherify(make(), operator="identity", head="convert", inplace=True, example_input=x)
    assert types_of(converted)
    expected, found = (outputs_and_gradients(model.train(training), x) for model in (make(), converted))
    assert list(found) == list(expected)
    different = [
        name
        for name, value in expected.items()
        if (value is None) != (found[name] is None) or (value is not None and not torch.equal(found[name], value))
    ]
    assert different == []
    assert expected["input"].abs().sum() > 0


@pytest.mark.parametrize("operator", ["cosine", "linear", "sigmoid", "learnable"])
def test_outputs_are_finite_and_other_than_before(operator):
    model, x = timm_model("test_efficientnet"), image(2, 3, 64, 64)
    output = spherify(model, operator=operator)(x)
    assert output.isfinite().all()
    assert not torch.allclose(output, model(x))


def test_errors_are_of_one_family():
    for error in (OptionError, ModelError):
        assert issubclass(error, SpherifyError)
    assert issubclass(OptionError, ValueError)
    assert issubclass(ModelError, TypeError)


def test_an_input_the_model_also_trains_on_goes_first():
    class NeedsLargeImages(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.aux = nn.Conv2d(4, 2, 250)

        def forward(self, x):
            x = self.conv(x)
            return (x, self.aux(x)) if self.training else x

    report = plan(NeedsLargeImages())
    assert [decision.rule for decision in report.decisions] == ["body", "head"]  # not "unused"
    assert not any("Train mode could not be recorded" in note for note in report.notes)
