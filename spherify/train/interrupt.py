"""Ctrl-C and SIGTERM while training: noted, so that the step in hand is finished and written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopWish:
    """Whether somebody asked the run to stop, and with which signal."""

    name: str | None = None

    @property
    def is_asked(self) -> bool:
        return self.name is not None


@contextmanager
def noting_signals() -> Iterator[StopWish]:
    """Within the block the first Ctrl-C or SIGTERM is noted; a second Ctrl-C interrupts at once.

    Outside the main thread Python allows no handlers, and nothing is noted.
    """
    wish = StopWish()

    def note(number: int, frame: FrameType | None) -> None:
        if wish.is_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        wish.name = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before: dict[int, Any] = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
