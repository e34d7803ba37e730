"""A folder of a plain model, the twin that a converted one is compared with."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from spherify.errors import FileError, OptionError
from spherify.export.folder import CONFIG, WEIGHTS, digest_of, load, tensors_to_write
from spherify.models.resolve import Source, build

PLAIN = "plain.json"
FORMAT_VERSION = 1


def save_plain(model: nn.Module, source: Source, folder: Path) -> None:
    """Write ``model.safetensors`` and ``plain.json`` into a folder that exists.

    Raises:
        FileError: the disk refused.
    """
    tensors, ties = tensors_to_write(model)
    try:
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        weights = {"file": WEIGHTS, "sha256": digest_of(folder / WEIGHTS), "ties": ties}
        config = {"format_version": FORMAT_VERSION, "base": asdict(source), "weights": weights}
        (folder / PLAIN).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{folder} could not be written ({getattr(error, 'strerror', None) or error}).") from error


def load_trained(folder: str | Path) -> tuple[nn.Module, Source | None]:
    """A converted model or a plain twin from its folder, and for the twin how it is built.

    Raises:
        OptionError: the folder holds neither.
        FileError: it is damaged.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        return load(folder), None
    if (folder / PLAIN).is_file():
        return load_plain(folder)
    if (folder / "checkpoints").is_dir():
        raise OptionError(f"{folder} holds a run that is not finished; go on with spherify train ... --resume auto.")
    raise OptionError(f"{folder} holds no {CONFIG}, so it is not a saved model.")


def load_plain(folder: Path) -> tuple[nn.Module, Source]:
    try:
        config: dict[str, Any] = json.loads((folder / PLAIN).read_text(encoding="utf-8"))
        source, weights = Source(**config["base"]), config["weights"]
        if digest_of(folder / WEIGHTS) != weights["sha256"]:
            raise FileError(f"{folder / WEIGHTS} is damaged: its contents are not those saved.")
        tensors = {name: value.clone() for name, value in safetensors.torch.load_file(folder / WEIGHTS).items()}
        tensors |= {name: tensors[stored] for name, stored in weights["ties"].items()}
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise FileError(f"{folder} is damaged ({' '.join(str(error).split())[:120]}); train it again.") from error
    model = build(source)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise FileError(f"{folder / WEIGHTS} does not fit {source.label} as it is built now.") from error
    return model, source
