"""The sweep over the whole zoo: ``python -m benchmarks.zoo``. Restartable; prints the totals, writes the table."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.zoo.page import page, short_table
from benchmarks.zoo.results import as_csv, differences, read, read_table, rows, totals
from spherify.models.resolve import list_models, version_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "table.csv"
PAGE = ROOT / "docs" / "zoo.md"
SHORT_TABLE = ROOT / "spherify" / "models" / "zoo.csv"
SHOWN = 40


def sweep(names: list[str], workers: int, limit: int, log: Path) -> None:
    """Examine the models that ``log`` does not have yet, ``workers`` processes side by side."""
    waiting: Iterator[str] = iter(names)
    lock = threading.Lock()
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task("models", total=len(names))

        def serve() -> None:
            process = None
            while True:
                with lock:
                    name = next(waiting, None)
                if name is None:
                    break
                if process is None or process.poll() is not None:
                    process = start(limit)
                result = ask(process, name)
                with lock, log.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                progress.update(task, advance=1, description=name)
            if process is not None:
                process.communicate()

        threads = [threading.Thread(target=serve) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def start(limit: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.zoo.worker", str(limit)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def ask(process: subprocess.Popen, name: str) -> dict[str, Any]:
    """One model's result; a process that died with it is a result too."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (OSError, ValueError):
        process.kill()
        return {"model": name, "outcome": "failed", "message": "its process died"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="*", help="a glob on the names")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=120, help="seconds for one model")
    parser.add_argument("--log", type=Path, default=HERE / "sweep.jsonl", help="results so far; kept for a restart")
    parser.add_argument(
        "--write", action="store_true", help="write the table and the pages made from it (of the whole zoo)"
    )
    arguments = parser.parse_args()

    if arguments.write and arguments.models != "*":
        parser.error("--write is for the whole zoo; leave --models out.")
    names = list_models(arguments.models)
    done = read(arguments.log)
    sweep([name for name in names if name not in done], arguments.workers, arguments.limit, arguments.log)
    results = {name: result for name, result in read(arguments.log).items() if name in set(names)}
    versions = ", ".join(f"{library} {version_of(library).partition('+')[0]}" for library in ("timm", "torchvision"))
    print(versions)
    print(totals(results))
    return compare(results, versions, write=arguments.write)


def compare(results: dict[str, dict[str, Any]], versions: str, *, write: bool) -> int:
    """Print what differs from the committed table; 1 where there is something and it is not to be written."""
    table = rows(results)
    lines = differences(read_table(TABLE), table)
    for line in lines[:SHOWN]:
        print(f"differs: {line}")
    print(f"{len(lines)} of {len(table)} models differ from {TABLE.name}")
    if not write:
        return 1 if lines else 0
    for path, text in (
        (TABLE, as_csv(table)),
        (PAGE, page(table, versions, totals(results))),
        (SHORT_TABLE, short_table(table, versions)),
    ):
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
