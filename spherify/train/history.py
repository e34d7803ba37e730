"""What happened in a run, row by row: in memory, in log.csv, and in TensorBoard where asked for."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spherify.errors import FileError, SpherifyError

LOG = "log.csv"
COLUMNS = (
    "step",
    "epoch",
    "lr",
    "train_loss",
    "train_top1",
    "images_per_second",
    "test_loss",
    "test_top1",
    "test_top5",
    "average_top1",
    "seconds",
)
Row = dict[str, Any]


class History:
    """Rows of a run; those of a resumed run begin with the ones before it was interrupted.

    Args:
        folder: where log.csv is written; None: nowhere.
        rows: what is known already.
        tensorboard: write event files too, in the folder.
    """

    def __init__(self, folder: Path | None, rows: list[Row] | None = None, *, tensorboard: bool = False) -> None:
        self.rows: list[Row] = list(rows or [])
        self.path = None if folder is None else folder / LOG
        self.board = event_writer(folder, self.rows) if tensorboard and folder is not None else None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write("w", [dict(zip(COLUMNS, COLUMNS, strict=True)), *self.rows])

    def add(self, row: Mapping[str, Any]) -> None:
        """One more row; a value that it does not have stays empty."""
        full = {name: row.get(name) for name in COLUMNS}
        self.rows.append(full)
        if self.path is not None:
            self.write("a", [full])
        if self.board is not None:
            for name, value in full.items():
                if name not in ("step", "epoch") and value is not None:
                    self.board.add_scalar(name, value, full["step"])
            self.board.flush()

    def write(self, mode: str, rows: list[Row]) -> None:
        assert self.path is not None
        try:
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([[shown(row[name]) for name in COLUMNS] for row in rows])
        except OSError as error:
            raise FileError(f"{self.path} could not be written ({error.strerror or error}).") from error

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def last(self, name: str) -> Any:
        """The newest value of a column, or None."""
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)


def shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def event_writer(folder: Path, rows: list[Row]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SpherifyError(
            "TensorBoard is not installed; install it with: pip install 'spherify[tensorboard]'."
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=rows[-1]["step"] + 1 if rows else None)
