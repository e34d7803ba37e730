"""Shape rules answer as torch does, and leave to torch what torch would refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spherify.errors import ModelError
from spherify.graph.record import Inputs, record, tensors_in
from spherify.graph.shapes import SHAPE_RULES, answer


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


VECTOR = meta(6)
LSTM_WEIGHTS = [parameter.to("meta") for parameter in nn.LSTM(5, 4, 2, bidirectional=True).parameters()]
STATE = (meta(4, 3, 4), meta(4, 3, 4))
ANSWERED = {
    "batch norm": (F.batch_norm, (meta(2, 6, 5, 5), VECTOR, VECTOR, VECTOR, VECTOR), {"training": True}),
    "batch norm in eval mode": (F.batch_norm, (meta(2, 6), VECTOR, VECTOR), {}),
    "batch norm in half": (F.batch_norm, (meta(2, 6, 5, dtype=torch.float16), VECTOR, VECTOR), {}),
    "layer norm": (F.layer_norm, (meta(2, 5, 6), (6,), VECTOR), {}),
    "relu": (F.relu, (meta(2, 3),), {}),
    "relu6": (F.relu6, (meta(2, 3),), {"inplace": False}),
    "silu": (F.silu, (meta(2, 3, dtype=torch.bfloat16),), {}),
    "hardswish": (F.hardswish, (meta(2, 3),), {}),
    "hardsigmoid": (F.hardsigmoid, (meta(2, 3),), {}),
    "gelu": (F.gelu, (meta(2, 3),), {"approximate": "tanh"}),
    "lstm": (torch.lstm, (meta(7, 3, 5), STATE, LSTM_WEIGHTS, True, 2, 0.0, False, True, False), {}),
    "lstm with the batch first": (torch.lstm, (meta(3, 7, 5), STATE, LSTM_WEIGHTS, True, 2, 0.0, True, True, True), {}),
}


@pytest.mark.parametrize(("function", "args", "kwargs"), ANSWERED.values(), ids=ANSWERED)
def test_a_rule_answers_as_torch_does(function, args, kwargs):
    truth = list(tensors_in(function(*args, **kwargs)))
    told = list(tensors_in(answer(function, args, kwargs)))
    assert [(t.shape, t.dtype, t.device) for t in told] == [(t.shape, t.dtype, t.device) for t in truth]


def test_every_rule_is_tested():
    assert {function for function, _, _ in ANSWERED.values()} == set(SHAPE_RULES)


LEFT_TO_TORCH = {
    "other channels": (F.batch_norm, (meta(2, 5, 3), VECTOR, VECTOR), {}),
    "one value a channel": (F.batch_norm, (meta(1, 6), VECTOR, VECTOR), {"training": True}),
    "other sizes": (F.layer_norm, (meta(2, 5), (6,)), {}),
    "other features": (torch.lstm, (meta(7, 3, 9), STATE, LSTM_WEIGHTS, True, 2, 0.0, False, True, False), {}),
    "unknown arguments": (F.relu, (meta(2),), {"colour": 1}),
}


@pytest.mark.parametrize(("function", "args", "kwargs"), LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_what_torch_would_refuse_is_left_to_it(function, args, kwargs):
    assert answer(function, args, kwargs) is None
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        function(*args, **kwargs)


def test_tensors_with_data_are_left_to_torch():
    assert answer(F.relu, (torch.ones(2),), {}) is None


def test_an_activation_in_place_is_recorded_and_gives_back_its_input():
    x = meta(2, 3)
    assert answer(F.relu, (x,), {"inplace": True}) is x
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    graph = record(model, Inputs((meta(2, 3),)), training=False).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [F.linear, F.relu, F.linear]
    last = [node for node in graph.nodes if node.op == "call_function"][-1]
    assert last.args[0].target is F.relu


def test_a_model_that_does_not_fit_is_refused_as_before():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(5))
    with pytest.raises(ModelError, match="does not run in eval mode"):
        record(model, Inputs((meta(2, 3),)), training=False)
