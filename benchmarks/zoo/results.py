"""Results of a sweep as a table, as totals, and compared with the committed table."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

COLUMNS = (
    *("model", "family", "outcome", "sites", "converted", "kept", "unsupported", "shortcuts", "roles", "heads"),
    *("message", "seconds"),
)
MEASURED = ("seconds",)  # differs from run to run, and is left out of the comparison
Result = dict[str, Any]
Row = dict[str, str]


def read(log: Path) -> dict[str, Result]:
    """The results so far, the last one of each model."""
    if not log.exists():
        return {}
    results = (json.loads(line) for line in log.read_text().splitlines() if line)
    return {result["model"]: result for result in results}


def counted(counts: dict[str, int]) -> str:
    return " ".join(f"{key}={count}" for key, count in sorted(counts.items()))


def rows(results: dict[str, Result]) -> list[Row]:
    """In the order of names."""
    table = []
    for _, result in sorted(results.items()):
        row = {key: result.get(key, "") for key in COLUMNS}
        row |= {key: counted(result.get(key, {})) for key in ("kept", "unsupported", "roles")}
        row |= {"heads": " ".join(result.get("heads", ())), "shortcuts": result.get("conv_shortcuts", "")}
        table.append({key: str(value) for key, value in row.items()})
    return table


def read_table(path: Path) -> dict[str, Row]:
    return {row["model"]: row for row in csv.DictReader(path.read_text().splitlines())} if path.exists() else {}


def as_csv(table: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def differences(old: dict[str, Row], table: list[Row]) -> list[str]:
    """A line for each model that is new or whose row says something else, times apart."""
    lines = []
    for row in table:
        before = old.get(row["model"])
        if before is None:
            lines.append(f"{row['model']}: not in the table")
            continue
        changed = [key for key in COLUMNS if key not in MEASURED and before.get(key) != row[key]]
        if changed:
            told = "; ".join(f"{key} was {before.get(key)!r}, is {row[key]!r}" for key in changed)
            lines.append(f"{row['model']}: {told}")
    return lines


def totals(results: dict[str, Result]) -> str:
    """What the sweep shows, in four lines."""
    outcomes = Counter(result["outcome"] for result in results.values())
    sites = sum(result.get("sites", 0) for result in results.values())
    accounted = sum(
        result.get("converted", 0) + sum(result.get("kept", {}).values()) + sum(result.get("unsupported", {}).values())
        for result in results.values()
    )
    shortcuts = [result["conv_shortcuts"] for result in results.values() if result.get("conv_shortcuts")]
    linear = [result["linear_shortcuts"] for result in results.values() if result.get("linear_shortcuts")]
    failed = outcomes.pop("failed", 0)
    seconds = sorted(result["seconds"] for result in results.values() if "seconds" in result)
    lines = [
        f"models {len(results)}, failed {failed}, "
        + ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())),
        f"sites {sites}, silently unaccounted {sites - accounted}",
        f"1x1 convolution shortcuts found {sum(shortcuts)} in {len(shortcuts)} models, "
        f"linear ones {sum(linear)} in {len(linear)}",
    ]
    if seconds:
        middle = seconds[len(seconds) // 2]
        lines.append(f"CPU seconds to plan, convert and verify: median {middle:.2f}, largest {seconds[-1]:.2f}")
    return "\n".join(lines)
