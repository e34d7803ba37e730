"""Checkpoints: a folder each, whole or not there at all, and the newest whole one found again."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from spherify.errors import FileError, OptionError
from spherify.export.atomic import flush, flush_entry, is_running
from spherify.export.folder import digest_of

CHECKPOINTS = "checkpoints"
WEIGHTS, AVERAGE, STATE, MANIFEST = "model.safetensors", "average.safetensors", "state.pt", "manifest.json"
KEPT = 2  # the newest, and the one before in case that is damaged
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A moment of a run.

    Attributes:
        step: optimiser steps done.
        weights: parameters and buffers by name.
        average: the same of the moving average, or None.
        state: everything else, of plain values and tensors.
    """

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    state: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint of the run in ``folder``; then remove all but the newest two.

    Raises:
        FileError: the disk refused; the checkpoints before are unchanged.
    """
    place = folder / CHECKPOINTS
    target = place / f"step-{checkpoint.step:09d}"
    new = place / f".{target.name}.new-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        write_files(new, checkpoint)
        flush(new)
        if target.exists():  # the same moment again, after a resume from before it
            shutil.rmtree(target)
        new.rename(target)
        flush_entry(place)
        remove_old(place)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch makes a full disk a RuntimeError
        text = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        raise FileError(f"{target} could not be written ({text}); the checkpoints before it are unchanged.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return target


def write_files(new: Path, checkpoint: Checkpoint) -> None:
    safetensors.torch.save_file(single(checkpoint.weights), new / WEIGHTS)
    if checkpoint.average is not None:
        safetensors.torch.save_file(single(checkpoint.average), new / AVERAGE)
    torch.save(checkpoint.state, new / STATE)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digest_of(path)} for path in sorted(new.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "step": checkpoint.step, "files": files}
    (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor for itself, on the CPU: a tied weight is written under all its names, and tied again by loading."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def remove_old(place: Path) -> None:
    for old in steps_in(place)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    clear_abandoned(place)


def clear_abandoned(place: Path) -> None:
    """Remove what killed processes left half written."""
    for entry in place.glob(".step-*.new-*"):
        owner = re.fullmatch(r"\.step-\d+\.new-(\d+)-[0-9a-f]{8}", entry.name)
        if owner and not is_running(int(owner[1])):
            shutil.rmtree(entry, ignore_errors=True)


def steps_in(place: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((entry for entry in place.glob("step-*") if entry.is_dir()), reverse=True)


def has_checkpoint(folder: Path) -> bool:
    return bool(steps_in(folder / CHECKPOINTS))


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of the run in ``folder``, and a line on each damaged one that was passed over."""
    notes: list[str] = []
    for path, reads in ((path, read_or_why(path)) for path in steps_in(folder / CHECKPOINTS)):
        if isinstance(reads, Checkpoint):
            return reads, notes
        notes.append(f"Checkpoint {path} is damaged ({reads}); going back to the one before.")
    return None, notes


def read_or_why(path: Path) -> Checkpoint | str:
    try:
        return read_checkpoint(path)
    except FileError as error:
        return str(error)


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint, checked against its manifest.

    Raises:
        OptionError: there is none.
        FileError: it is damaged.
    """
    if not path.is_dir():
        raise OptionError(f"{path} is no checkpoint.")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for problem in problems_of(path, manifest):
            raise FileError(problem)
        with suppress(FileNotFoundError):
            average = safetensors.torch.load_file(path / AVERAGE)
            return Checkpoint(step=manifest["step"], average=average, **weights_and_state(path))
        return Checkpoint(step=manifest["step"], average=None, **weights_and_state(path))
    except FileError:
        raise
    except Exception as error:  # JSON, zip, safetensors and the disk each raise their own
        text = " ".join(str(error).split())[:120]
        raise FileError(f"{type(error).__name__}: {text}") from error


def problems_of(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    if manifest["format_version"] > FORMAT_VERSION:
        yield f"it has format version {manifest['format_version']}, newer than this program"
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != facts["bytes"]:
            yield f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
        elif digest_of(file) != facts["sha256"]:
            yield f"the contents of {name} are not those written"


def weights_and_state(path: Path) -> dict[str, Any]:
    # In the file tensors lie at any byte, where CPU kernels add in another order; copies are aligned as any new tensor.
    weights = {name: value.clone() for name, value in safetensors.torch.load_file(path / WEIGHTS).items()}
    return {"weights": weights, "state": torch.load(path / STATE, map_location="cpu", weights_only=True)}
