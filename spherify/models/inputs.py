"""Inputs to try a model with, guessed from what the model says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

BATCH = 2  # one image is too few for a BatchNorm in train mode
IMAGE_SIZES = (224, 32, 28, 64, 96, 128, 256, 299, 384)
CLIP_SIZES = ((16, 224, 224), (16, 112, 112))
SIGNAL_LENGTHS = (256, 1024, 64)


def candidate_inputs(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Positional arguments to try, the likeliest first; tensors on meta.

    timm's configuration is asked first, then torchvision's ``image_size``; else the first layer with weights says
    how many channels and dimensions an input has, and common sizes follow. A model that asks for several images, as
    optical flow does, is given as many alike.
    """
    count = required_arguments(model)
    for image in images(model):
        yield (
            (image, *(torch.empty_like(image) for _ in range(count - 1)))
            if isinstance(image, torch.Tensor)
            else (image,)
        )


def required_arguments(model: nn.Module) -> int:
    """How many positional arguments ``forward`` cannot do without; at least one."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters))


def images(model: nn.Module) -> Iterator[Any]:
    """One input at a time; a list of tensors for detection models."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    first = first_layer(model)
    if isinstance(config, dict) and config.get("input_size"):
        channels, *size = config["input_size"]
        embed_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        channels = getattr(model, "in_chans", None) or channels_of(model, config) or channels
        yield blank(channels, *(embed_size or size))
    if isinstance(first, nn.Conv3d):
        for clip in CLIP_SIZES:
            yield blank(first.in_channels, *clip)
    elif isinstance(first, nn.Conv2d):
        sizes = (getattr(model, "image_size", None), *IMAGE_SIZES)
        for side in sizes:
            if isinstance(side, int):
                yield blank(first.in_channels, side, side)
        yield [torch.empty(first.in_channels, 192, 192, device="meta") for _ in range(BATCH)]
    elif isinstance(first, nn.Conv1d):
        for length in SIGNAL_LENGTHS:
            yield blank(first.in_channels, length)
    elif isinstance(first, nn.Linear):
        yield blank(first.in_features)


def blank(*shape: int) -> torch.Tensor:
    return torch.empty(BATCH, *shape, device="meta")


def channels_of(model: nn.Module, config: dict[str, Any]) -> int | None:
    """Channels in, by timm's word for the first convolution."""
    name = config.get("first_conv")
    try:
        stem = model.get_submodule(name) if isinstance(name, str) else None
    except AttributeError:
        return None
    return getattr(stem, "in_channels", None)


def first_layer(model: nn.Module) -> nn.Module | None:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return next((module for module in model.modules() if isinstance(module, kinds)), None)
