"""The data one can name: ``digits``, torchvision's sets, a folder, an ``.npz``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spherify.data.dataset import ArrayImages, DataSet
from spherify.data.folder import open_folder
from spherify.data.npz import open_npz
from spherify.errors import FileError, OptionError, SpherifyError

DEFAULT_DATA_DIR = Path("~/.cache/spherify")
TEST_SHARE = 5  # of the digits, every fifth of each class is for the test


def open_data(name: str, *, data_dir: str | Path | None = None) -> DataSet:
    """The data that a name on the command line means.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100``, ``mnist``, ``fashion-mnist``, a folder with ``train/`` and
            ``val/``, or an ``.npz`` file.
        data_dir: where torchvision's sets are, and are downloaded to; default ``~/.cache/spherify``.

    Raises:
        OptionError: there is no such data.
        FileError: the data are damaged, incomplete, or could not be downloaded.
        SpherifyError: scikit-learn, which has the digits, is not installed.
    """
    if name in NAMED:
        return NAMED[name].open(Path(data_dir or DEFAULT_DATA_DIR).expanduser())
    path = Path(name)
    if path.is_dir():
        return open_folder(path, name)
    if path.is_file() and path.suffix == ".npz":
        return open_npz(path, name)
    what = "is a file, but no .npz" if path.is_file() else "is unknown, and no folder or file"
    raise OptionError(
        f"data {name!r} {what}; choose one of: {', '.join(NAMED)}, a folder with train/ and val/, a file.npz."
    )


@dataclass(frozen=True)
class NamedData:
    """An entry of the table: a line about it, and how it is opened, given the folder of data."""

    summary: str
    open: Callable[[Path], DataSet]


def open_digits(data_dir: Path) -> DataSet:
    """1,797 real handwritten digits of 8x8 pixels; every fifth image of each class is for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SpherifyError("digits come with scikit-learn; install it with: pip install 'spherify[train]'.") from None
    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    is_test = np.zeros(len(images), dtype=bool)
    for label in range(10):
        is_test[np.flatnonzero(found.target == label)[TEST_SHARE - 1 :: TEST_SHARE]] = True
    return DataSet(
        name="digits",
        classes=tuple("0123456789"),
        train=ArrayImages(images[~is_test], found.target[~is_test]),
        test=ArrayImages(images[is_test], found.target[is_test]),
        mean=(0.305,),
        std=(0.376,),
        size=(1, 8, 8),
        mirrors=False,
    )


def from_torchvision(
    name: str, kind: str, size: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...], mirrors: bool
) -> Callable[[Path], DataSet]:
    """How a set of torchvision's is opened; mean and deviation are those of its training images."""

    def open_set(data_dir: Path) -> DataSet:
        train, test = (torchvision_split(name, kind, data_dir, train=part) for part in (True, False))
        return DataSet(
            name=name,
            classes=tuple(str(label) for label in train.classes),
            train=ArrayImages(np.asarray(train.data), np.asarray(train.targets)),
            test=ArrayImages(np.asarray(test.data), np.asarray(test.targets)),
            mean=mean,
            std=std,
            size=size,
            mirrors=mirrors,
        )

    return open_set


def torchvision_split(name: str, kind: str, data_dir: Path, *, train: bool) -> Any:
    import torchvision

    build = getattr(torchvision.datasets, kind)
    try:
        try:
            return build(str(data_dir), train=train, download=False)
        except RuntimeError:  # torchvision's word for not found, and for damaged
            return build(str(data_dir), train=train, download=True)
    except Exception as error:  # the network, the disk, checksums: each raises its own
        text = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise FileError(
            f"{name} is not whole in {data_dir} and could not be downloaded ({text}); "
            "check the network, or give the folder that holds it with --data-dir."
        ) from error


NAMED: dict[str, NamedData] = {
    "digits": NamedData("1,797 handwritten digits, 8x8 grey, 10 classes; comes with scikit-learn", open_digits),
    "cifar10": NamedData(
        "60,000 photographs, 32x32, 10 classes; torchvision, under --data-dir",
        from_torchvision("cifar10", "CIFAR10", (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True),
    ),
    "cifar100": NamedData(
        "60,000 photographs, 32x32, 100 classes; torchvision, under --data-dir",
        from_torchvision("cifar100", "CIFAR100", (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True),
    ),
    "mnist": NamedData(
        "70,000 handwritten digits, 28x28 grey, 10 classes; torchvision, under --data-dir",
        from_torchvision("mnist", "MNIST", (1, 28, 28), (0.1307,), (0.3081,), False),
    ),
    "fashion-mnist": NamedData(
        "70,000 pieces of clothing, 28x28 grey, 10 classes; torchvision, under --data-dir",
        from_torchvision("fashion-mnist", "FashionMNIST", (1, 28, 28), (0.2860,), (0.3530,), True),
    ),
}
KINDS: dict[str, str] = {  # beside the names
    "FOLDER": "a folder with train/CLASS/ and val/CLASS/ images",
    "FILE.npz": "train_images, train_labels, test_images, test_labels; uint8 (N,H,W,3) or (N,H,W)",
}
