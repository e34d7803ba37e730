"""The sweep over the whole zoo: ``python -m benchmarks.zoo``. Restartable; prints the totals, writes the table."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spherify.models.resolve import list_models, version_of

HERE = Path(__file__).parent
COLUMNS = ("model", "outcome", "sites", "converted", "kept", "unsupported", "roles", "heads", "message")


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
                process.stdin.close()
                process.wait()

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
    try:
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (OSError, ValueError):
        process.kill()
        return {"model": name, "outcome": "failed", "message": "its process died"}


def read(log: Path) -> dict[str, dict[str, Any]]:
    if not log.exists():
        return {}
    results = (json.loads(line) for line in log.read_text().splitlines() if line)
    return {result["model"]: result for result in results}


def counted(counts: dict[str, int]) -> str:
    return " ".join(f"{key}={count}" for key, count in sorted(counts.items()))


def table(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of names, without times: equal results give equal bytes."""
    return [
        {
            **{key: result.get(key, "") for key in COLUMNS},
            "kept": counted(result.get("kept", {})),
            "unsupported": counted(result.get("unsupported", {})),
            "roles": counted(result.get("roles", {})),
            "heads": " ".join(result.get("heads", ())),
        }
        for _, result in sorted(results.items())
    ]


def totals(results: dict[str, dict[str, Any]]) -> str:
    outcomes = Counter(result["outcome"] for result in results.values())
    sites = sum(result.get("sites", 0) for result in results.values())
    accounted = sum(
        result.get("converted", 0) + sum(result.get("kept", {}).values()) + sum(result.get("unsupported", {}).values())
        for result in results.values()
    )
    shortcuts = [result["conv_shortcuts"] for result in results.values() if result.get("conv_shortcuts")]
    seconds = sorted(result["seconds"] for result in results.values() if "seconds" in result)
    lines = [
        f"models {len(results)}, " + ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())),
        f"sites {sites}, silently unaccounted {sites - accounted}",
        f"1x1 convolution shortcuts found {sum(shortcuts)} in {len(shortcuts)} models",
    ]
    if seconds:
        middle = seconds[len(seconds) // 2]
        lines.append(f"seconds a model: median {middle:.2f}, largest {seconds[-1]:.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="*", help="a glob on the names")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=120, help="seconds for one model")
    parser.add_argument("--log", type=Path, default=HERE / "sweep.jsonl", help="results so far; kept for a restart")
    parser.add_argument("--write", action="store_true", help="write the table even where it differs from the committed")
    arguments = parser.parse_args()

    names = list_models(arguments.models)
    done = read(arguments.log)
    sweep([name for name in names if name not in done], arguments.workers, arguments.limit, arguments.log)
    results = {name: result for name, result in read(arguments.log).items() if name in set(names)}
    print(f"timm {version_of('timm')}, torchvision {version_of('torchvision')}")
    print(totals(results))
    return compare(table(results), HERE / "table.csv", write=arguments.write)


def compare(rows: list[dict[str, Any]], path: Path, *, write: bool) -> int:
    """Print the rows that differ from the committed table; 1 where there are any and they are not written."""
    old = {row["model"]: row for row in csv.DictReader(path.open())} if path.exists() else {}
    fresh = {row["model"]: {key: str(value) for key, value in row.items()} for row in rows}
    changed = [name for name, row in fresh.items() if old.get(name) != row]
    for name in changed[:20]:
        print(f"differs from the table: {name}: {fresh[name]}")
    if write or not old:
        merged = {**old, **fresh}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(merged[name] for name in sorted(merged))
        print(f"wrote {path.name}: {len(merged)} models")
        return 0
    print(f"{len(changed)} of {len(fresh)} models differ from {path.name}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
