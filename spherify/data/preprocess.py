"""How a model sees the images of a data set: size, channels, mean and deviation, by the rules of timm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision import transforms

from spherify.data.dataset import DataSet
from spherify.errors import FileError, OptionError

PREPROCESSING = "preprocessing.json"
SMALLEST_SIDE = 32  # networks for photographs divide the side by 32
IMAGENET_SIDE = 224
LUMA = (0.299, 0.587, 0.114)  # what PIL takes of red, green and blue for grey
Transform = Callable[[Image], Tensor]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What every image goes through before a model sees it.

    Attributes:
        input_size: (channels, height, width) that the model is given.
        mean, std: one number a channel, for pixels in [0, 1].
        interpolation: bilinear, bicubic, ...
        crop_pct: share of the resized image that the central crop of the test keeps.
        crop_mode: center, squash, border, as timm has them.
        classes: names of the classes the model was trained on, in order; empty where that is not known.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    classes: tuple[str, ...] = ()

    def write(self, folder: str | Path) -> None:
        """Beside the weights, so that whoever loads them shows the model what it was trained on."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        Path(folder, PREPROCESSING).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Preprocessing | None:
        """What ``write`` wrote; None where nothing was written.

        Raises:
            FileError: the file is damaged.
        """
        path = Path(folder, PREPROCESSING)
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
            }
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path} is damaged ({error}); restore it, or train again.") from error


def preprocessing_for(
    model: nn.Module,
    data: DataSet,
    *,
    folder: str | Path | None = None,
    image_size: int | None = None,
    from_scratch: bool = False,
) -> Preprocessing:
    """How this model should see these images.

    A folder that says how its model was trained is followed. Else a model of a library gets the size, mean and
    deviation its weights were made for; one that is trained from scratch, or that no library knows, those of the data.

    Args:
        folder: where the model was loaded from, if it was.
        image_size: pixels of a side, instead of what would be chosen.
        from_scratch: the model has no trained weights yet.

    Raises:
        OptionError: the model takes another image size or number of channels.
        FileError: the folder's word on it is damaged.
    """
    saved = Preprocessing.read(folder) if folder is not None else None
    if saved is not None:
        side = side_of(model, image_size)
        return saved if side is None else replace(saved, input_size=(saved.input_size[0], *side))
    channels = input_channels(model) or data.size[0]
    if channels not in (1, 3):
        raise OptionError(f"{type(model).__name__} takes {channels} channels; images have 1 or 3.")
    config = library_config(model)
    if config is None or from_scratch:
        return of_data(model, data, channels, image_size)
    size = (channels, *(side_of(model, image_size) or tuple(config["input_size"][1:])))
    return Preprocessing(
        input_size=size,
        mean=in_channels(tuple(config["mean"]), channels),
        std=in_channels(tuple(config["std"]), channels),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        classes=(),
    )


def of_data(model: nn.Module, data: DataSet, channels: int, image_size: int | None) -> Preprocessing:
    """Native size but no less than 32 pixels; folders of photographs, which have no one size, get 224."""
    native = max(data.size[1], data.size[2], SMALLEST_SIDE)
    side = side_of(model, image_size) or (min(native, IMAGENET_SIDE),) * 2
    return Preprocessing(
        input_size=(channels, *side),
        mean=in_channels(data.mean, channels),
        std=in_channels(data.std, channels),
        crop_pct=0.875 if native > IMAGENET_SIDE else 1.0,
    )


def side_of(model: nn.Module, image_size: int | None) -> tuple[int, int] | None:
    """(height, width) as the user or the model's own position embedding has it; None where both leave it open."""
    embedding = getattr(model, "patch_embed", None)
    fixed = getattr(embedding, "img_size", None) if getattr(embedding, "strict_img_size", True) else None
    if image_size is not None and image_size < 1:
        raise OptionError(f"image size {image_size} is no number of pixels; give 1 or more.")
    if fixed is not None and image_size not in (None, *fixed):
        raise OptionError(f"{type(model).__name__} was built for {fixed[0]}x{fixed[1]} images, not for {image_size}.")
    if fixed is not None:
        return int(fixed[0]), int(fixed[1])
    return None if image_size is None else (image_size, image_size)


def library_config(model: nn.Module) -> dict[str, Any] | None:
    """timm's word on size, mean and deviation; ImageNet's for torchvision's models; None for others."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        return resolve_data_config(model=model)
    return resolve_data_config(args={"img_size": IMAGENET_SIDE}) if is_torchvision(model) else None


def is_torchvision(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchvision.models") for kind in type(model).__mro__)


def input_channels(model: nn.Module) -> int | None:
    """Of the images a model takes; None for a model that does not begin with a convolution."""
    kinds = (nn.Conv2d, nn.Linear)
    first = next((module for module in model.modules() if isinstance(module, kinds)), None)
    return first.in_channels if isinstance(first, nn.Conv2d) else None


def in_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Grey numbers repeated for colour, colour numbers mixed for grey."""
    if len(values) == channels:
        return values
    if channels == 1:
        return (sum(value * share for value, share in zip(values, LUMA, strict=True)),)
    return values * channels


def test_transform(how: Preprocessing) -> Transform:
    """From a PIL image to the (C, H, W) tensor a model is tested with, by timm."""
    own = create_transform(
        input_size=how.input_size,
        is_training=False,
        interpolation=how.interpolation,
        mean=how.mean,
        std=how.std,
        crop_pct=how.crop_pct,
        crop_mode=how.crop_mode,
    )
    return transforms.Compose([ToChannels(how.input_size[0]), own])


class ToChannels:
    """A PIL image in colour or in grey, as the model wants it."""

    def __init__(self, channels: int) -> None:
        self.mode = "L" if channels == 1 else "RGB"

    def __call__(self, image: Image) -> Image:
        return image if image.mode == self.mode else image.convert(self.mode)

    def __repr__(self) -> str:
        return f"ToChannels({self.mode})"


def check_classes(data: DataSet, outputs: int, model: str, trained: tuple[str, ...] = ()) -> None:
    """Raises OptionError unless the model answers for just the classes of the data."""
    if outputs != data.num_classes:
        raise OptionError(f"{model} answers for {outputs} classes and {data.name} has {data.num_classes}.")
    differing = [(one, two) for one, two in zip(trained, data.classes, strict=False) if one != two]
    if differing:
        raise OptionError(
            f"{model} was trained on other classes than {data.name} has: {differing[0][0]!r}, not {differing[0][1]!r}."
        )
