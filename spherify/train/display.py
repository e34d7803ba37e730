"""What one sees while it trains: a bar on a terminal, plain lines elsewhere, nothing where asked."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol

from spherify.train.history import Row

SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
    """Is told of steps, of rows of the history, and of what the user should know."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, step: int, loss: float | None, lr: float, images_per_second: float | None) -> None: ...

    def row(self, row: Row) -> None: ...

    def say(self, text: str) -> None: ...


def display_for(total: int, first: int, *, quiet: bool = False, stream: Any = None) -> Display:
    """The display for this stream, standard error where None."""
    stream = stream if stream is not None else sys.stderr
    if quiet:
        return Silence()
    return Bar(total, first, stream) if stream.isatty() else Lines(total, first, stream)


class Silence:
    """Shows nothing."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def step(self, step: int, loss: float | None, lr: float, images_per_second: float | None) -> None:
        pass

    def row(self, row: Row) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class Lines(Silence):
    """A line every ten seconds and for every test, for logs and pipes."""

    def __init__(self, total: int, first: int, stream: Any) -> None:
        self.total, self.first, self.stream = total, first, stream
        self.start = self.shown = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def step(self, step: int, loss: float | None, lr: float, images_per_second: float | None) -> None:
        now = time.monotonic()
        if now - self.shown < SECONDS_BETWEEN_LINES:
            return
        self.shown = now
        left = (now - self.start) / max(step - self.first, 1) * (self.total - step)
        self.say(f"step {step}/{self.total}  {values(loss, lr, images_per_second)}  {clock(left)} left")

    def row(self, row: Row) -> None:
        if row.get("test_loss") is not None:
            self.say(in_words(row))

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class Bar(Silence):
    """A bar with loss, learning rate, speed and time left; tests stay as lines above it."""

    def __init__(self, total: int, first: int, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(file=stream),
        )
        self.task = self.progress.add_task("step", total=total, completed=first, values="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float | None, lr: float, images_per_second: float | None) -> None:
        self.progress.update(self.task, completed=step, values=values(loss, lr, images_per_second))

    def row(self, row: Row) -> None:
        if row.get("test_loss") is not None:
            self.say(in_words(row))

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def values(loss: float | None, lr: float, images_per_second: float | None) -> str:
    parts = [f"loss {loss:.4f}" if loss is not None else "", f"lr {lr:.2e}"]
    parts.append(f"{images_per_second:.0f} images/s" if images_per_second else "")
    return "  ".join(part for part in parts if part)


def in_words(row: Row) -> str:
    """A row of the history that has a test in it."""
    parts = [f"epoch {row['epoch']:g}", f"step {row['step']}"]
    names = {"train_loss": "train loss {:.4f}", "train_top1": "train {:.2f} %", "test_loss": "test loss {:.4f}"}
    names |= {"test_top1": "test {:.2f} %", "average_top1": "average of weights {:.2f} %", "lr": "lr {:.2e}"}
    names |= {"images_per_second": "{:.0f} images/s"}
    parts += [text.format(row[name]) for name, text in names.items() if row.get(name) is not None]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
