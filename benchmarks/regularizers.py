"""What the regularisers cost: forward and backward of each, against a training step of a converted ResNet-18.

python -m benchmarks.regularizers --size 224 --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from spherify import spherify
from spherify.regularizers import hyperspherical_energy, orthogonality


def seconds(run: Callable[[], Tensor], device: str) -> float:
    started = time.perf_counter()
    run().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    model = spherify("resnet18", skip_shortcuts=True, seed=0).to(given.device).train()
    images = torch.rand(given.batch, 3, given.size, given.size, device=given.device)
    labels = torch.arange(given.batch, device=given.device) % 1000
    runs: dict[str, Callable[[], Tensor]] = {
        "step": lambda: torch.nn.functional.cross_entropy(model(images), labels),
        "orthogonality": lambda: orthogonality(model),
        "orthogonality, normalised": lambda: orthogonality(model, normalized=True),
        "energy s=0": lambda: hyperspherical_energy(model, s=0),
        "energy s=2, half space": lambda: hyperspherical_energy(model, s=2, half_space=True),
        "energy s=1, angular": lambda: hyperspherical_energy(model, s=1, angular=True),
        "energy s=0, 128 rows": lambda: hyperspherical_energy(model, s=0, rows=128),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.repeats + 1):  # side by side, and the first round warms up
        for name, run in runs.items():
            times[name].append(seconds(run, given.device))
    median = {name: statistics.median(found[1:]) for name, found in times.items()}
    for name, found in median.items():
        print(f"{name:26} {1000 * found:9.1f} ms  {100 * found / median['step']:6.2f} % of a step")


if __name__ == "__main__":
    main()
