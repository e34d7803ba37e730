"""Peak memory of one step: what it adds, at its highest, to what was held before it."""

from __future__ import annotations

from collections.abc import Iterable

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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step()
    assert recording.profiler is not None
    assert recording.profiler.kineto_results is not None
    events = recording.profiler.kineto_results.events()
    return highest_sum(
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"
    )


def highest_sum(changes: Iterable[int]) -> int:
    held = highest = 0
    for change in changes:
        held += change
        highest = max(highest, held)
    return highest
