"""The inputs a model is tried with: its own word first, then the shape of its first layer."""

import pytest
import timm
import torch
from torch import nn

from spherify.models.inputs import BATCH, candidate_inputs


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Of the single tensors among the candidates."""
    return [tuple(args[0].shape) for args in candidate_inputs(model) if isinstance(args[0], torch.Tensor)]


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@pytest.mark.parametrize(
    ("model", "first"),
    [
        (nn.Conv1d(4, 8, 3), (BATCH, 4, 256)),
        (nn.Conv2d(5, 8, 3), (BATCH, 5, 224, 224)),
        (nn.Conv3d(3, 8, 3), (BATCH, 3, 16, 224, 224)),
        (nn.Linear(13, 2), (BATCH, 13)),
        (nn.Sequential(nn.ReLU(), nn.Linear(7, 2), nn.Conv2d(3, 3, 1)), (BATCH, 7)),
    ],
    ids=["conv1d", "conv2d", "conv3d", "linear", "the first counts"],
)
def test_the_first_layer_says_how_many_channels_and_dimensions(model, first):
    assert shapes(model)[0] == first


def test_small_images_are_tried_too():
    sides = [shape[2] for shape in shapes(nn.Conv2d(1, 8, 3))]
    assert {28, 32, 224} <= set(sides)


def test_a_module_without_layers_has_no_candidates():
    assert list(candidate_inputs(nn.ReLU())) == []


@pytest.mark.parametrize(
    ("name", "arguments", "first"),
    [
        ("test_resnet", {}, (BATCH, 3, 160, 160)),
        ("test_resnet", {"in_chans": 1}, (BATCH, 1, 160, 160)),
        ("test_vit", {"img_size": 96}, (BATCH, 3, 96, 96)),
        ("inception_v3", {}, (BATCH, 3, 299, 299)),
    ],
)
def test_timms_configuration_and_the_model_itself_are_asked_first(name, arguments, first):
    model = on_meta(name, **arguments)
    assert shapes(model)[0] == first
    assert model.eval()(torch.empty(first, device="meta")).shape == (BATCH, 1000)


def test_torchvisions_image_size_is_tried_before_the_common_sizes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.image_size = 72
    assert shapes(model)[0] == (BATCH, 3, 72, 72)


def test_a_list_of_images_is_tried_for_detection():
    lists = [args[0] for args in candidate_inputs(nn.Conv2d(3, 8, 3)) if isinstance(args[0], list)]
    assert [tuple(image.shape) for image in lists[0]] == [(3, 192, 192)] * BATCH


def test_no_candidate_takes_memory():
    for args in candidate_inputs(nn.Conv2d(3, 8, 3)):
        tensors = args[0] if isinstance(args[0], list) else [args[0]]
        assert all(tensor.is_meta for tensor in tensors)


def test_a_configuration_that_names_no_layer_is_passed_over():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.pretrained_cfg = {"input_size": (3, 48, 48), "first_conv": "no.such.layer"}
    assert shapes(model)[0] == (BATCH, 3, 48, 48)


def test_a_model_of_two_images_is_given_two():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, first, second, rounds=2):
            return self.conv(first) - self.conv(second)

    inputs = next(candidate_inputs(Flow()))
    assert [tuple(image.shape) for image in inputs] == [(BATCH, 3, 224, 224)] * 2
    assert inputs[0] is not inputs[1]
