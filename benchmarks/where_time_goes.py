"""Where a step's time goes on the CPU, and how near the kernels are to the memory's speed.

``python -m benchmarks.where_time_goes resnet18 --batch 8 --size 112`` runs plain and converted network in turns,
times every call of the CPU's kernels within the converted one's steps, and sets the bytes that each must move at least
beside the speed at which this core copies a large tensor. One thread, CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.speed import MODELS
from spherify.bench.timing import keep_freed_memory
from spherify.convert import plan
from spherify.export.fold import fold, fold_any
from spherify.functional import cpu_binding, cpu_kernels, cpu_training, folded
from spherify.functional.quick import QuickCalls

FEWEST_BYTES: dict[str, Callable[..., int]] = {
    # of folded layers: reads and writes of float32 numbers that cannot be avoided, once each
    "patch_inverse_norm": lambda found, x, *_: 4 * (x.numel() + found.numel()),
    "normalised": lambda found, x, *_: 4 * 2 * x.numel(),
    "gelu_": lambda found, x: 4 * 2 * x.numel(),
    "normalise_and_respond_": lambda found, product, *_, **__: 4 * product.numel() * 2,
}
CONVOLVED = "convolved, with the product"  # a folded depthwise layer in one kernel; the plain step has its product, too


@dataclass(frozen=True)
class Sizes:
    """Of a layer's tensors, in numbers: of one image, and of the weight."""

    x: int
    out: int
    weight: int

    @classmethod
    def of(cls, way: cpu_training.Way) -> Sizes:
        window, filters = way.layer.window, way.filters
        taken = window.channels // window.groups * window.window[0] * window.window[1]
        x = window.channels * window.height * window.width
        return cls(x, filters * way.layer.response.positions, filters * taken)


FEWEST_OF_CALLS: dict[str, Callable[..., int]] = {  # the same, of layers that are not folded
    "before_product": lambda way, places: 4 * (way.layer.window.images * Sizes.of(way).x + Sizes.of(way).weight),
    "after_product": lambda way, places: 4 * way.layer.window.images * Sizes.of(way).out * (3 if places.kept else 2),
    "before_gradients": lambda way, places, first, count: 4 * count * Sizes.of(way).out * (3 if places.saved else 2),
    "after_gradients": lambda way, places, first, count: 4 * 3 * count * Sizes.of(way).x,
    "finish_gradients": lambda way, places: 4 * 3 * Sizes.of(way).weight if places.by_weight else 0,
}


@dataclass
class Sum:
    """Of all calls of one kernel."""

    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0


@contextmanager
def timed_kernels() -> Iterator[dict[str, Sum]]:
    """Every kernel called within is timed; the clock's own two calls are in it, and folded layers go their long way."""
    sums: dict[str, Sum] = defaultdict(Sum)

    def timed(module: ModuleType, name: str) -> Callable[..., Any]:
        kernel = getattr(module, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            found = kernel(*args, **kwargs)
            if name == "convolved" and found is None:  # it does not serve this layer
                return found
            entry = sums[CONVOLVED if name == "convolved" else name]
            entry.seconds += time.process_time() - start
            entry.calls += 1
            if name == "convolved":
                entry.bytes += 4 * (args[0].numel() + found.numel())
            elif name in FEWEST_BYTES:
                entry.bytes += FEWEST_BYTES[name](found, *args, **kwargs)
            else:
                entry.bytes += FEWEST_OF_CALLS[name](*args, **kwargs)
            return found

        return run

    kernels = {name: timed(cpu_kernels, name) for name in FEWEST_BYTES}
    calls = {name: timed(cpu_training, name) for name in FEWEST_OF_CALLS}
    convolutions = mock.patch.object(folded, "convolved", timed(folded, "convolved"))
    long_way = mock.patch.multiple(QuickCalls, way_for=lambda *_: None, remember=lambda *_, **__: None)
    with (
        mock.patch.multiple(cpu_kernels, **kernels),
        mock.patch.multiple(cpu_training, **calls),
        convolutions,
        long_way,
    ):
        yield sums


def copies_per_second() -> float:
    """Bytes read and written by ``Tensor.copy_`` of 64 MB, the best of ten."""
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    best = min(seconds_of(lambda: target.copy_(source)) for _ in range(10))
    return 2 * 4 * source.numel() / best


def seconds_of(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def step_of(model: torch.nn.Module, x: Tensor, trains: bool) -> Callable[[], object]:
    model.train(trains)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    def infer() -> None:
        with torch.inference_mode():
            model(x)

    return train if trains else infer


def report(name: str, operator: str, batch: int, size: int, repeats: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = MODELS[name]()
    x = torch.randn(batch, 3, size, size)
    converted = plan(plain, operator=operator, example_input=x[:2]).apply()
    keep_freed_memory()
    speed = copies_per_second()
    print(f"{name}, {operator}, {batch} x {size} px; copying moves {speed / 1e9:.1f} GB/s; {cpu_binding.state()}")
    both = fold_any(plain, example_input=x), fold(converted, example_input=x)
    phases = (("training step", True, plain, converted), ("inference", False, plain, converted))
    for phase, trains, *forms in (*phases, ("inference, both folded", False, *both)):
        steps = [step_of(form, x, trains) for form in forms]
        for step in steps:
            step()
        ratios, plains, rounds = [], [], []
        for _ in range(repeats):
            before = seconds_of(steps[0])
            ratios.append(seconds_of(steps[1]) / before)
            plains.append(before)
            with timed_kernels() as sums:
                steps[1]()
            rounds.append(sums)
        base = median(plains)
        print(f"\n{phase}: plain {base * 1e3:.1f} ms, converted {median(ratios):.3f} of it")
        print("| kernel | calls | ms | of the plain step | fewest MB | at | at a copy's speed |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        everything = 0.0
        for kernel in rounds[0]:
            one = rounds[0][kernel]
            seconds = median(found[kernel].seconds for found in rounds)
            everything += seconds
            print(
                f"| {kernel} | {one.calls} | {seconds * 1e3:.2f} | {seconds / base:.1%} | {one.bytes / 1e6:.1f} "
                f"| {one.bytes / seconds / 1e9:.1f} GB/s | {one.bytes / speed / base:.1%} |"
            )
        rest = median(ratios) - 1 - everything / base
        print(f"all kernels {everything / base:.1%}; what is left of the difference (calls, Python, cache) {rest:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(MODELS), nargs="?", default="resnet18")
    parser.add_argument("--operator", default="cosine")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    report(arguments.model, arguments.operator, arguments.batch, arguments.size, arguments.repeats)


if __name__ == "__main__":
    main()
