"""Folding: the same outputs, same class, nothing trained, saved and loaded, one weight at a time."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from spherify import ModelError, RewriteError, fold, load, save, spherify, unspherify
from spherify.bench.memory import peak_bytes
from spherify.export.fold import fold_any
from spherify.functional.folded import SharedNorms
from spherify.layers import SphereConv2d, SphereLinear
from spherify.layers.folded import FoldedAway, FoldedConv2d, FoldedLinear

OPERATORS = [
    dict(operator="cosine"),
    dict(operator="linear"),
    dict(operator="sigmoid", k=0.3),
    dict(operator="learnable"),
]


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """In eval mode, with running statistics, affine parts, gains and biases that are not the initial ones."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    with torch.no_grad():
        model(x)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "gain")) or parameter.dim() == 1:
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator)).add_(0.01)
    return model.eval()


def image(size: int = 48, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def difference(model: nn.Module, folded: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        one, other = model(x), folded(x)
    assert one.abs().max() > 1e-3
    return float((one - other).abs().max() / one.abs().max().clamp_min(1.0))


class Shares(nn.Module):
    """A block whose two convolutions read one tensor, changed in place between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.short = nn.Conv2d(3, 4, 1)
        self.after = nn.Conv2d(4, 4, 3)
        self.again = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.norm(self.one(x)) + self.two(x) + self.short(x)
        y = self.after(x)
        x += 1.0
        return y + self.again(x)


@pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_a_folded_model_answers_as_the_unfolded_one(name, options):
    torch.manual_seed(0)
    model = spherify(timm.create_model(name), **options)
    x = image(160 if "vit" in name or "convnext" in name else 64)
    model = settled(model, x)
    assert difference(model, fold(model), x) < 1e-5


@pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
def test_layers_that_read_one_tensor_share_its_norm_and_a_change_in_place_is_seen(options):
    torch.manual_seed(0)
    model = settled(spherify(Shares(), **options, example_input=image(12)), image(12))
    folded = fold(model, example_input=image(12))
    assert folded.spherify_fold.shared == (("one", "two", "short"),)
    assert folded.one.shared is folded.two.shared is folded.short.shared is not None
    assert folded.after.shared is None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(folded(image(12)), model(image(12)), rtol=1e-5, atol=1e-5)


def test_shared_norms_are_computed_once_and_again_when_the_tensor_changed():
    shared, x, calls = SharedNorms(), torch.ones(3), []

    def compute():
        calls.append(1)
        return x.sum()

    assert shared.get(x, "sum", compute) is shared.get(x, "sum", compute)
    assert len(calls) == 1
    x.add_(1.0)
    assert shared.get(x, "sum", compute) == 6.0
    shared.get(x.clone(), "sum", compute)
    assert len(calls) == 3
    assert copy.deepcopy(shared).found is None


def test_the_norm_behind_a_layer_is_taken_in_and_its_activation_stays():
    model = spherify(timm.create_model("test_resnet"), exclude=["@stem"])
    folded = fold(model)
    assert isinstance(folded.bn1, FoldedAway)
    assert not [part for part in folded.modules() if isinstance(part, nn.BatchNorm2d)]
    assert type(folded) is type(model)
    assert type(folded.layer1[0].conv1) is FoldedConv2d
    assert isinstance(folded.layer1[0].conv1, SphereConv2d)
    assert "folded=True" in repr(folded)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


def test_a_norm_whose_input_somebody_else_reads_stays():
    model = settled(spherify(TwoReaders(), example_input=image(8)), image(8))
    folded = fold(model, example_input=image(8))
    assert type(folded.norm) is nn.BatchNorm2d
    assert difference(model, folded, image(8)) < 1e-5


class ReadsAWeight(nn.Module):
    """Multiplies by one layer's weight itself, as BEiT does, and calls another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
        self.summand = nn.Parameter(torch.linspace(-1.0, 1.0, 6))

    def forward(self, x):
        return self.two(nn.functional.linear(x, self.one.weight, self.summand))


@pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
def test_a_layer_that_is_called_beside_a_weight_that_is_read_runs_once(options):
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    model = spherify(ReadsAWeight(), **options, head="convert", example_input=x).eval()
    folded = fold(model, example_input=x)
    assert type(folded.two) is FoldedLinear
    assert difference(model, folded, x) < 1e-5


class OneNormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.one(x)) + self.norm(self.two(x))


def test_a_norm_behind_two_layers_stays():
    model = settled(spherify(OneNormTwice(), example_input=image(8)), image(8))
    folded = fold(model, example_input=image(8))
    assert type(folded.norm) is nn.BatchNorm2d
    assert difference(model, folded, image(8)) < 1e-5


def test_a_plain_network_folds_its_norms():
    torch.manual_seed(0)
    model = settled(timm.create_model("test_resnet"), image())
    folded = fold_any(model)
    assert not [part for part in folded.modules() if isinstance(part, nn.BatchNorm2d)]
    assert difference(model, folded, image()) < 1e-5


def test_the_model_itself_is_left_alone_unless_inplace():
    model = spherify(timm.create_model("test_resnet")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold(model)
    assert model.training
    assert not folded.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert fold(model, inplace=True) is model
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in folded.state_dict().items())


def test_inplace_makes_no_second_copy_of_the_weights():
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = spherify(nn.Sequential(*layers), example_input=torch.randn(2, 64))
    peak = peak_bytes(lambda: fold(copy.deepcopy(model), example_input=torch.randn(2, 64), inplace=True))
    assert peak < (12 + 5) * 64 * 64 * 4  # the twelve weights of the copy, and a few of one layer for a moment


def test_nothing_in_a_folded_model_learns():
    folded = fold(spherify(timm.create_model("test_resnet"), operator="learnable"))
    layers = [part for part in folded.modules() if isinstance(part, (FoldedConv2d, FoldedLinear))]
    assert layers
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def modes(model: nn.Module) -> list[bool]:
    return [part.training for part in model.modules()]


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("path", ["", "layer1", "layer1.0", "layer1.0.conv1"])
def test_training_is_refused_before_any_mode_changes(path, copied):
    folded = copied(fold(spherify(timm.create_model("test_resnet", drop_rate=0.1))))
    folded.layer2[0].act2.train()
    before = modes(folded)
    with pytest.raises(ModelError, match=r"FoldedConv2d is folded for inference; train the model it was folded from\."):
        folded.get_submodule(path).train()
    assert modes(folded) == before
    assert folded.eval() is folded
    assert not any(modes(folded))


def test_what_holds_no_folded_layer_any_more_is_trained():
    folded = fold(
        spherify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), example_input=image(8)), example_input=image(8)
    )
    folded[0] = nn.Conv2d(3, 4, 3)
    assert folded.train() is folded
    assert all(modes(folded))


