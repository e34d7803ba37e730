"""CPU time of a conversion on one core: plan, convert and verify, as the sweep over the zoo does it.

``python -m benchmarks.conversion_time [--sample N] [--seed S] [MODEL ...]``: the models named, else a random sample of
those that the sweep's table says are converted.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings

import torch
from rich.progress import track

from benchmarks.zoo.__main__ import TABLE
from benchmarks.zoo.results import read_table
from benchmarks.zoo.worker import build_small
from spherify.convert import plan

SHOWN = 5


def sample(count: int, seed: int) -> list[str]:
    names = sorted(name for name, row in read_table(TABLE).items() if row["outcome"] == "converted")
    return sorted(random.Random(seed).sample(names, min(count, len(names))))


def measure(name: str) -> float:
    """Seconds of CPU time; building the plain model is not counted."""
    model = build_small(name)
    start = time.process_time()
    plan(model).apply(inplace=True)
    return time.process_time() - start


def summary(seconds: dict[str, float]) -> str:
    ordered = sorted(seconds.values())
    middle, late = ordered[len(ordered) // 2], ordered[int(0.9 * (len(ordered) - 1))]
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:SHOWN]
    return "\n".join(
        [
            f"{len(ordered)} models, CPU seconds to plan, convert and verify: "
            f"median {middle:.2f}, 90th percentile {late:.2f}, largest {ordered[-1]:.2f}",
            *(f"{seconds[name]:7.2f}  {name}" for name in slowest),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--sample", type=int, default=60, help="how many random models, where none is named")
    parser.add_argument("--seed", type=int, default=0, help="of the random sample")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    measure("timm:test_resnet")  # what is loaded on first use is not the model's
    names = arguments.models or sample(arguments.sample, arguments.seed)
    print(f"torch {torch.__version__}")
    print(summary({name: measure(name) for name in track(names, transient=True)}))


if __name__ == "__main__":
    main()
