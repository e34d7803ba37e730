"""Timing of several things side by side: A B C A B C, so that a busy machine slows all of them alike."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, over all repeats in the order in which they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the third quartile."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def ratio_to(self, other: Timing) -> float:
        """Median over the repeats of this step's time to the other's in the same round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))

    def ratio_of_least(self, other: Timing) -> float:
        return self.least / other.least


def interleaved(
    steps: Mapping[str, Step],
    *,
    repeats: int,
    warmup: int = 2,
    device: str = "cpu",
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every step once a round, for ``repeats`` rounds; the order turns by one from round to round.

    Args:
        warmup: rounds before that are not counted; the compiler and the memory pools settle in them.
        device: on ``cuda`` a step is timed by events on its stream, else by the clock.
        calls: how often a step runs within one measurement.
        clock: ``time.process_time`` counts this process's own work, whatever else the machine does.
    """
    if device == "cpu":
        keep_freed_memory()
    measure = seconds_on_cuda if device == "cuda" else functools.partial(seconds_by, clock)
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(-warmup, repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = measure(steps[name], calls)
            if number >= 0:
                found[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Let glibc keep what one step frees for the next, for the rest of the process.

    Otherwise it hands large blocks back to the system now and then, and the step that needs them again pays for every
    page, be it the plain network's or the other's.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, -1)
        library.mallopt(M_MMAP_MAX, 0)


def seconds_by(clock: Callable[[], float], step: Step, calls: int) -> float:
    start = clock()
    for _ in range(calls):
        step()
    return (clock() - start) / calls


def seconds_on_cuda(step: Step, calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
