"""What a model is shown: its own size, mean and channels where it has some, else those of the data."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from spherify.data.batches import batches, loader_of
from spherify.data.dataset import ArrayImages, DataSet
from spherify.data.preprocess import Preprocessing, check_classes, preprocessing_for
from spherify.data.sources import open_data
from spherify.errors import FileError, OptionError

pytest.importorskip("sklearn")


def colour_data(count: int = 12, side: int = 40, classes: int = 3) -> DataSet:
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    split = ArrayImages(images, np.arange(count) % classes)
    return DataSet(
        name="made",
        classes=tuple(map(str, range(classes))),
        train=split,
        test=split,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        size=(3, side, side),
    )


def hollow(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def test_a_timm_model_gets_the_images_its_weights_were_made_for():
    how = preprocessing_for(hollow("vit_tiny_patch16_224"), open_data("digits"))
    assert how.input_size == (3, 224, 224)
    assert how.mean == (0.5, 0.5, 0.5)
    assert how.interpolation == "bicubic"


def test_a_torchvision_model_gets_those_of_imagenet():
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    how = preprocessing_for(model, open_data("digits"))
    assert how.input_size == (3, 224, 224)
    assert how.mean == pytest.approx((0.485, 0.456, 0.406))


def test_from_scratch_the_size_and_mean_are_those_of_the_data_but_no_less_than_32():
    how = preprocessing_for(hollow("resnet18"), open_data("digits"), from_scratch=True)
    assert how.input_size == (3, 32, 32)
    assert how.mean == (0.305, 0.305, 0.305)
    assert preprocessing_for(hollow("resnet18"), colour_data(), from_scratch=True).input_size == (3, 40, 40)


def test_a_model_of_ones_own_gets_the_channels_of_its_first_convolution():
    own = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    how = preprocessing_for(own, colour_data())
    assert how.input_size == (1, 40, 40)
    assert how.mean == pytest.approx((0.299 * 0.5 + 0.587 * 0.4 + 0.114 * 0.3,))


def test_a_size_can_be_asked_for():
    data = open_data("digits")
    assert preprocessing_for(hollow("resnet18"), data, image_size=64).input_size == (3, 64, 64)
    assert preprocessing_for(hollow("resnet18"), data, image_size=48, from_scratch=True).input_size == (3, 48, 48)
    with pytest.raises(OptionError, match="image size 0 is no number of pixels"):
        preprocessing_for(hollow("resnet18"), data, image_size=0)


def test_a_model_with_position_embeddings_keeps_the_size_it_was_built_for():
    model, data = hollow("vit_tiny_patch16_224", img_size=64), open_data("digits")
    assert preprocessing_for(model, data, from_scratch=True).input_size == (3, 64, 64)
    with pytest.raises(OptionError, match="was built for 64x64 images, not for 32"):
        preprocessing_for(model, data, image_size=32)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(OptionError, match="takes 4 channels; images have 1 or 3"):
        preprocessing_for(nn.Sequential(nn.Conv2d(4, 4, 3)), colour_data())


def test_what_was_written_beside_a_model_is_followed(tmp_path):
    how = Preprocessing(input_size=(1, 20, 20), mean=(0.1,), std=(0.2,), classes=("a", "b"))
    how.write(tmp_path)
    assert Preprocessing.read(tmp_path) == how
    assert preprocessing_for(hollow("resnet18"), colour_data(), folder=tmp_path) == how
    wider = preprocessing_for(hollow("resnet18"), colour_data(), folder=tmp_path, image_size=28)
    assert wider == dataclasses.replace(how, input_size=(1, 28, 28))


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"input_size": [3, 4, 4], "wings": 2})])
def test_a_damaged_word_on_preprocessing_is_named(tmp_path, text):
    (tmp_path / "preprocessing.json").write_text(text)
    with pytest.raises(FileError, match=r"preprocessing\.json is damaged"):
        Preprocessing.read(tmp_path)


# ---------------------------------------------------------------------------------------------- batches


def test_batches_are_normalised_images_and_their_labels():
    data = open_data("digits")
    own = nn.Sequential(nn.Conv2d(1, 4, 3))
    found = batches(data, own, 64, split="train")
    inputs = torch.cat([x for x, _ in found])
    assert inputs.shape == (1442, 1, 32, 32)
    assert abs(inputs.mean()) < 0.02
    assert 0.8 < inputs.std() < 1.02  # enlarging smooths


def test_batches_are_the_same_at_each_pass_and_of_the_number_asked_for():
    found = batches(open_data("digits"), nn.Conv2d(1, 4, 3), 8, 3, seed=5)
    one, two = list(found), list(found)
    assert len(found) == len(one) == 3
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two, strict=True))
    other = next(iter(batches(open_data("digits"), nn.Conv2d(1, 4, 3), 8, 3, seed=6)))
    assert not torch.equal(one[0][0], other[0])


def test_a_label_stays_with_its_image():
    data = colour_data()
    how = preprocessing_for(nn.Conv2d(3, 4, 3), data)
    (inputs, labels), *_ = batches(data, how, 12, shuffle=True)
    (plain, order), *_ = batches(data, how, 12, shuffle=False)
    assert order.tolist() == data.train.labels.tolist()
    for image, label in zip(inputs, labels, strict=True):
        match = next(index for index in range(12) if torch.equal(plain[index], image))
        assert data.train.labels[match] == label


def test_grey_images_are_shown_in_colour_where_the_model_takes_colour():
    x, _ = next(iter(batches(open_data("digits"), nn.Conv2d(3, 4, 3), 4)))
    assert x.shape == (4, 3, 32, 32)
    assert torch.equal(x[:, 0], x[:, 2])


def test_numbers_of_batches_out_of_range_are_refused():
    with pytest.raises(OptionError, match="batch_size=0, count=None: give 1 or more"):
        batches(open_data("digits"), nn.Conv2d(1, 4, 3), 0)


def test_a_loader_can_be_sent_to_workers():
    """Python 3.14 starts them by pickling."""
    data = open_data("digits")
    loader = loader_of(data.test, preprocessing_for(nn.Conv2d(1, 4, 3), data), 4)
    again = pickle.loads(pickle.dumps(loader.dataset))
    assert torch.equal(again[3][0], loader.dataset[3][0])


# ---------------------------------------------------------------------------------------------- classes


def test_a_model_that_answers_for_other_classes_is_refused():
    data = colour_data()
    check_classes(data, 3, "net", ("0", "1", "2"))
    check_classes(data, 3, "net")
    with pytest.raises(OptionError, match="net answers for 1000 classes and made has 3"):
        check_classes(data, 1000, "net")
    with pytest.raises(OptionError, match="net was trained on other classes than made has: 'cat', not '1'"):
        check_classes(data, 3, "net", ("0", "cat", "2"))
