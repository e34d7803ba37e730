"""A data set as the other rooms see it: two splits of (image, label), and what is known of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
from PIL.Image import Image

from spherify.errors import FileError, OptionError

MOST_MEASURED = 2000  # images that mean and standard deviation are measured on
MOST_PIXELS = 4_000_000  # of them together; large images are measured on fewer


class Split(Protocol):
    """A map-style set of images: ``split[i]`` is a PIL image and its class, ``labels`` every class at once."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image, int]: ...


class ArrayImages:
    """Images that lie in memory.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        labels: (N,) integers.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = np.asarray(labels).astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return PIL.Image.fromarray(self.images[index]), int(self.labels[index])


class ColumnImages:
    """Square images below each other in one PNG, decoded when the first one is asked for.

    Args:
        content: (bytes,) uint8, the PNG.
        labels: (N,) integers.
        place: what an error calls the column.
    """

    def __init__(self, content: np.ndarray, labels: np.ndarray, place: str) -> None:
        self.content, self.place = content, place
        self.labels = np.asarray(labels).astype(np.int64)

    @cached_property
    def images(self) -> np.ndarray:
        most = PIL.Image.MAX_IMAGE_PIXELS
        PIL.Image.MAX_IMAGE_PIXELS = None  # a column of many small images looks like a decompression bomb
        try:
            column = np.asarray(PIL.Image.open(io.BytesIO(self.content.tobytes())))
            side = column.shape[1]
            return column.reshape((len(self.labels), side, side, *column.shape[2:]))
        except Exception as error:  # decoders raise many kinds
            raise FileError(
                f"{self.place} is no column of {len(self.labels)} square images ({error}); make the file again."
            ) from error
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = most

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return PIL.Image.fromarray(self.images[index]), int(self.labels[index])


class EncodedImages:
    """JPEG or PNG files behind each other in memory, decoded one by one.

    Args:
        content: (bytes,) uint8.
        offsets: (N + 1,) where each file begins, and where the last one ends.
        labels: (N,) integers.
        place: what an error calls the file they are in.
        header, footer: what all of them begin and end with, and the content lacks.
    """

    def __init__(
        self,
        content: np.ndarray,
        offsets: np.ndarray,
        labels: np.ndarray,
        place: str,
        *,
        header: bytes = b"",
        footer: bytes = b"",
    ) -> None:
        self.content, self.offsets, self.place = content, np.asarray(offsets).astype(np.int64), place
        self.header, self.footer = header, footer
        self.labels = np.asarray(labels).astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        own = self.content[self.offsets[index] : self.offsets[index + 1]].tobytes()
        file = io.BytesIO(self.header + own + self.footer)
        return decoded(file, f"image {index} of {self.place}"), int(self.labels[index])


class FileImages:
    """Images that are files, opened when they are asked for."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int]) -> None:
        self.files = list(files)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return decoded(self.files[index], f"image {self.files[index]}"), int(self.labels[index])


def decoded(file: Path | io.BytesIO, name: str) -> Image:
    """The whole image, in colour or in grey, 8 bits a channel.

    Raises:
        FileError: it has vanished, or is no whole image; the message names it.
    """
    try:
        with PIL.Image.open(file) as image:
            if image.mode.startswith("I;16"):  # `convert` would clip instead of scaling
                return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel; save it with 8 or 16")
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except FileNotFoundError:
        raise FileError(f"{name} has vanished since the data were listed; restore it, or start again.") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, and bomb errors of their own
        text = " ".join(str(error).split())[:120]
        raise FileError(f"{name} cannot be read ({text}); repair or remove it.") from error


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Two splits and what is known of them.

    Attributes:
        name: as the user gave it.
        classes: names, in the order of the labels.
        train, test: splits; for data that have but one, the same split twice, which ``notes`` says.
        mean, std: of the training images in [0, 1], one number for each of their channels.
        size: (channels, height, width) of the images; of one of them, where they differ.
        mirrors: whether an image and its mirror image are of one class; not so for digits.
        notes: what the user should know, a line each.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int, int]
    mirrors: bool = True
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, split in (("training", self.train), ("test", self.test)):
            if len(split) == 0:
                raise FileError(f"{self.name} has no {name} images.")
            if split.labels.min() < 0 or split.labels.max() >= len(self.classes):
                wrong = int(split.labels.min() if split.labels.min() < 0 else split.labels.max())
                raise FileError(f"{self.name} has a {name} label {wrong}, and {len(self.classes)} classes from 0.")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def split(self, name: str) -> Split:
        """Raises OptionError unless ``name`` is train or test."""
        if name not in ("train", "test"):
            raise OptionError(f"split {name!r} is unknown; choose one of: train, test.")
        return self.train if name == "train" else self.test


def measured(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels, over images spread evenly through a split."""
    _, height, width = size_of(split)
    count = max(1, min(len(split), MOST_MEASURED, MOST_PIXELS // (height * width)))
    chosen = np.linspace(0, len(split) - 1, count).astype(int)
    total, squares, pixels = 0.0, 0.0, 0
    for index in chosen:
        values = np.asarray(split[int(index)][0], dtype=np.float64) / 255
        values = values.reshape(-1, values.shape[2] if values.ndim == 3 else 1)
        total, squares = total + values.sum(0), squares + (values**2).sum(0)
        pixels += len(values)
    mean = np.atleast_1d(total / pixels)
    std = np.sqrt(np.maximum(np.atleast_1d(squares / pixels) - mean**2, 1e-6))  # images of one colour have none
    return tuple(float(round(value, 4)) for value in mean), tuple(float(round(value, 4)) for value in std)


def size_of(split: Split) -> tuple[int, int, int]:
    """(channels, height, width) of the first image."""
    image = split[0][0]
    return (1 if image.mode == "L" else 3), image.height, image.width
