"""Activations that a folded layer computes itself: where it may, where it must not, and the same outputs."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from spherify import fold, load, save, spherify
from spherify.graph.folding import FoldPlan
from spherify.layers.folded import FoldedAway

OPERATORS = [
    dict(operator="cosine"),
    dict(operator="linear"),
    dict(operator="sigmoid", k=0.3),
    dict(operator="learnable"),
]
X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def folded_pair(plain: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """A converted network whose norms change sign and size of what they get, and its folded form."""
    torch.manual_seed(0)
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.001, 0.01)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    model = spherify(plain, **{"operator": "cosine", "example_input": X, **options}).eval()
    return model, fold(model, example_input=X)


class Block(nn.Module):
    """Subclasses say what follows the convolution."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation or nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


@pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()], ids=str)
def test_a_layer_takes_its_activation_in(activation, options):
    model, folded = folded_pair(Block(activation), **options)
    name = type(activation).__name__.lower()
    assert isinstance(folded.act, FoldedAway)
    assert folded.conv.activation == name
    assert f"activation={name}" in repr(folded.conv)
    with torch.no_grad():
        expected = model(X)
        assert (expected == 0).any()
        assert (expected > 1).any()
        assert_close(folded(X), expected, rtol=1e-5, atol=1e-5)
    wide = folded.double()
    with torch.no_grad():
        assert_close(wide(X.double()), model.double()(X.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
def test_a_linear_layer_with_a_gain_takes_its_activation_in(options):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(300, 6), nn.ReLU(), nn.Linear(6, 4))
    model, folded = folded_pair(plain, **options)
    assert folded[1].activation == "relu"
    with torch.no_grad():
        assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 12, 12), (3, 3, 5, 5), (2, 3, 3, 3)], ids=["wide", "small", "one pixel"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
@torch.no_grad()
def test_a_layer_takes_gelu_in_for_every_layout(options, layout, shape):
    model, folded = folded_pair(Block(nn.GELU()), **options)
    assert isinstance(folded.act, FoldedAway)
    assert folded.conv.activation == "gelu"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    x[0, 0, 0, 0] = float("nan")
    expected = model(x)
    assert expected.isnan().any()
    for _ in range(3):  # the third time by the short way
        assert_close(folded(x), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("act", [nn.GELU(), timm.layers.activations.GELU()], ids=["torch", "timm"])
@pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
def test_linear_layers_take_gelu_in(act, options):
    plain = nn.Sequential(nn.Flatten(2), nn.Linear(100, 90), act, nn.Linear(90, 4))
    model, folded = folded_pair(plain, **options)
    assert folded[1].activation == "gelu"
    with torch.no_grad():
        for _ in range(3):
            assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(folded(X).float(), model(X).float(), rtol=0.1, atol=0.1)
        assert_close(folded.double()(X.double()), model.double()(X.double()), rtol=1e-6, atol=1e-6)
    x = X.double().requires_grad_()
    one, other = (torch.autograd.grad(form(x).square().sum(), x)[0] for form in (model, folded))
    assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", [nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(), nn.Tanh()], ids=str)
def test_other_activations_stay(act):
    model, folded = folded_pair(Block(act))
    assert type(folded.act) is type(act)
    assert folded.conv.activation is None
    with torch.no_grad():
        assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)


class TwoReaders(Block):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.act(y) - y


class RunsTwice(Block):
    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return self.act(1.0 - y)


class OfAFunction(Block):
    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class BehindSomethingElse(Block):
    def forward(self, x):
        return self.act(-self.norm(self.conv(x)))


class BehindASum(Block):
    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + x[:, :1, 1:-1, 1:-1])


@pytest.mark.parametrize("kind", [TwoReaders, RunsTwice, OfAFunction, BehindSomethingElse, BehindASum])
def test_an_activation_that_is_not_alone_behind_the_layer_stays(kind):
    model, folded = folded_pair(kind(nn.ReLU()))
    assert type(folded.act) is nn.ReLU
    assert folded.conv.activation is None
    with torch.no_grad():
        assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)


def test_an_activation_with_a_hook_stays():
    model, _ = folded_pair(Block())
    seen = []
    model.act.register_forward_hook(lambda module, args, output: seen.append(output))
    folded = fold(model, example_input=X)
    assert type(folded.act) is nn.ReLU
    folded(X)
    assert len(seen) == 1


def test_an_activation_behind_a_plain_layer_stays():
    model, folded = folded_pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), exclude=["0"])
    assert type(folded[1]) is nn.ReLU
    assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)


def test_the_activation_that_timm_keeps_in_a_norm_is_taken_in():
    class Act(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8)

        def forward(self, x):
            return self.norm(self.conv(x))

    model, folded = folded_pair(Act())
    assert isinstance(folded.norm, FoldedAway)
    assert isinstance(folded.norm.act, FoldedAway)
    with torch.no_grad():
        assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_gradient_by_the_input_passes_the_activation():
    model, folded = folded_pair(Block(nn.ReLU6()), operator="sigmoid")
    x = X.clone().requires_grad_()
    one, other = (torch.autograd.grad(form(x).square().sum(), x)[0] for form in (model, folded))
    assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", ["cosine", "linear"])
def test_autocast_and_channels_last_give_the_same(operator):
    model, folded = folded_pair(Block(), operator=operator)
    with torch.no_grad():
        last = folded.to(memory_format=torch.channels_last)(X.contiguous(memory_format=torch.channels_last))
        assert_close(last, model(X), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(folded(X).float(), model(X).float(), rtol=0.1, atol=0.1)


def test_a_saved_activation_is_loaded_and_a_record_without_any_is_read(tmp_path):
    folded = fold(spherify("test_resnet"))
    assert folded.spherify_fold.activations["conv1.0"] == "conv1.2"
    loaded = load(save(folded, tmp_path / "folded"))
    assert loaded.spherify_fold == folded.spherify_fold
    assert loaded.layer1[0].conv1.activation == "relu"
    assert FoldPlan.from_record({"norms": {}, "shared": []}).activations == {}


def test_a_program_holds_the_activation():
    model, folded = folded_pair(Block(nn.ReLU6()), operator="linear")
    program = torch.export.export(folded, (X,)).module()
    assert_close(program(X), model(X), rtol=1e-5, atol=1e-5)
