"""After a conversion one more run is recorded, and what does not hold is an error that leaves no trace."""

from dataclasses import replace

import pytest
import torch
from networks import FromFunction, image, small_net
from torch import nn

from spherify.convert import bound, first_run, plan, spherify
from spherify.errors import RewriteError, SpherifyError
from spherify.layers.linear import SphereLinear
from spherify.rewrite.apply import CONVERSION

X = torch.rand(2, 6)


def converting_everything(model, example):
    """A plan that converts every layer against all rules, bound to the model."""
    report = plan(model, example_input=example)
    decisions = tuple(replace(decision, action="convert", rule="mine") for decision in report.decisions)
    inputs, recordings = first_run(model, example)
    return bound(replace(report, decisions=decisions), model, None, recordings, inputs)


def unused_layer():
    return FromFunction(lambda self, x: self.fc(x), fc=nn.Linear(6, 4), lost=nn.Linear(6, 4))


def test_a_converted_layer_that_does_not_run_is_an_error():
    report = converting_everything(unused_layer(), X)
    with pytest.raises(
        RewriteError, match=r"^FromFunction: the conversion does not hold: lost was converted but does "
    ):
        report.apply()


def test_a_converted_weight_that_is_read_outside_is_an_error():
    model = FromFunction(lambda self, x: self.fc(x) * self.fc.weight.norm(), fc=nn.Linear(6, 4))
    with pytest.raises(RewriteError, match=r"the weight of fc is read by the model itself\.$"):
        converting_everything(model, X).apply()


def test_all_that_does_not_hold_is_told_together():
    model = FromFunction(
        lambda self, x: self.body(x) * self.fc.weight.norm(),
        body=nn.Linear(6, 4),
        fc=nn.Linear(6, 4),
    )
    message = r"does not hold: 0\.fc was converted but does not run; the weight of 0\.fc is read by 0\.$"
    with pytest.raises(RewriteError, match=message):
        converting_everything(nn.Sequential(model), X).apply()


def test_outputs_of_other_shapes_are_an_error(monkeypatch):
    monkeypatch.setattr(SphereLinear, "forward", lambda self, x: x.new_zeros(x.shape[0], 9) * self.weight.sum())
    model = nn.Sequential(nn.Linear(6, 4))
    message = r"in eval mode the outputs have shapes \(\(2, 9\),\), not \(\(2, 4\),\); in train mode the outputs have"
    with pytest.raises(RewriteError, match=message):
        spherify(model, head="convert")


def test_a_layer_that_is_not_converted_after_all_is_an_error(monkeypatch):
    monkeypatch.setattr("spherify.convert.apply_", lambda model, report: None)
    with pytest.raises(
        RewriteError, match=r"0 is a Conv2d, not a converted layer; 3 is a Conv2d, not a converted layer"
    ):
        spherify(small_net())


def test_a_model_that_no_longer_runs_is_an_error(monkeypatch):
    def fails(self, x):
        raise ValueError("broken")

    monkeypatch.setattr(SphereLinear, "forward", fails)
    with pytest.raises(SpherifyError, match=r"Sequential does not run in eval mode .*\(ValueError: broken\)"):
        spherify(nn.Sequential(nn.Linear(6, 4)), head="convert")


@pytest.mark.parametrize("options", [dict(), dict(operator="learnable", gain="learned", bias="drop", norm="remove")])
def test_a_conversion_in_place_that_fails_is_taken_back(options, monkeypatch):
    def fail(*args):
        raise RewriteError("no")

    monkeypatch.setattr("spherify.convert.verify", fail)
    model = small_net()
    x, before = image(), {name: value.clone() for name, value in model.state_dict().items()}
    output, attributes = model(x), [set(vars(part)) for part in model.modules()]
    with pytest.raises(RewriteError, match=r"^no$"):
        spherify(model, inplace=True, **options)
    assert torch.equal(model(x), output)
    assert list(model.state_dict()) == list(before)
    assert [set(vars(part)) for part in model.modules()] == attributes
    assert CONVERSION not in vars(model)


def test_an_unused_layer_in_place_leaves_the_model_plain():
    model = unused_layer()
    with pytest.raises(RewriteError):
        converting_everything(model, X).apply(inplace=True)
    assert [type(part) for part in model.children()] == [nn.Linear, nn.Linear]


def test_the_verification_leaves_the_random_state_and_the_model_alone():
    model = small_net().train()
    report = plan(model)
    state, mean = torch.get_rng_state(), model[1].running_mean.clone()
    converted = report.apply(inplace=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(converted[1].running_mean, mean)


def test_a_model_without_layers_is_refused():
    with pytest.raises(SpherifyError, match=r"^Sequential: no conv or linear layer was found, so there is nothing to"):
        spherify(nn.Sequential(nn.ReLU()), example_input=X)


def test_a_plan_that_converts_nothing_is_refused_with_the_rules_that_kept_everything():
    message = (
        r"^Sequential: nothing would be converted \(2 by exclude, 1 by head\); "
        r"loosen include, exclude, head or linear\.$"
    )
    with pytest.raises(SpherifyError, match=message):
        spherify(small_net(), exclude=["type:Conv2d"])
