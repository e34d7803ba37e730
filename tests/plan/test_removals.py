"""Norms and activations that stand behind several layers: kept where another layer needs them, or said."""

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, conv_bn, hollow, image
from torch import nn

from spherify.convert import plan, spherify, unspherify
from spherify.layers.removed import Removed


def removed_from(model):
    return {name for name, part in model.named_modules() if isinstance(part, Removed)}


class Block(nn.Module):
    """As torchvision's BasicBlock: one ReLU behind the first norm and behind the addition."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = self.relu(self.two(self.relu(self.one(x))) + x)
        return self.fc(x.mean((2, 3)))


def shared_norm(*, names="ab"):
    """Convolutions with one BatchNorm behind them all."""
    layers = {name: nn.Conv2d(3, 3, 3, padding=1) for name in names}

    def forward(self, x):
        for name in names:
            x = F.relu(self.bn(getattr(self, name)(x)))
        return self.fc(x.mean((2, 3)))

    return FromFunction(forward, bn=nn.BatchNorm2d(3), fc=nn.Linear(3, 2), **layers)


def test_an_activation_that_also_runs_elsewhere_is_removed_and_that_is_said():
    report = plan(Block(), activation="remove", example_input=image())
    assert report.removed_activations == ("relu",)
    note = "activation=remove: relu also runs elsewhere (after an addition) and is removed there too."
    assert report.notes == (note,)


def test_of_many_activations_alike_a_few_are_named():
    note = (
        "activation=remove: layer1.0.relu, layer1.1.relu, layer2.0.relu and 5 more also run elsewhere "
        "(after an addition) and are removed there too."
    )
    assert plan(hollow("torchvision:resnet18"), activation="remove").notes == (note,)


def test_an_activation_behind_a_kept_layer_too_names_that_layer():
    report = plan(Block(), activation="remove", exclude="one.0", skip_shortcuts=False, example_input=image())
    assert report.removed_activations == ()  # behind no converted layer alone
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu := nn.ReLU(), nn.Conv2d(4, 4, 3), relu, nn.Conv2d(4, 2, 1))
    report = plan(model, activation="remove", exclude="2", example_input=image())
    assert report.notes == ("activation=remove: 1 also runs elsewhere (after 2) and is removed there too.",)


def test_an_activation_behind_converted_layers_alone_needs_no_word():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu := nn.ReLU(), nn.Conv2d(4, 4, 3), relu, nn.Conv2d(4, 2, 1))
    report = plan(model, activation="remove", example_input=image())
    assert (report.removed_activations, report.notes) == (("1",), ())


def test_a_norm_behind_a_kept_layer_too_stays_and_that_is_said():
    report = plan(shared_norm(), norm="remove", exclude="b", example_input=image())
    assert report.removed_norms == ()
    decision = next(decision for decision in report.decisions if decision.site.name == "a")
    assert (decision.reason, decision.has_gain) == ("BatchNorm bn follows", False)
    assert "norm=remove: bn also runs after b and stays." in report.notes


def test_a_norm_behind_converted_layers_alone_is_removed():
    report = plan(shared_norm(), norm="remove", example_input=image())
    assert (report.removed_norms, report.notes) == (("bn",), ())


def test_a_norm_behind_an_addition_too_stays():
    model = FromFunction(
        lambda self, x: self.fc(self.bn(self.bn(self.a(x)) + x).mean((2, 3))),
        a=nn.Conv2d(3, 3, 3, padding=1),
        bn=nn.BatchNorm2d(3),
        fc=nn.Linear(3, 2),
    )
    report = plan(model, norm="remove", example_input=image())
    assert report.removed_norms == ()
    assert "norm=remove: bn also runs after an addition and stays." in report.notes


@pytest.mark.parametrize("norm", ["keep", "remove"])
def test_what_the_plan_says_of_norms_is_what_is_done(norm):
    model = shared_norm(names="abc").eval()
    converted = spherify(model, norm=norm, activation="remove", exclude="c", example_input=image())
    assert removed_from(converted) == set()
    assert torch.equal(unspherify(converted)(image()), model(image()))
