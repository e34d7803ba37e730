"""Folded layers that have met a shape before take a shorter way: with the same answer, and only where it holds."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spherify import fold, spherify
from spherify.functional import cpu_binding, quick
from spherify.layers.folded import Folded

pytestmark = pytest.mark.skipif(cpu_binding.library() is None, reason=f"CPU kernels: {cpu_binding.state()}")
OPERATORS = [dict(operator="cosine"), dict(operator="linear"), dict(operator="sigmoid"), dict(operator="learnable")]
each_operator = pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
LAYERS = {  # a layer, the size of its input
    "3x3": (lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False), (2, 6, 9, 9)),
    "strided": (lambda: nn.Conv2d(6, 8, 3, stride=2, dilation=2), (2, 6, 9, 9)),
    "1x1": (lambda: nn.Conv2d(16, 8, 1), (2, 16, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 12, 11)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 7, 7)),
    "one dimension": (lambda: nn.Conv1d(6, 8, 5, padding=2), (2, 6, 20)),
    "wide": (lambda: nn.Linear(12, 30), (2, 5, 12)),
    "narrow": (lambda: nn.Linear(30, 5, bias=False), (2, 5, 30)),
}


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = layer, nn.ReLU()

    def forward(self, x):
        return self.act(self.layer(x))


def folded_block(name, options, **memory):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    x = x.contiguous(**memory) if x.dim() == 4 else x
    model = spherify(Block(make()), example_input=x, **options).eval()
    return model, fold(model, example_input=x), x


def ways(model):
    return next(part for part in model.modules() if isinstance(part, Folded)).quick.ways


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@each_operator
@torch.no_grad()
def test_the_short_way_has_the_answer_of_the_long_one(options, name, layout):
    model, folded, x = folded_block(name, options, memory_format=layout)
    long_way = folded(x)
    other = folded(2 * x.flip(0))
    if not (layout == torch.channels_last and name == "groups"):  # the kernels do not read that
        assert len(ways(folded)) == 1
    assert torch.equal(folded(x), long_way)
    assert torch.equal(folded(x), long_way)
    assert_close(long_way, model(x), rtol=1e-5, atol=1e-5)
    assert_close(other, model(2 * x.flip(0)), rtol=1e-5, atol=1e-5)
    assert not torch.equal(other, long_way)


@each_operator
@torch.no_grad()
def test_a_constant_that_changes_is_seen(options):
    _, folded, x = folded_block("3x3", options)
    layer = folded.layer
    for _ in range(3):
        before = folded(x)
    layer.bias.add_(1.0)
    assert_close(folded(x)[before > 0], before[before > 0] + 1.0)
    layer.bias = nn.Parameter(layer.bias - 1.0, requires_grad=False)
    assert_close(folded(x), before)
    if layer.k_logit is not None:
        layer.k_logit.add_(1.0)
        assert not torch.allclose(folded(x), before)


@torch.no_grad()
def test_other_shapes_take_a_way_of_their_own_and_only_so_many_are_kept():
    model, folded, _ = folded_block("3x3", OPERATORS[1])
    for size in range(4, 4 + quick.MOST_WAYS + 3):
        images = torch.randn(2, 6, size, size)
        for _ in range(3):
            assert_close(folded(images), model(images), rtol=1e-5, atol=1e-5)
        assert 0 < len(ways(folded)) <= quick.MOST_WAYS
    before = dict(ways(folded))
    folded(torch.randn(1, 6, 50, 50))  # met once: nothing is made ready for it
    assert ways(folded) == before


@each_operator
@pytest.mark.parametrize("name", ["3x3", "wide", "narrow"])
def test_gradients_compilers_and_doubles_take_the_long_way(options, name):
    model, folded, x = folded_block(name, options)
    with torch.no_grad():
        for _ in range(3):
            folded(x)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    gradients = [
        torch.autograd.grad(run(leaf).square().sum(), leaf) for run, leaf in zip((model, folded), leaves, strict=True)
    ]
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    with torch.no_grad():
        assert_close(torch.compile(folded, backend="aot_eager", fullgraph=True)(x), model(x), rtol=1e-5, atol=1e-5)
        assert_close(folded.double()(x.double()), model.double()(x.double()), rtol=1e-5, atol=1e-5)


def test_a_weight_that_wants_a_gradient_gets_one():
    _, folded, x = folded_block("3x3", OPERATORS[0])
    with torch.no_grad():
        for _ in range(3):
            answer = folded(x)
    folded.layer.weight.requires_grad_()
    found = folded(x)
    assert_close(found, answer, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), folded.layer.weight)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(folded(x), answer)


@each_operator
@torch.no_grad()
def test_a_weight_that_lies_otherwise_may_change_how_the_output_lies(options):
    _, folded, x = folded_block("3x3", options)
    for _ in range(3):
        answer = folded(x)
    folded.to(memory_format=torch.channels_last)
    for _ in range(3):
        assert_close(folded(x), answer, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_copies_and_pickles_begin_anew():
    _, folded, x = folded_block("3x3", OPERATORS[0])
    for _ in range(3):
        answer = folded(x)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert not ways(other)
        assert torch.equal(other(x), answer)


def test_threads_that_share_a_layer_do_not_disturb_each_other():
    _, folded, _ = folded_block("3x3", OPERATORS[2])
    inputs = [torch.randn(2, 6, size, size) for size in (9, 9, 16, 16)]
    with torch.no_grad():
        truth = [folded(x) for x in inputs for _ in range(3)][::3]
    wrong = []

    def work(x, expected):
        with torch.no_grad():
            wrong.extend(1 for _ in range(200) if not torch.equal(folded(x), expected))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, truth, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["3x3", "wide", "narrow"])
@each_operator
@torch.no_grad()
def test_under_autocast_nobody_takes_the_short_way(options, name):
    _, folded, x = folded_block(name, options)
    for _ in range(3):
        answer = folded(x)
    assert ways(folded)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(folded(x).float(), answer, rtol=3e-2, atol=3e-2)
    assert torch.equal(folded(x), answer)
