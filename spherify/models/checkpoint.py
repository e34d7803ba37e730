"""Reading weights from files of other programs, into the network they belong to and no other."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from spherify.errors import FileError, OptionError

CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: the average before the last step
PREFIXES = ("module.", "_orig_mod.")
MOST_NAMED = 3


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name, out of ``.safetensors`` or of anything ``torch.load`` reads with ``weights_only``.

    Takes the state dict out of ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model``, and strips
    ``module.`` and ``_orig_mod.`` from the names.

    Raises:
        OptionError: there is no such file.
        FileError: it is damaged, is a pickle of more than weights, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"checkpoint {path} is not a file.")
    content = read_file(path)
    for key in CONTAINERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise FileError(
            f"checkpoint {path} holds no tensors by name; it has {', '.join(map(str, content)) or 'nothing'}."
        )
    return without_prefixes(tensors)


def read_file(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script stores its arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle, zip and torch each raise their own
        text = " ".join(str(error).split())[:120]
        raise FileError(
            f"checkpoint {path} cannot be read as weights ({type(error).__name__}: {text}); "
            "save it again as safetensors, or as a state dict with torch.save."
        ) from error
    if not isinstance(content, Mapping):
        raise FileError(f"checkpoint {path} holds a {type(content).__name__}, not tensors by name.")
    return content


def without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel, DDP and torch.compile put before all of them."""
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return without_prefixes({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def load_checkpoint_(model: nn.Module, path: str | Path) -> None:
    """Load a file into the network it fits, every name and every shape.

    Counters of BatchNorms (``num_batches_tracked``), which old files lack, may be missing.

    Raises:
        FileError: a key is missing, unexpected, or of another shape; the model is left as it was.
        OptionError: there is no such file.
    """
    tensors = read_checkpoint(path)
    state = model.state_dict()
    own = without_prefixes(state)  # the model may be wrapped too, or have all its layers in a `module` of its own
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in own]
    misshapen = [
        f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in tensors.items()
        if name in own and value.shape != own[name].shape
    ]
    found = [
        f"{len(names)} {what} ({', '.join(names[:MOST_NAMED])}{', ...' if len(names) > MOST_NAMED else ''})"
        for names, what in ((missing, "missing keys"), (unexpected, "unexpected keys"), (misshapen, "other shapes"))
        if names
    ]
    if found:
        raise FileError(f"checkpoint {path} does not fit {type(model).__name__}: {'; '.join(found)}.")
    model.load_state_dict(dict(zip(state, {**own, **tensors}.values(), strict=True)))
