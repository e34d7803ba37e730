"""Every kind of data opens, and what is wrong with one is said in one line that names the file."""

import numpy as np
import PIL.Image
import pytest
import torchvision
from real_data import loaders, shared_data

from spherify.data.dataset import ArrayImages, DataSet, FileImages, measured
from spherify.data.sources import NAMED, open_data
from spherify.errors import FileError, OptionError

pytest.importorskip("sklearn")


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def arrays(**changed) -> dict[str, np.ndarray]:
    """A good ``.npz`` of 8 and 4 images, with changes; None leaves an array out."""
    good = dict(
        train_images=pixels(8, 6, 5, 3),
        train_labels=np.arange(8) % 2,
        test_images=pixels(4, 6, 5, 3),
        test_labels=np.arange(4) % 2,
    )
    return {key: value for key, value in (good | changed).items() if value is not None}


def npz(tmp_path, **changed) -> str:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays(**changed))
    return str(path)


def class_folders(tmp_path, classes=("cat", "dog"), count: int = 3, size: int = 8):
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            (tmp_path / part / name).mkdir(parents=True)
            for image in range(count):
                array = pixels(size, size, 3, seed=10 * number + image)
                PIL.Image.fromarray(array).save(tmp_path / part / name / f"{image}.png")
    return tmp_path


# ---------------------------------------------------------------------------------------------- digits


def test_digits_are_split_the_same_way_each_time_with_every_class_in_both_parts():
    one, two = open_data("digits"), open_data("digits")
    assert (len(one.train), len(one.test)) == (1442, 355)
    assert np.array_equal(one.train.labels, two.train.labels)
    assert np.bincount(one.test.labels).min() >= 34
    assert one.size == (1, 8, 8)
    assert one.mirrors is False


def test_no_digit_is_in_both_parts():
    data = open_data("digits")
    train = {image.tobytes() for image in data.train.images}
    assert not train & {image.tobytes() for image in data.test.images}


def test_mean_and_deviation_of_the_digits_are_those_measured():
    data = open_data("digits")
    mean, std = measured(data.train)
    assert mean == pytest.approx(data.mean, abs=1e-3)
    assert std == pytest.approx(data.std, abs=1e-3)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(Exception, match=r"install it with: pip install 'spherify\[train\]'"):
        open_data("digits")


# ---------------------------------------------------------------------------------------------- npz


def test_an_npz_gives_its_images_and_labels(tmp_path):
    data = open_data(npz(tmp_path))
    image, label = data.train[3]
    assert np.array_equal(np.asarray(image), arrays()["train_images"][3])
    assert (label, data.classes, data.size, data.mirrors) == (1, ("0", "1"), (3, 6, 5), True)


def test_an_npz_of_grey_images_has_one_channel(tmp_path):
    data = open_data(npz(tmp_path, train_images=pixels(8, 6, 6), test_images=pixels(4, 6, 6, 1)))
    assert data.size == (1, 6, 6)
    assert data.test[0][0].mode == "L"
    assert len(data.mean) == 1
    assert data.mirrors is False


def test_an_npz_may_name_its_classes(tmp_path):
    assert open_data(npz(tmp_path, classes=np.array(["cat", "dog", "fox"]))).classes == ("cat", "dog", "fox")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(train_images=None), r"has the arrays train_labels, .*; it needs train_images \(N,H,W,3\)"),
        (dict(test_images=None), "has no array 'test_images', only train_images, train_labels, test_labels"),
        (dict(train_images=np.zeros((8, 6, 6, 3))), r"train_images is float64 of shape \(8, 6, 6, 3\); give uint8"),
        (dict(train_images=pixels(8, 3, 6, 6)), r"train_images is uint8 of shape \(8, 3, 6, 6\); give uint8"),
        (dict(train_labels=np.zeros(8)), r"train_labels is float64 of shape \(8,\); give whole numbers"),
        (dict(train_labels=np.zeros((8, 2), int)), r"train_labels is int64 of shape \(8, 2\)"),
        (dict(train_labels=np.zeros(7, int)), "train_labels has 7 labels for 8 images"),
        (dict(test_labels=np.array([0, 1, 2, -1])), "has a test label -1"),
        (dict(classes=np.array(["cat"])), "has a training label 1, and 1 classes from 0"),
        (dict(test_images=pixels(0, 6, 5, 3), test_labels=np.zeros(0, int)), "has a split without images"),
    ],
)
def test_an_npz_of_another_form_is_refused_by_name(tmp_path, changed, message):
    with pytest.raises(FileError, match=message) as raised:
        open_data(npz(tmp_path, **changed))
    assert "set.npz" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(FileError, match=r"torn\.npz cannot be read as \.npz"):
        open_data(str(tmp_path / "torn.npz"))


def test_pickles_in_an_npz_are_not_opened(tmp_path):
    with pytest.raises(FileError, match=r"cannot be read as \.npz .*allow_pickle"):
        open_data(npz(tmp_path, train_labels=np.array([{}] * 8, dtype=object)))


PACKS = {  # images to train on, to test with
    "cifar10/cifar10-jpegpack.npz": (50_000, 10_000),
    "cifar10/cifar10-lossless-4k1k.npz": (4_000, 1_000),
    "mnist/mnist.npz": (60_000, 10_000),
}


@pytest.mark.parametrize("name", PACKS)
def test_packs_give_what_their_own_readers_give(name):
    reader = loaders().load_jpegpack if "jpeg" in name else loaders().load_pngpack
    path = shared_data() / name
    data = open_data(str(path))
    assert (len(data.train), len(data.test)) == PACKS[name]
    images, labels, classes = reader(path, "test")
    assert list(data.classes) == classes
    assert np.array_equal(data.test.labels, labels)
    for index in (0, 17, 999):
        assert np.array_equal(np.asarray(data.test[index][0]), images[index])


