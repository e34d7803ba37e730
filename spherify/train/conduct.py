"""How a run is conducted, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from spherify.errors import OptionError
from spherify.train.evaluate import Evaluation
from spherify.train.history import Row


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How a run is conducted: what changes nothing in its result.

    Attributes:
        log_interval: steps between rows of the log.
        val_interval: epochs between tests.
        checkpoint_steps: steps between checkpoints; None: none beside those of the clock and of the epochs.
        checkpoint_minutes: minutes between checkpoints. One is written after every test too.
        tensorboard: write event files.
        quiet: show nothing.
    """

    log_interval: int = 50
    val_interval: int = 1
    checkpoint_steps: int | None = None
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("log_interval", "val_interval", "checkpoint_steps", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"{name}={value} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What training gave.

    Attributes:
        model: the trained model; with ``model_ema``, the moving average of it.
        rows: of the log, each a dict.
        step: optimiser steps done.
        stopped_by: the signal that ended the run before its end; None where it is complete.
        evaluation: the last test; None without test batches.
    """

    model: nn.Module
    rows: list[Row]
    step: int
    stopped_by: str | None
    evaluation: Evaluation | None
