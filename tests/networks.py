"""Small networks for the tests of the engine, each with one thing worth knowing."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from spherify.convert import first_run, plan
from spherify.graph.record import Inputs, Recording, record
from spherify.graph.site import Site
from spherify.graph.survey import survey
from spherify.models.resolve import build, resolve

IMAGE = (2, 3, 16, 16)


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or IMAGE), generator=torch.Generator().manual_seed(seed))


def timm_model(name: str, **arguments) -> nn.Module:
    """With the same weights at each call."""
    torch.manual_seed(0)
    return timm.create_model(name, **arguments).eval()


def hollow(name: str) -> nn.Module:
    """On meta, for what needs no weights; torchvision's with their prefix."""
    return build(resolve(name), device="meta")


def torchvision_model(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **arguments).eval()


def sites_of(model: nn.Module, example: Tensor | None = None) -> dict[str, Site]:
    _, recordings = first_run(model, example)
    return {site.name: site for site in survey(model, recordings)}


def names_with(role: str, model: nn.Module, example: Tensor | None = None) -> set[str]:
    return {name for name, site in sites_of(model, example).items() if role in site.roles}


def decisions_of(model: nn.Module, example=None, **options) -> dict:
    return {decision.site.name: decision for decision in plan(model, example_input=example, **options).decisions}


def run_of(model: nn.Module, *args, training: bool = False, **kwargs) -> Recording:
    return record(model, Inputs(args, kwargs), training=training)


class FromFunction(nn.Module):
    """A forward given as a function of the model and its inputs, over the layers given by name."""

    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def conv_bn(inputs: int, outputs: int, size: int = 3, **options) -> nn.Sequential:
    options = dict(padding=size // 2, bias=False) | options
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, **options), nn.BatchNorm2d(outputs))


def small_net() -> nn.Module:
    """conv, BatchNorm, ReLU; conv without a BatchNorm; classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


class Residual(nn.Module):
    """A residual block: two 3x3 convs, and a projection on the short side."""

    def __init__(self, inputs: int = 3, outputs: int = 8) -> None:
        super().__init__()
        self.one = conv_bn(inputs, outputs)
        self.two = conv_bn(outputs, outputs)
        self.projection = conv_bn(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + self.projection(x))


class ReadsAWeight(nn.Module):
    """The parent multiplies by its child's weight; the child itself never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.fc.weight, self.fc.bias).softmax(-1)[..., None]


class OwnWeight(nn.Module):
    """A Parameter of its own, multiplied by F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class ScaledLinear(nn.Linear):
    """Computes something else than its parent class."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class TakesDict(nn.Module):
    """Called with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.text = nn.Linear(5, 4)

    def forward(self, *, pixels: Tensor, words: Tensor) -> dict[str, Tensor]:
        return {"map": self.conv(pixels) + self.text(words)[..., None, None]}
