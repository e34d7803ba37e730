"""Which images a process sees, and that augmentation belongs to the image and not to the process."""

import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomCrop
from training_samples import data_set, recipe

from spherify.data.preprocess import Preprocessing
from spherify.errors import FileError, OptionError, SpherifyError
from spherify.train.augment import own_random_numbers, seed_of, training_transform
from spherify.train.loaders import loaders_for
from spherify.train.order import Order

HOW = Preprocessing(input_size=(1, 8, 8), mean=(0.2,), std=(0.2,))
STRONG = dict(no_aug=False, train_crop_mode="rrc", crop_scale=(0.3, 1.0), hflip=0.5, reprob=0.5, color_jitter=0.3)


def indices(order: Order, epoch: int = 0, first: int = 0) -> list[list[int]]:
    order.epoch, order.first = epoch, first
    return [[index for index, _ in batch] for batch in order]


def flat(batches) -> list[int]:
    return list(itertools.chain(*batches))


def test_every_image_is_seen_once_an_epoch():
    seen = flat(indices(Order(40, 8, 1, seed=1)))
    assert sorted(seen) == list(range(40))


def test_what_does_not_fill_a_step_is_left_out_other_images_each_epoch():
    order = Order(45, 8, 2, seed=1)
    assert len(order) == 4
    left_out = [set(range(45)) - set(flat(indices(order, epoch))) for epoch in (0, 1)]
    assert [len(images) for images in left_out] == [13, 13]
    assert left_out[0] != left_out[1]


def test_epochs_and_seeds_have_orders_of_their_own():
    assert indices(Order(40, 8, 1, seed=1), 0) != indices(Order(40, 8, 1, seed=1), 1)
    assert indices(Order(40, 8, 1, seed=1)) != indices(Order(40, 8, 1, seed=2))


def test_an_epoch_can_begin_in_the_middle():
    assert indices(Order(40, 8, 1, seed=1), 3, first=2) == indices(Order(40, 8, 1, seed=1), 3)[2:]


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_see_together_what_one_with_a_larger_batch_sees(world):
    alone = indices(Order(64, 4 * world, 1, seed=5))
    apart = [indices(Order(64, 4, 1, seed=5, rank=rank, world=world)) for rank in range(world)]
    assert [flat(batches) for batches in zip(*apart, strict=True)] == alone


def test_too_few_images_for_a_step_are_refused():
    with pytest.raises(OptionError, match="10 training images do not fill one step of 16; lower the batch size"):
        Order(10, 8, 1, seed=0, world=2)


# ---------------------------------------------------------------------------------------------- augmentation


def all_batches(workers: int = 0, epoch: int = 0, first: int = 0, **changes):
    loaders = loaders_for(HOW, data_set(), recipe(**{**STRONG, **changes}), workers=workers)
    return list(loaders.train.batches(epoch, first))


def same(one, two) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two, strict=True)
    )


def test_augmented_images_are_the_same_each_time_and_others_in_another_epoch():
    assert same(all_batches(), all_batches())
    assert not same(all_batches(), all_batches(epoch=1))
    assert not same(all_batches(), all_batches(seed=1))


def test_augmented_images_do_not_depend_on_the_number_of_workers_nor_on_where_one_begins():
    whole = all_batches(epoch=2)
    assert same(all_batches(workers=2, epoch=2), whole)
    assert same(all_batches(epoch=2, first=4), whole[4:])


def test_reading_images_draws_nothing_from_the_generators_of_the_run():
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    all_batches()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_own_random_numbers_come_from_the_seed():
    with own_random_numbers(7):
        one = torch.rand(3), np.random.rand(3)
    with own_random_numbers(7):
        two = torch.rand(3), np.random.rand(3)
    assert torch.equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    assert seed_of(1, 2, 3) != seed_of(1, 3, 2)


def test_without_augmentation_images_are_those_of_the_test():
    loaders = loaders_for(HOW, data_set(), recipe(batch_size=48))
    (inputs, labels), *_ = loaders.train.batches(0, 0)
    order = loaders.train.order.permutation(0)
    images = data_set().train.images[order]
    assert torch.allclose(inputs[:, 0], torch.from_numpy(images).float() / 255 / 0.2 - 1.0, atol=1e-6)
    assert labels.tolist() == data_set().train.labels[order].tolist()


def test_mirroring_follows_the_data_where_the_recipe_says_nothing():
    flips = [step for step in transforms_of(mirrors=True) if "HorizontalFlip" in step]
    assert len(flips) == 1
    assert not [step for step in transforms_of(mirrors=False) if "HorizontalFlip" in step]
    assert [step for step in transforms_of(mirrors=False, hflip=0.5) if "HorizontalFlip" in step]


def transforms_of(mirrors: bool, **changes) -> list[str]:
    chosen = recipe(no_aug=False, train_crop_mode="pad", **changes)
    return [repr(step) for step in training_transform(HOW, chosen, mirrors=mirrors).transforms]


def test_padding_mirrors_four_pixels_as_the_authors_do():
    chosen = recipe(no_aug=False, train_crop_mode="pad")
    steps = training_transform(HOW, chosen, mirrors=False).transforms
    crop = next(step for step in steps if isinstance(step, RandomCrop))
    assert (crop.padding, crop.padding_mode, tuple(crop.size)) == (4, "symmetric", (8, 8))


def test_the_test_images_are_shared_among_processes_each_once():
    shares = [
        [label for _, labels in loaders_for(HOW, data_set(), recipe(), rank=rank, world=2).test for label in labels]
        for rank in (0, 1)
    ]
    assert sum(map(len, shares)) == 18
    assert sorted(int(label) for share in shares for label in share) == sorted(data_set().test.labels.tolist())


class Broken:
    """Images of which one cannot be read."""

    labels = np.zeros(16, dtype=np.int64)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index):
        if index == 11:
            raise self.error
        return data_set().train[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileError("image 11.png cannot be read (torn); repair or remove it."), r"^image 11\.png cannot be read"),
        (OSError(5, "Input/output error"), r"^the images cannot be read .*Input/output error.*restore them"),
    ],
    ids=["unreadable", "disk"],
)
def test_an_image_that_cannot_be_read_is_told_in_one_line_from_a_worker_too(workers, error, message):
    data = data_set()
    object.__setattr__(data, "train", Broken(error))
    loaders = loaders_for(HOW, data, recipe(), workers=workers)
    with pytest.raises(SpherifyError, match=message) as raised:
        list(loaders.train.batches(0, 0))
    assert "\n" not in str(raised.value)