def test_a_pack_with_one_split_says_so():
    path = shared_data() / "imagenet" / "imagenet-sample1000-256px-q90.npz"
    data = open_data(str(path))
    images, labels, _ = loaders().load_imagenet_pack(path, 3)
    assert np.array_equal(np.asarray(data.test[2][0]), images[2])
    assert data.train.labels[:3].tolist() == labels.tolist()
    assert data.classes[1] == "goldfish"
    assert "has one split" in data.notes[0]


# ---------------------------------------------------------------------------------------------- folders


def test_a_folder_gives_its_images_by_class(tmp_path):
    data = open_data(str(class_folders(tmp_path)))
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test), data.size) == (6, 6, (3, 8, 8))
    image, label = data.train[5]
    assert label == 1
    assert np.array_equal(np.asarray(image), pixels(8, 8, 3, seed=12))


def test_images_of_every_mode_come_in_colour_or_in_grey(tmp_path):
    folder = class_folders(tmp_path)
    for mode in ("1", "L", "P", "RGBA", "CMYK", "LA"):
        name = "x.tif" if mode == "CMYK" else "x.png"
        PIL.Image.new(mode, (8, 8)).save(folder / "train" / "cat" / f"{mode}{name}")
    data = open_data(str(folder))
    assert {data.train[index][0].mode for index in range(len(data.train))} == {"L", "RGB"}


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    PIL.Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    image, _ = FileImages([tmp_path / "deep.png"], [0])[0]
    assert np.asarray(image).max() == 0x80


def test_an_image_that_is_none_is_named(tmp_path):
    folder = class_folders(tmp_path)
    broken = folder / "train" / "dog" / "1.png"
    broken.write_bytes(b"not an image")
    data = open_data(str(folder))
    with pytest.raises(FileError, match=rf"image {broken} cannot be read .*; repair or remove it"):
        data.train[4]


def test_an_image_cut_short_is_named(tmp_path):
    folder = class_folders(tmp_path, size=64)
    torn = folder / "val" / "cat" / "2.png"
    torn.write_bytes(torn.read_bytes()[:4000])
    with pytest.raises(FileError, match=rf"image {torn} cannot be read"):
        open_data(str(folder)).test[2]


def test_an_image_that_vanished_is_named(tmp_path):
    data = open_data(str(class_folders(tmp_path)))
    gone = tmp_path / "train" / "cat" / "0.png"
    gone.unlink()
    with pytest.raises(FileError, match=rf"image {gone} has vanished since the data were listed"):
        data.train[0]


def remove_all(folder) -> None:
    for file in folder.iterdir():
        file.unlink()


def rename(old, new) -> None:
    old.rename(new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: remove_all(at / "train" / "dog"), r"class folder .*train/dog has no image \(\.jpg"),
        (lambda at: rename(at / "val", at / "elsewhere"), "val is missing; image data need train/CLASS/"),
        (lambda at: rename(at / "train", at / "elsewhere"), "train is missing; image data need train/CLASS/"),
        (lambda at: rename(at / "val" / "dog", at / "val" / "fox"), "lacks 'dog' and has 'fox' that train lacks"),
        (lambda at: (at / "val" / "fox").mkdir(), "it has 'fox' that train lacks"),
    ],
)
def test_a_folder_of_another_form_is_refused_by_name(tmp_path, change, message):
    change(class_folders(tmp_path))
    with pytest.raises(FileError, match=message):
        open_data(str(tmp_path))


def test_one_class_is_no_data(tmp_path):
    with pytest.raises(FileError, match="train has 1 class folders, and at least 2 are needed"):
        open_data(str(class_folders(tmp_path, classes=("cat",))))


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_torchvision_is_asked_for_its_sets_and_downloads_what_is_missing(monkeypatch, tmp_path, name):
    asked = []

    class Stored:
        classes = ("a", "b")
        targets = (0, 1)

        def __init__(self, root, *, train, download):
            asked.append((root, train, download))
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            self.data = pixels(2, 8, 8, 3)

    kinds = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
    monkeypatch.setattr(torchvision.datasets, kinds[name], Stored)
    data = open_data(name, data_dir=tmp_path)
    assert asked == [(str(tmp_path), part, download) for part in (True, False) for download in (False, True)]
    assert data.train[1][1] == 1
    assert data.mirrors == (name != "mnist")


def test_a_set_that_cannot_be_downloaded_names_the_folder_and_the_flag(monkeypatch, tmp_path):
    def refuse(root, *, train, download):
        raise RuntimeError("not found") if not download else OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(FileError, match=rf"cifar10 is not whole in {tmp_path} .*no route to host.*--data-dir"):
        open_data("cifar10", data_dir=tmp_path)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"data 'digitz' is unknown.*; choose one of: digits, cifar10, cifar100"):
        open_data("digitz")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(OptionError, match=r"data 'notes.txt' is a file, but no \.npz"):
        open_data("notes.txt")


def test_every_named_set_has_a_line_about_it():
    assert all(entry.summary for entry in NAMED.values())


def test_a_data_set_without_images_is_refused():
    none = ArrayImages(pixels(0, 4, 4), np.zeros(0))
    some = ArrayImages(pixels(2, 4, 4), np.zeros(2))
    with pytest.raises(FileError, match="made has no test images"):
        DataSet(name="made", classes=("a",), train=some, test=none, mean=(0.5,), std=(1.0,), size=(1, 4, 4))


def test_an_unknown_split_is_refused():
    with pytest.raises(OptionError, match="split 'valid' is unknown; choose one of: train, test"):
        open_data("digits").split("valid")
