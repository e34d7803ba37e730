"""What lies between a classifier and the output: averages and rearrangements pass, all else is named."""

import pytest
import torch
from networks import FromFunction, image
from torch import nn

from spherify.convert import first_run
from spherify.graph.after_heads import Change, changes_after
from spherify.graph.survey import survey


def features(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.body(x).mean((2, 3))


def found(function) -> dict[str, tuple[Change, ...]]:
    layers = dict(body=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 4), other=nn.Linear(8, 4), norm=nn.LayerNorm(4))
    model = FromFunction(function, **layers)
    _, recordings = first_run(model, image())
    return changes_after(model, recordings, survey(model, recordings))


HARMLESS = {
    "nothing": lambda m, x: m.fc(features(m, x)),
    "mean of two": lambda m, x: (m.fc(features(m, x)) + m.other(features(m, x))) / 2,
    "stacked mean": lambda m, x: torch.stack([m.fc(features(m, x)), m.other(features(m, x))]).mean(0),
    "a pair": lambda m, x: (m.fc(features(m, x)), m.other(features(m, x))),
    "scaled by a number": lambda m, x: 3 * m.fc(features(m, x)).reshape(-1, 4),
    "softmax in eval mode alone": lambda m, x: m.fc(features(m, x)) if m.training else m.fc(features(m, x)).softmax(-1),
    "a mean over positions": lambda m, x: m.fc(m.body(x).movedim(1, -1)).mean((1, 2)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_keeps_the_ratios_of_the_logits_is_passed(name):
    changes = found(HARMLESS[name])
    assert changes
    assert not any(changes.values())


CHANGING = {
    "softmax": (lambda m, x: m.fc(features(m, x)).softmax(-1), "softmax"),
    "something added": (lambda m, x: m.fc(features(m, x)) + m.norm.weight, "add"),
    "scaled class by class": (lambda m, x: m.fc(features(m, x)) * m.norm.weight, "mul"),
    "clamped": (lambda m, x: m.fc(features(m, x)).clamp(-1, 1), "clamp"),
}


@pytest.mark.parametrize(("function", "name"), CHANGING.values(), ids=CHANGING)
def test_what_does_more_is_named(function, name):
    assert found(function)["fc"] == (Change(name, "", False),)