def test_a_second_fold_a_plain_model_and_the_way_back_are_refused():
    folded = fold(spherify(timm.create_model("test_resnet")))
    with pytest.raises(ModelError, match="is folded already"):
        fold(folded)
    with pytest.raises(ModelError, match="ResNet has no converted layer to fold"):
        fold(timm.create_model("test_resnet"))
    with pytest.raises(RewriteError, match="is folded: its plain weights are gone"):
        unspherify(folded)


def test_a_folded_model_can_be_pickled_and_copied():
    folded = fold(spherify(timm.create_model("test_resnet"), operator="sigmoid"))
    for other in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
        assert difference(folded, other, image()) == 0


@pytest.mark.parametrize("options", OPERATORS, ids=lambda options: options["operator"])
def test_a_folded_model_is_saved_and_loaded(tmp_path, options):
    torch.manual_seed(0)
    model = settled(spherify("test_resnet", **options), image())
    folded = fold(model)
    loaded = load(save(folded, tmp_path / "folded"))
    assert '"folded"' in (tmp_path / "folded" / "config.json").read_text()
    assert not loaded.training
    assert difference(folded, loaded, image()) == 0


def test_a_gradient_by_the_input_of_a_folded_model_is_that_of_the_unfolded_one():
    torch.manual_seed(0)
    model = settled(spherify(timm.create_model("test_resnet"), operator="linear"), image(32))
    x = image(32).requires_grad_()
    one = torch.autograd.grad(model(x).square().sum(), x)[0]
    other = torch.autograd.grad(fold(model)(x).square().sum(), x)[0]
    assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", ["cosine", "sigmoid"])
def test_half_precision_folds_too(operator):
    torch.manual_seed(0)
    model = settled(spherify(timm.create_model("test_resnet"), operator=operator), image())
    folded = fold(model).bfloat16()
    with torch.no_grad():
        assert_close(folded(image().bfloat16()).float(), model(image()), rtol=0.1, atol=0.05)


def test_a_linear_layer_alone_keeps_the_bias_a_caller_gives():
    torch.manual_seed(0)
    layer = SphereLinear(6, 4, operator="linear", gain=True)
    model = nn.Sequential(layer)
    folded = fold(model, example_input=torch.randn(2, 6))[0]
    x, bias = torch.randn(3, 6), torch.randn(4)
    assert_close(folded(x, bias=bias), layer(x, bias=bias))


@pytest.mark.parametrize("operator", ["cosine", "linear"])
@pytest.mark.parametrize("sizes", [(6, 24), (24, 6)], ids=["widening", "narrowing"])
def test_linear_layers_of_either_shape_fold(sizes, operator):
    """The one is normalised at its input, the other at its output."""
    torch.manual_seed(0)
    model = spherify(nn.Sequential(nn.Linear(*sizes)), operator=operator, head="convert").eval()
    folded = fold(model)
    rows = torch.randn(3, 5, sizes[0])
    rows[1, 2] = 0.0
    with torch.no_grad():
        for given in (rows, rows.transpose(0, 1), rows[0], rows[0, 0]):
            assert_close(folded(given), model(given), rtol=1e-5, atol=1e-6)
        assert folded(torch.full((2, sizes[0]), torch.nan)).isnan().all()
