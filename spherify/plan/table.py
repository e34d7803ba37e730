"""A plan as a table: one row a layer, long runs of equal rows folded into one."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from spherify.plan.decision import Decision
    from spherify.plan.plan import Plan

LONGEST_RUN = 4  # rows that differ in the numbers of their names alone; more are folded into one
STYLES = {"convert": "green", "keep": "yellow", "unsupported": "bold red"}
WIDTH_WITHOUT_TERMINAL = 140


@dataclass(frozen=True)
class Row:
    """One line of the table; ``name`` has ranges where several layers stand in it."""

    name: str
    count: int
    type: str
    shape: str
    action: str
    rule: str
    reason: str


def rows(plan: Plan) -> list[Row]:
    """The folded rows, each where its first layer stands."""
    groups: dict[tuple[str, ...], list[Decision]] = {}
    for decision in plan.decisions:
        groups.setdefault(likeness(decision), []).append(decision)
    found: list[Row] = []
    done: set[tuple[str, ...]] = set()
    for decision in plan.decisions:
        key = likeness(decision)
        if len(groups[key]) <= LONGEST_RUN or not fills_its_ranges(groups[key]):
            found.append(row_of([decision]))
        elif key not in done:
            done.add(key)
            found.append(row_of(groups[key]))
    return found


def likeness(decision: Decision) -> tuple[str, ...]:
    """Equal for layers that differ in nothing but the numbers in their names."""
    site = decision.site
    blank = [re.sub(r"\d+", "#", text) for text in (site.name, decision.reason)]
    roles = " ".join(sorted(site.roles))
    return (*blank, site.type, str(site.shape), decision.action, decision.rule, roles)


def fills_its_ranges(decisions: Sequence[Decision]) -> bool:
    """Whether the ranges of the folded name stand for these layers and no others."""
    columns = zip(*(re.split(r"(\d+)", decision.site.name) for decision in decisions), strict=True)
    return math.prod(len(set(column)) for column in columns) == len(decisions)


def row_of(decisions: Sequence[Decision]) -> Row:
    first = decisions[0]
    return Row(
        name=with_ranges([decision.site.name or "(the model)" for decision in decisions]),
        count=len(decisions),
        type=first.site.type,
        shape="x".join(map(str, first.site.shape)),
        action=first.action,
        rule=first.rule,
        reason=with_ranges([decision.reason for decision in decisions]),
    )


def with_ranges(texts: Sequence[str]) -> str:
    """``blocks.0.fc``, ``blocks.1.fc``, ... as ``blocks.{0-11}.fc``."""
    columns = zip(*(re.split(r"(\d+)", text) for text in texts), strict=True)
    parts = []
    for column in columns:
        values = list(dict.fromkeys(column))
        if len(values) == 1:
            parts.append(values[0])
            continue
        numbers = sorted(int(value) for value in values)
        is_run = numbers == list(range(numbers[0], numbers[-1] + 1))
        parts.append(f"{{{numbers[0]}-{numbers[-1]}}}" if is_run else "{" + ",".join(map(str, numbers)) + "}")
    return "".join(parts)


def as_rich_table(plan: Plan) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold")
    for title in ("type", "shape", "action", "rule"):
        table.add_column(title, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in rows(plan):
        name = f"{row.name} ({row.count})" if row.count > 1 else row.name
        action = Text(row.action, STYLES[row.action])
        table.add_row(Text(name), row.type, row.shape, action, row.rule, Text(row.reason))
    return table


def summary_line(plan: Plan) -> str:
    counts = plan.summary()
    options = plan.options
    k = f", k={options.k:g}" if options.k is not None else ""
    heads = f", {len(plan.heads)} to {options.head}" if plan.heads else ""
    return (
        f"{plan.model}: {len(plan.decisions)} layers, {len(plan.converted)} converted to {options.operator}{k}{heads}, "
        f"{counts['kept']} kept, {counts['unsupported']} unsupported"
    )


def print_plan(plan: Plan, console: Console) -> None:
    """The table, the notes, the summary."""
    console.print(as_rich_table(plan))
    for note in plan.notes:
        console.print(Text(f"note: {note}", "yellow"))
    console.print(Text(summary_line(plan), "bold"))


def as_text(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=WIDTH_WITHOUT_TERMINAL, color_system=None)
    print_plan(plan, console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
