"""Peak memory of a conversion in place, relative to the model's own weights.

``python -m benchmarks.conversion_memory [MODEL ...]``. Linux only: it reads and resets the peak of the resident set.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch

from spherify.convert import spherify
from spherify.models.resolve import build, resolve

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name: str) -> str:
    model = build(resolve(name))
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    spherify(model, inplace=True)
    rise = resident("VmHWM") - before
    return f"{name:40s} weights {size / 1e6:7.0f} MB, rise {rise / 1e6:6.1f} MB, peak {1 + rise / size:.3f} x the model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["resnet152", "vit_large_patch16_224", "convnext_large"])
    spherify(build(resolve("test_resnet")))  # what is loaded on first use is not the model's
    print(f"torch {torch.__version__}")
    for name in parser.parse_args().models:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main()
