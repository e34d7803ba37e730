"""Peak memory of one step: what it adds, at its highest, to what was held before it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from spherify.bench.timing import Step


def peak_bytes(step: Step, *, device: str = "cpu") -> int:
    """The highest sum of tensor memory during ``step`` above that at its start.

    On CUDA by the allocator's own count. On the CPU by the profiler's record of every allocation torch makes;
    what a library (oneDNN) takes behind torch's back for the length of one call is not in it.
    """
    step()  # what is made once and kept belongs to no step
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with without_native_messages(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    assert recording.profiler is not None
    assert recording.profiler.kineto_results is not None
    events = recording.profiler.kineto_results.events()
    return highest_rise(
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"
    )


@contextlib.contextmanager
def without_native_messages() -> Iterator[None]:
    """The profiler's library writes to the error stream below Python, and knows no switch for all of it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - its descriptor is what is wanted
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def highest_rise(changes: Iterable[int]) -> int:
    """Above the lowest point before: a step that begins by freeing what the one before it left starts from there."""
    held = lowest = rise = 0
    for change in changes:
        held += change
        lowest = min(lowest, held)
        rise = max(rise, held - lowest)
    return rise
