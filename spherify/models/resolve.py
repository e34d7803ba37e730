"""From a name to a model: ``resnet18``, ``timm:resnet18``, ``torchvision:resnet18``."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spherify.errors import ModelError, OptionError, SpherifyError

LIBRARIES = ("timm", "torchvision")
CUSTOM = "custom"  # a model that no library builds by name
SOURCE = "spherify_source"  # attribute of a converted model: how its plain base was built


@dataclass(frozen=True)
class Source:
    """How to build a plain model again.

    Attributes:
        library: timm, torchvision, or custom.
        name: the library's name for it, or the class of a custom model.
        version: of the library, as it was when the model was built.
        arguments: what the builder was called with beside the name.
    """

    library: str
    name: str
    version: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.library}:{self.name}" if self.library != CUSTOM else self.name


def names_in(library: str) -> list[str]:
    """Every model name of a library, sorted."""
    if library == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models()


def has_model(library: str, name: str) -> bool:
    if library == "timm":
        import timm

        return timm.is_model(name)
    import torchvision

    return name in torchvision.models.list_models()


def resolve(name: str, arguments: dict[str, Any] | None = None) -> Source:
    """Which library builds ``name``: timm if it knows a bare name, else torchvision.

    Raises:
        OptionError: nobody knows it; the message has close matches.
    """
    prefix, _, bare = name.rpartition(":")
    if prefix and prefix not in LIBRARIES:
        raise OptionError(f"library {prefix!r} is unknown in {name!r}; choose one of: {', '.join(LIBRARIES)}.")
    for library in (prefix,) if prefix else LIBRARIES:
        if has_model(library, bare):
            return Source(library, bare, version_of(library), dict(arguments or {}))
    if name and Path(name).exists():
        raise OptionError(
            f"{name} is a file or folder, not a model's name; give a name that `spherify list models` shows."
        )
    raise OptionError(f"model {name!r} is unknown{close_matches(prefix, bare)}; `spherify list models` shows all.")


def close_matches(prefix: str, bare: str) -> str:
    found: list[str] = []
    for library in (prefix,) if prefix else LIBRARIES:
        label = "" if library == "timm" and not prefix else f"{library}:"
        found += [f"{label}{match}" for match in difflib.get_close_matches(bare, names_in(library), n=3)]
    return f"; close are {', '.join(found)}" if found else ""


def version_of(library: str) -> str:
    if library == "timm":
        import timm

        return timm.__version__
    import torchvision

    return torchvision.__version__


def build(source: Source, *, pretrained: bool = False, device: str = "cpu") -> nn.Module:
    """Build the plain model.

    Args:
        pretrained: with the library's own weights, which it may have to download.
        device: ``meta`` builds without memory for the weights.

    Raises:
        SpherifyError: the download failed.
        OptionError: the library does not take these arguments.
    """
    try:
        with torch.device(device), warnings.catch_warnings(), only_errors_of("huggingface_hub"):
            warnings.simplefilter("ignore")  # the libraries' own deprecations are not the user's
            return builders[source.library](source, pretrained)
    except SpherifyError:
        raise
    except Exception as error:  # downloads fail in the classes of half a dozen packages
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        is_download = isinstance(error, OSError) or not isinstance(error, (TypeError, ValueError))
        if pretrained and is_download:
            raise SpherifyError(
                f"{source.label}: its pretrained weights could not be had ({text}); "
                "check the network, or give a local file with --checkpoint."
            ) from error
        raise OptionError(f"{source.label} could not be built with {source.arguments} ({text}).") from error


@contextmanager
def only_errors_of(package: str) -> Iterator[None]:
    """Without the log lines of a dozen retries: how a download ended is told once, by us."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_with_timm(source: Source, pretrained: bool) -> nn.Module:
    import timm

    return timm.create_model(source.name, pretrained=pretrained, **source.arguments)


def build_with_torchvision(source: Source, pretrained: bool) -> nn.Module:
    import torchvision

    arguments: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None, **source.arguments}
    known = inspect.signature(torchvision.models.get_model_builder(source.name)).parameters
    if "weights_backbone" in known:  # else it would be downloaded for a model without weights too
        arguments.setdefault("weights_backbone", None)
    if source.name in ("googlenet", "inception_v3") and not pretrained:
        arguments.setdefault("init_weights", True)  # torchvision's default, said aloud so that it does not warn
    return torchvision.models.get_model(source.name, **arguments)


def refuse_to_build(source: Source, pretrained: bool) -> nn.Module:
    raise ModelError(f"{source.name} is no model of timm or torchvision; build it yourself and pass it as base=....")


builders = {"timm": build_with_timm, "torchvision": build_with_torchvision, CUSTOM: refuse_to_build}


def source_of(model: nn.Module) -> Source:
    """How a model was built, as far as the model itself says: timm leaves a trace, others are custom."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    if not name or not has_model("timm", name):
        kind = type(model)
        return Source(CUSTOM, f"{kind.__module__}.{kind.__qualname__}", "")
    assert isinstance(config, dict)
    tag = config.get("tag")
    arguments: dict[str, Any] = {}
    if getattr(model, "num_classes", config.get("num_classes")) != config.get("num_classes"):
        arguments["num_classes"] = model.num_classes
    return Source("timm", f"{name}.{tag}" if tag else name, version_of("timm"), arguments)


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``resolve`` takes; torchvision's own carry their prefix.

    Args:
        pattern: a glob on the name, with or without the library's prefix.
    """
    labels = [f"{library}:{name}" for library in LIBRARIES for name in names_in(library)]
    return [
        label for label in labels if any(fnmatch.fnmatchcase(text, pattern) for text in (label, label.split(":")[1]))
    ]
