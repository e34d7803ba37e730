"""Images on the device: the same as from a loader, and augmented there by laws one can check."""

import pytest
import torch
from training_samples import QUIET, data_set, difference, net, recipe, weights

from spherify.data.preprocess import Preprocessing
from spherify.errors import OptionError
from spherify.train.fit import fit
from spherify.train.loaders import loaders_for
from spherify.train.on_device import flipped, mirrored, padded_crops, random_resized_crops

HOW = Preprocessing(input_size=(1, 8, 8), mean=(0.2,), std=(0.2,))


def images(count: int = 64, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 2, side, side, generator=torch.Generator().manual_seed(0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_augmentation_the_batches_are_those_of_the_loader():
    here, there = (loaders_for(HOW, data_set(), recipe(data_on_device=on)) for on in (False, True))
    for (x, y), (v, w) in zip(here.train.batches(1, 2), there.train.batches(1, 2), strict=True):
        assert torch.allclose(x, v)
        assert torch.equal(y, w)
    assert sum(len(y) for _, y in there.test) == 18


def test_training_on_the_device_gives_the_same_weights_as_from_the_loader():
    trained = []
    for on_device in (False, True):
        chosen, model = recipe(data_on_device=on_device), net()
        fit(model, loaders_for(HOW, data_set(), chosen), chosen, conduct=QUIET)
        trained.append(weights(model))
    assert difference(*trained) < 1e-6


def test_augmentation_on_the_device_is_the_same_each_time_and_from_the_middle_on():
    chosen = recipe(data_on_device=True, no_aug=False, train_crop_mode="rrc", hflip=0.5, reprob=0.5)
    whole = list(loaders_for(HOW, data_set(), chosen).train.batches(1, 0))
    torch.rand(3)
    rest = list(loaders_for(HOW, data_set(), chosen).train.batches(1, 3))
    assert all(torch.equal(x, v) for (x, _), (v, _) in zip(whole[3:], rest, strict=True))
    assert not torch.equal(whole[0][0], next(iter(loaders_for(HOW, data_set(), chosen).train.batches(2, 0)))[0])


def test_flips_mirror_a_share_of_the_images_and_leave_the_others():
    x = images(200)
    out = flipped(x, 0.3, 3, generator())
    is_flipped = (out == x.flip(3)).flatten(1).all(1)
    assert ((out == x).flatten(1).all(1) ^ is_flipped).all()
    assert 0.2 < is_flipped.float().mean() < 0.4
    assert flipped(x, 0.0, 3, generator()) is x


def test_padded_crops_are_crops_of_the_mirrored_image():
    x = images(32)
    wide = torch.cat([x[..., :4].flip(3), x, x[..., -4:].flip(3)], dim=3)
    wide = torch.cat([wide[:, :, :4].flip(2), wide, wide[:, :, -4:].flip(2)], dim=2)  # the edge pixel stands twice
    places = set()
    for image, crop in zip(wide, padded_crops(x, generator()), strict=True):
        found = [
            (row, column)
            for row in range(9)
            for column in range(9)
            if torch.equal(image[:, row : row + 8, column : column + 8], crop)
        ]
        assert len(found) == 1
        places |= set(found)
    assert len(places) > 15


def test_mirrored_places_repeat_the_edge():
    assert mirrored(torch.tensor([-2, 0, 1]), 4).tolist() == [[1, 0, 0, 1], [0, 1, 2, 3], [1, 2, 3, 3]]


def test_a_crop_of_the_whole_image_is_the_image():
    x = images()
    assert torch.allclose(random_resized_crops(x, (1.0, 1.0), (1.0, 1.0), generator()), x, atol=1e-5)


def test_crops_show_a_part_of_the_image_enlarged():
    """Of an image that rises from left to right, a crop of a quarter shows half the rise."""
    rise = torch.linspace(0, 1, 16).expand(50, 1, 16, 16)
    out = random_resized_crops(rise, (0.25, 0.25), (1.0, 1.0), generator())
    spans = out[..., -1] - out[..., 0]
    assert torch.allclose(spans, torch.full_like(spans, 0.5), atol=0.02)
    assert out.mean((1, 2, 3)).std() > 0.05  # at different places


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(aa="rand-m9"), "aa cannot run on the device"),
        (dict(aa="rand-m9", color_jitter=0.4), "aa and color_jitter cannot run on the device"),
        (dict(train_crop_mode="rkrr"), "train_crop_mode rkrr cannot run on the device; choose rrc, pad or none"),
    ],
)
def test_augmentation_that_needs_single_images_is_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        loaders_for(HOW, data_set(), recipe(data_on_device=True, **changes))
