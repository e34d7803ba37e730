"""Peak memory of a conversion in place, and of folding in place, relative to the model's own weights.

``python -m benchmarks.conversion_memory [MODEL ...]``. Linux only: it reads and resets the peak of the resident set.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from spherify.convert import spherify
from spherify.export.fold import fold
from spherify.models.resolve import build, resolve

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def size_of(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def rise_of(act: Callable[[], object]) -> int:
    """How far the resident set rose above where it stood, at its highest, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    act()
    return resident("VmHWM") - before


def measure(name: str) -> str:
    model = build(resolve(name))
    size = size_of(model)
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    converting = rise_of(lambda: spherify(model, inplace=True))
    folding = rise_of(lambda: fold(model, inplace=True))
    return (
        f"{name:36s} weights {size / 1e6:7.0f} MB, the largest {largest / 1e6:6.1f} MB; peak "
        f"converting {1 + converting / size:.3f}, folding {1 + folding / size:.3f} x the model"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["resnet152", "vit_large_patch16_224", "convnext_large"])
    fold(spherify(build(resolve("test_resnet"))), inplace=True)  # what is loaded on first use is not the model's
    print(f"torch {torch.__version__}")
    for name in parser.parse_args().models:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main()
