"""Rebuild torchvision and timm networks on angles.

The public names are loaded when they are first used, so that ``import spherify`` does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spherify.version import __version__

if TYPE_CHECKING:
    from spherify import functional, heads, layers, regularizers, train
    from spherify.calibrate.calibrate import calibrate
    from spherify.convert import plan, spherify, unspherify
    from spherify.errors import FileError, ModelError, OptionError, RewriteError, SpherifyError
    from spherify.export.fold import fold
    from spherify.export.folder import load, save
    from spherify.parameter_groups import parameter_groups
    from spherify.plan.options import Options
    from spherify.plan.plan import Plan
    from spherify.rewrite.swaps import register_twin

HOMES = {
    "spherify": "spherify.convert",
    "plan": "spherify.convert",
    "unspherify": "spherify.convert",
    "calibrate": "spherify.calibrate.calibrate",
    "register_twin": "spherify.rewrite.swaps",
    "parameter_groups": "spherify.parameter_groups",
    "fold": "spherify.export.fold",
    "save": "spherify.export.folder",
    "load": "spherify.export.folder",
    "Options": "spherify.plan.options",
    "Plan": "spherify.plan.plan",
    "SpherifyError": "spherify.errors",
    "OptionError": "spherify.errors",
    "ModelError": "spherify.errors",
    "RewriteError": "spherify.errors",
    "FileError": "spherify.errors",
}
ROOMS = ("functional", "layers", "heads", "regularizers", "train")


class Face(ModuleType):
    """This package. A function and its room may share a name (``plan``); as an attribute, the function wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in HOMES and isinstance(value, ModuleType)):  # what importing a room would set
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return importlib.import_module(f"spherify.{name}")
    if name not in HOMES:
        raise AttributeError(f"module 'spherify' has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES, *ROOMS})


sys.modules[__name__].__class__ = Face

__all__ = [
    "FileError",
    "ModelError",
    "OptionError",
    "Options",
    "Plan",
    "RewriteError",
    "SpherifyError",
    "__version__",
    "calibrate",
    "fold",
    "functional",
    "heads",
    "layers",
    "load",
    "parameter_groups",
    "plan",
    "register_twin",
    "regularizers",
    "save",
    "spherify",
    "train",
    "unspherify",
]
