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


def turned(*shape):
    """Without a gap, in another order than that of its dimensions."""
    return meta(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def gappy(*shape):
    return meta(*shape[:-1], 2 * shape[-1])[..., ::2]


VECTOR = meta(6)
IMAGE = meta(2, 6, 5, 5)
QUERY, KEY = meta(2, 3, 5, 8), meta(2, 3, 7, 8)
LSTM_WEIGHTS = [parameter.to("meta") for parameter in nn.LSTM(5, 4, 2, bidirectional=True).parameters()]
STATE = (meta(4, 3, 4), meta(4, 3, 4))
ANSWERED = {
    "batch norm": (F.batch_norm, (IMAGE, VECTOR, VECTOR, VECTOR, VECTOR), {"training": True}),
    "batch norm in eval mode": (F.batch_norm, (meta(2, 6), VECTOR, VECTOR), {}),
    "batch norm in half": (F.batch_norm, (meta(2, 6, 5, dtype=torch.float16), VECTOR, VECTOR), {}),
    "batch norm of another order": (F.batch_norm, (turned(2, 6, 5, 5), VECTOR, VECTOR), {}),
    "layer norm": (F.layer_norm, (meta(2, 5, 6), (6,), VECTOR), {}),
    "rms norm": (F.rms_norm, (meta(2, 5, 6), (6,), VECTOR), {}),
    "group norm": (F.group_norm, (IMAGE, 3, VECTOR, VECTOR), {"eps": 1e-6}),
    "relu": (F.relu, (meta(2, 3),), {}),
    "relu of another order": (F.relu, (turned(2, 6, 5, 5),), {}),
    "relu with gaps": (F.relu, (gappy(2, 3),), {}),
    "relu6": (F.relu6, (meta(2, 3),), {"inplace": False}),
    "silu": (F.silu, (meta(2, 3, dtype=torch.bfloat16),), {}),
    "mish": (F.mish, (meta(2, 3),), {}),
    "hardswish": (F.hardswish, (meta(2, 3),), {}),
    "hardsigmoid": (F.hardsigmoid, (meta(2, 3),), {}),
    "leaky relu": (F.leaky_relu, (meta(2, 3),), {"negative_slope": 0.1}),
    "elu": (F.elu, (meta(2, 3), 1.5), {}),
    "gelu": (F.gelu, (meta(2, 3),), {"approximate": "tanh"}),
    "softmax": (F.softmax, (meta(2, 3),), {"dim": -1}),
    "attention": (F.scaled_dot_product_attention, (QUERY, KEY, KEY), {}),
    "attention in another order": (F.scaled_dot_product_attention, (turned(2, 5, 3, 8),) * 3, {"is_causal": True}),
    "attention with a bias": (F.scaled_dot_product_attention, (QUERY, KEY, KEY, meta(3, 5, 7)), {"scale": 1.0}),
    "attention with a mask": (F.scaled_dot_product_attention, (QUERY, KEY, KEY, meta(5, 7, dtype=torch.bool)), {}),
    "linear": (F.linear, (meta(2, 5, 6), meta(4, 6), meta(4)), {}),
    "linear of another order": (F.linear, (turned(2, 5, 6), meta(4, 6)), {}),
    "linear of a vector": (F.linear, (VECTOR, meta(4, 6)), {"bias": meta(4)}),
    "conv1d": (F.conv1d, (meta(2, 6, 9), meta(4, 6, 3)), {"stride": 2, "padding": 1}),
    "conv2d": (F.conv2d, (meta(2, 6, 9, 8), meta(4, 3, 3, 2), meta(4), (2, 1), (1, 0), (1, 2), 2), {}),
    "conv3d": (F.conv3d, (meta(2, 6, 4, 5, 5), meta(4, 6, 1, 3, 3), meta(4)), {"dilation": 2}),
    "cat": (torch.cat, ([meta(2, 3), meta(2, 4)],), {"dim": -1}),
    "matmul": (torch.matmul, (QUERY, KEY.transpose(-2, -1)), {}),
    "mean": (torch.mean, (IMAGE, (2, 3)), {"keepdim": True}),
    "mean of one dimension": (torch.mean, (IMAGE, -1), {}),
    "interpolate": (F.interpolate, (IMAGE,), {"size": 7, "mode": "bilinear", "align_corners": False}),
    "interpolate by a factor": (F.interpolate, (IMAGE,), {"scale_factor": (2.0, 1.5)}),
    "adaptive pool": (F.adaptive_avg_pool2d, (IMAGE, (2, None)), {}),
    "lstm": (torch.lstm, (meta(7, 3, 5), STATE, LSTM_WEIGHTS, True, 2, 0.0, False, True, False), {}),
    "lstm with the batch first": (torch.lstm, (meta(3, 7, 5), STATE, LSTM_WEIGHTS, True, 2, 0.0, True, True, True), {}),
}
UNARY = ("sigmoid", "tanh", "relu", "exp", "rsqrt")
ARITHMETIC = ("add", "sub", "mul", "div")
PAIRS = {
    "a number": (IMAGE, 2.5),
    "a whole number": (IMAGE, 2),
    "alike": (IMAGE, IMAGE),
    "both of another order": (turned(2, 6, 5, 5), turned(2, 6, 5, 5)),
    "the first of another order": (turned(2, 6, 5, 5), IMAGE),
    "the second of another order": (IMAGE, turned(2, 6, 5, 5)),
    "a vector": (meta(2, 5, 6), VECTOR),
    "a vector of another order": (turned(2, 6, 5, 5), meta(6, 1, 1)),
    "a vector first": (meta(6, 1, 1), turned(2, 6, 5, 5)),
    "a column": (IMAGE, meta(2, 6, 1, 1)),
    "both widened": (meta(2, 1, 5), meta(6, 1)),
    "in half": (meta(2, 3, dtype=torch.float16), meta(3, dtype=torch.float16)),
}
for name in UNARY:
    ANSWERED[f"torch.{name}"] = (getattr(torch, name), (IMAGE,), {})
    ANSWERED[f"Tensor.{name}"] = (getattr(torch.Tensor, name), (turned(2, 6, 5, 5),), {})
for name in ARITHMETIC:
    for what, pair in PAIRS.items():
        ANSWERED[f"torch.{name} of {what}"] = (getattr(torch, name), pair, {})
    ANSWERED[f"Tensor.{name}"] = (getattr(torch.Tensor, name), PAIRS["alike"], {})
ANSWERED["Tensor.neg"] = (torch.Tensor.neg, (IMAGE,), {})
ANSWERED["Tensor.__rsub__"] = (torch.Tensor.__rsub__, (IMAGE, 1), {})
ANSWERED["Tensor.softmax"] = (torch.Tensor.softmax, (IMAGE, 1), {})
ANSWERED["torch.softmax"] = (torch.softmax, (IMAGE, -1), {})
ANSWERED["Tensor.matmul"] = (torch.Tensor.matmul, (IMAGE, IMAGE), {})
ANSWERED["Tensor.mean"] = (torch.Tensor.mean, (IMAGE, [1]), {})

IN_PLACE = {
    **{f"{name}_": (getattr(torch.Tensor, f"{name}_"), (IMAGE,)) for name in ("sigmoid", "tanh", "relu")},
    **{f"{name}_": (getattr(torch.Tensor, f"{name}_"), (IMAGE, meta(6, 1, 1))) for name in ARITHMETIC},
    "add_ of a number": (torch.Tensor.add_, (IMAGE, 2.5)),
}


@pytest.mark.parametrize(("function", "args", "kwargs"), ANSWERED.values(), ids=ANSWERED)
def test_a_rule_answers_as_torch_does(function, args, kwargs):
    truth = list(tensors_in(function(*args, **kwargs)))
    told = list(tensors_in(answer(function, args, kwargs)))
    assert [known_of(tensor) for tensor in told] == [known_of(tensor) for tensor in truth]


def known_of(tensor):
    """What a model can see of a tensor without data; the stride of a single entry leads nowhere."""
    strides = tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return tensor.shape, strides, tensor.dtype, tensor.device


@pytest.mark.parametrize(("function", "args"), IN_PLACE.values(), ids=IN_PLACE)
def test_a_function_in_place_gives_back_its_input(function, args):
    assert answer(function, args, {}) is args[0]
    assert function(*args) is args[0]


def test_every_rule_is_tested():
    tested = {function for function, *_ in (*ANSWERED.values(), *IN_PLACE.values())}
    assert tested == set(SHAPE_RULES)


LEFT_TO_TORCH = {
    "other channels": (F.batch_norm, (meta(2, 5, 3), VECTOR, VECTOR), {}),
    "one value a channel": (F.batch_norm, (meta(1, 6), VECTOR, VECTOR), {"training": True}),
    "other sizes": (F.layer_norm, (meta(2, 5), (6,)), {}),
    "other features": (torch.lstm, (meta(7, 3, 9), STATE, LSTM_WEIGHTS, True, 2, 0.0, False, True, False), {}),
    "unknown arguments": (F.relu, (meta(2),), {"colour": 1}),
    "a remainder of groups": (F.group_norm, (IMAGE, 4), {}),
    "one value a group": (F.group_norm, (meta(1, 6), 6), {}),
    "other rows": (F.linear, (meta(2, 5), meta(4, 6)), {}),
    "another bias": (F.linear, (meta(2, 6), meta(4, 6), meta(3)), {}),
    "other channels of a convolution": (F.conv2d, (IMAGE, meta(4, 5, 3, 3)), {}),
    "a kernel larger than the image": (F.conv2d, (IMAGE, meta(4, 6, 7, 7)), {}),
    "shapes without a common one": (torch.add, (meta(2, 3), meta(2, 4)), {}),
    "a sum larger than its place": (torch.Tensor.add_, (VECTOR, meta(2, 6)), {}),
    "matrices that do not fit": (torch.matmul, (IMAGE, meta(2, 6, 4, 5)), {}),
    "keys of another length": (F.scaled_dot_product_attention, (QUERY, meta(2, 3, 7, 9), KEY), {}),
    "a mask of another size": (F.scaled_dot_product_attention, (QUERY, KEY, KEY, meta(5, 6)), {}),
    "a dimension too far": (torch.mean, (IMAGE, 4), {}),
    "a dimension named twice": (torch.mean, (IMAGE, (1, -3)), {}),
    "pieces that do not fit": (torch.cat, ([meta(2, 3), meta(3, 3)], 1), {}),
    "corners of the nearest": (F.interpolate, (IMAGE,), {"size": 3, "mode": "nearest", "align_corners": True}),
    "no dimension for it": (F.interpolate, (IMAGE,), {"size": 3, "mode": "linear"}),
}


@pytest.mark.parametrize(("function", "args", "kwargs"), LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_what_torch_would_refuse_is_left_to_it(function, args, kwargs):
    assert answer(function, args, kwargs) is None
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)):
        function(*args, **kwargs)


def test_tensors_with_data_are_left_to_torch():
    assert answer(F.relu, (torch.ones(2),), {}) is None
    assert answer(torch.add, (VECTOR, torch.ones(6)), {}) is None


def test_subclasses_and_unlike_types_are_left_to_torch():
    class Labelled(torch.Tensor):
        pass

    assert answer(F.relu, (VECTOR.as_subclass(Labelled),), {}) is None
    assert answer(torch.add, (VECTOR, VECTOR.as_subclass(Labelled)), {}) is None
    assert answer(torch.add, (VECTOR, VECTOR.double()), {}) is None
    assert answer(torch.add, (meta(2, dtype=torch.int64), 2.5), {}) is None


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
