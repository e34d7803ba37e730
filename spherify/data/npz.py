"""An ``.npz`` of images: plain arrays, or packs of JPEG and PNG data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spherify.data.dataset import ArrayImages, ColumnImages, DataSet, EncodedImages, Split, measured, size_of
from spherify.errors import FileError

JPEG_END = b"\xff\xd9"
KEYS = "train_images (N,H,W,3) or (N,H,W) uint8, train_labels, test_images, test_labels"
Arrays = Mapping[str, np.ndarray]


def open_npz(path: Path, name: str) -> DataSet:
    """Arrays ``train_images``, ``train_labels``, ``test_images``, ``test_labels``, and ``classes`` if given.

    Three packed forms are read too: one PNG of all images below each other (``train_png``, ``test_png``), JPEG
    files with one header (``train_data``, ``train_offsets``, ``jpeg_header``), and whole image files
    (``data``, ``offsets``, ``labels``), which have one split.

    Raises:
        FileError: the file is no npz, or an array is missing, of another type, or of another shape.
    """
    arrays = read_arrays(path)
    read = next((read for key, read in FORMS.items() if key in arrays), None)
    if read is None:
        raise FileError(f"{path} has the arrays {', '.join(arrays) or 'none'}; it needs {KEYS}.")
    train, test = read(arrays, path)
    notes = () if test is not train else (f"{path} has one split: it is trained on and tested with the same images.",)
    for split in (train, test):
        if len(split) == 0:
            raise FileError(f"{path} has a split without images.")
    classes = class_names(arrays, np.concatenate([train.labels, test.labels]))
    mean, std = measured(train)
    size = size_of(train)
    return DataSet(
        name=name,
        classes=classes,
        train=train,
        test=test,
        mean=mean,
        std=std,
        size=size,
        mirrors=size[0] == 3,  # grey images are mostly writing, and writing has no mirror
        notes=notes,
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except Exception as error:  # zip, numpy and the disk each raise their own
        text = " ".join(str(error).split())[:120]
        raise FileError(f"{path} cannot be read as .npz ({type(error).__name__}: {text}); make it again.") from error


def class_names(arrays: Arrays, labels: np.ndarray) -> tuple[str, ...]:
    """The array ``classes`` or ``names``, by label; else numbers."""
    numbers = np.arange(int(labels.max()) + 1)
    return tuple(str(name) for name in arrays.get("classes", arrays.get("names", numbers)))


def plain_arrays(arrays: Arrays, path: Path) -> tuple[Split, Split]:
    return plain_split(arrays, path, "train"), plain_split(arrays, path, "test")


def plain_split(arrays: Arrays, path: Path, part: str) -> Split:
    images = wanted(arrays, path, f"{part}_images")
    is_shape_right = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not is_shape_right:
        raise FileError(
            f"{path}: {part}_images is {images.dtype} of shape {images.shape}; "
            "give uint8 of shape (N,H,W,3) or (N,H,W)."
        )
    images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    return ArrayImages(images, checked_labels(arrays, path, f"{part}_labels", len(images)))


def pngs(arrays: Arrays, path: Path) -> tuple[Split, Split]:
    return png_split(arrays, path, "train"), png_split(arrays, path, "test")


def png_split(arrays: Arrays, path: Path, part: str) -> Split:
    labels = checked_labels(arrays, path, f"{part}_labels")
    return ColumnImages(wanted(arrays, path, f"{part}_png"), labels, f"{path}: {part}_png")


def jpegs(arrays: Arrays, path: Path) -> tuple[Split, Split]:
    return jpeg_split(arrays, path, "train"), jpeg_split(arrays, path, "test")


def jpeg_split(arrays: Arrays, path: Path, part: str) -> Split:
    labels = checked_labels(arrays, path, f"{part}_labels")
    header = wanted(arrays, path, "jpeg_header").tobytes()
    return encoded(arrays, path, f"{part}_data", f"{part}_offsets", labels, header=header, footer=JPEG_END)


def whole_files(arrays: Arrays, path: Path) -> tuple[Split, Split]:
    split = encoded(arrays, path, "data", "offsets", checked_labels(arrays, path, "labels"))
    return split, split


def encoded(arrays: Arrays, path: Path, data: str, offsets: str, labels: np.ndarray, **ends: bytes) -> Split:
    content, marks = wanted(arrays, path, data), wanted(arrays, path, offsets).astype(np.int64)
    count = len(labels)
    if len(marks) != count + 1 or (np.diff(marks) < 0).any() or marks[0] < 0 or marks[-1] > len(content):
        raise FileError(f"{path}: {offsets} are not the {count + 1} rising places in {data} that {count} images need.")
    return EncodedImages(content, marks, labels, str(path), **ends)


def wanted(arrays: Arrays, path: Path, key: str) -> np.ndarray:
    if key not in arrays:
        raise FileError(f"{path} has no array {key!r}, only {', '.join(arrays)}; it needs {KEYS}.")
    return arrays[key]


def checked_labels(arrays: Arrays, path: Path, key: str, count: int | None = None) -> np.ndarray:
    """(N,) whole numbers, as many as there are images."""
    labels = wanted(arrays, path, key)
    if labels.ndim == 2 and labels.shape[1] == 1:  # MedMNIST stores a column
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise FileError(f"{path}: {key} is {labels.dtype} of shape {labels.shape}; give whole numbers of shape (N,).")
    if count is not None and len(labels) != count:
        raise FileError(f"{path}: {key} has {len(labels)} labels for {count} images.")
    return labels


FORMS: dict[str, Callable[[Any, Path], tuple[Split, Split]]] = {  # by the array that only this form has
    "train_images": plain_arrays,
    "train_png": pngs,
    "train_data": jpegs,
    "offsets": whole_files,
}
