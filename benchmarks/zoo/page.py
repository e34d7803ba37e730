"""Pages made from the table: ``docs/zoo.md``, and ``spherify/models/zoo.csv`` for ``spherify list models``."""

from __future__ import annotations

import csv
import io
from collections import defaultdict

from benchmarks.zoo.results import Row

SHORT_COLUMNS = ("model", "layers", "converted", "kept", "unsupported", "shortcuts")


def count(text: str) -> int:
    """The sum of ``a=1 b=2``."""
    return sum(int(pair.rpartition("=")[2]) for pair in text.split())


def short_table(table: list[Row], versions: str) -> str:
    """One line a model, numbers only; the first line says of which versions."""
    text = io.StringIO()
    text.write(f"# {versions}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SHORT_COLUMNS)
    for row in table:
        if row["sites"]:
            numbers = (row["converted"], count(row["kept"]), count(row["unsupported"]), row["shortcuts"] or 0)
            writer.writerow((row["model"], row["sites"], *numbers))
    return text.getvalue()


def page(table: list[Row], versions: str, totals: str) -> str:
    """Markdown: the totals, what is not converted and where, and a row for each family."""
    families: dict[str, list[Row]] = defaultdict(list)
    for row in table:
        families[row["family"]].append(row)
    unsupported: dict[str, list[str]] = defaultdict(list)
    for row in table:
        for pair in row["unsupported"].split():
            reason, _, number = pair.rpartition("=")
            unsupported[reason].append(f"{row['model'].split(':')[1]} ({number})")
    refused = [row for row in table if row["outcome"] not in ("converted", "nothing to convert")]
    lines = [
        "# The zoo",
        "",
        f"Every model of {versions} that can be built by name: planned, converted (operator",
        "cosine) and verified in eval and train mode by `python -m benchmarks.zoo`, which writes this page. The models",
        "that are refused are quantised; four of them are ResNets, with 15 shortcuts more.",
        "",
        "```",
        totals,
        "```",
        "",
        "A shortcut is a dense 1x1 convolution on the short side of a residual addition (role `@shortcut`). The head",
        "is kept by default; see `spherify list roles`. The full table is `benchmarks/zoo/table.csv`.",
        "",
        "## Not converted",
        "",
        "| rule and type | models (sites) |",
        "|---|---|",
        *(f"| `{reason}` | {', '.join(models)} |" for reason, models in sorted(unsupported.items())),
        "",
        *(f"- `{row['model']}`: {row['outcome']}: {row['message']}" for row in refused),
        "",
        "## By family",
        "",
        "| family | models | layers | converted | kept | unsupported | shortcuts |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for family, members in sorted(families.items()):
        numbers = (
            len(members),
            sum(int(row["sites"] or 0) for row in members),
            sum(int(row["converted"] or 0) for row in members),
            sum(count(row["kept"]) for row in members),
            sum(count(row["unsupported"]) for row in members),
            sum(int(row["shortcuts"] or 0) for row in members),
        )
        lines.append(f"| {family} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"
