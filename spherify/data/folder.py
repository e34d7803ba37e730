"""A folder with train/ and val/, and in each a folder for every class."""

from __future__ import annotations

import os
from pathlib import Path

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from spherify.data.dataset import DataSet, FileImages, size_of
from spherify.errors import FileError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEST_NAMES = ("val", "test", "validation")


def open_folder(folder: Path, name: str) -> DataSet:
    """Images by class, listed now and read when they are asked for; mean and deviation are ImageNet's.

    Raises:
        FileError: a part or a class is missing or empty.
    """
    test_folder = next((folder / part for part in TEST_NAMES if (folder / part).is_dir()), folder / "val")
    classes = class_names(folder / "train")
    train, test = images_in(folder / "train", classes), images_in(test_folder, classes)
    return DataSet(
        name=name,
        classes=tuple(classes),
        train=train,
        test=test,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        size=size_of(train),
    )


def class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise FileError(f"{folder} is missing; image data need train/CLASS/ and val/CLASS/ folders.")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise FileError(f"{folder} has {len(classes)} class folders, and at least 2 are needed.")
    return classes


def images_in(folder: Path, classes: list[str]) -> FileImages:
    """Every image below the class folders, in the order of their names."""
    found = class_names(folder)
    if found != classes:
        missing, added = sorted({*classes} - {*found}), sorted({*found} - {*classes})
        words = [f"lacks {missing[0]!r}" if missing else "", f"has {added[0]!r} that train lacks" if added else ""]
        raise FileError(f"{folder} has not the classes of train: it {' and '.join(word for word in words if word)}.")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = images_below(folder / name)
        if not own:
            raise FileError(f"class folder {folder / name} has no image ({', '.join(ENDINGS)}).")
        files += own
        labels += [label] * len(own)
    return FileImages(files, labels)


def images_below(folder: Path) -> list[Path]:
    return sorted(
        Path(place, file)
        for place, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(ENDINGS) and not file.startswith(".")
    )
