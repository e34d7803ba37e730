"""Where commands print."""

from __future__ import annotations

import sys
from typing import Any

WIDTH_WITHOUT_TERMINAL = 140


def terminal() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=WIDTH_WITHOUT_TERMINAL)
