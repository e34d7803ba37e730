"""One batch of models in one process: reads names on standard input, writes one JSON object a line."""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
from collections import Counter
from typing import Any

import timm
import torch
import torchvision

from spherify.convert import plan
from spherify.errors import SpherifyError
from spherify.models.resolve import build, resolve

DETECTION = ("rcnn", "retinanet", "fcos", "ssd")


class TooSlow(Exception):
    """The model's time is up."""


def out_of_time(signal_number: int, frame: Any) -> None:
    raise TooSlow


def build_small(name: str) -> torch.nn.Module:
    """On meta where the builder can, detection models with small images."""
    library, _, bare = name.partition(":")
    small = library == "torchvision" and any(word in bare for word in DETECTION) and not bare.startswith("ssd")
    source = resolve(name, {"min_size": 160, "max_size": 192} if small else None)
    try:
        return build(source, device="meta")
    except SpherifyError:
        return build(source)


def family_of(name: str) -> str:
    """The file in which the library defines the model."""
    library, _, bare = name.partition(":")
    if library == "timm":
        return f"timm {timm.models.model_entrypoint(bare).__module__.rpartition('.')[2]}"
    return f"torchvision {torchvision.models.get_model_builder(bare).__module__.removeprefix('torchvision.models.')}"


def examine(name: str) -> dict[str, Any]:
    """What the tool says of one model, and whether its conversion holds."""
    known = {"model": name, "family": family_of(name)}
    try:
        model = build_small(name)
        start = time.process_time()
        report = plan(model)
    except SpherifyError as error:
        return {**known, "outcome": "refused", "message": str(error)}
    planned = time.process_time()
    outcome, message = "converted", ""
    if report.summary()["converted"]:
        try:
            report.apply(inplace=True)
        except SpherifyError as error:
            outcome, message = "failed", str(error)
    else:
        outcome = "nothing to convert"
    roles = Counter(role for decision in report.decisions for role in decision.site.roles)
    convs = [d for d in report.decisions if "@shortcut" in d.site.roles and d.site.kind != "linear"]
    return {
        **known,
        "outcome": outcome,
        "message": message,
        "sites": len(report.decisions),
        "converted": report.summary()["converted"],
        "kept": dict(Counter(d.rule for d in report.decisions if d.action == "keep")),
        "unsupported": dict(Counter(f"{d.rule}:{d.site.type}" for d in report.decisions if d.action == "unsupported")),
        "roles": dict(sorted(roles.items())),
        "shortcuts": [d.site.name for d in report.decisions if "@shortcut" in d.site.roles],
        "conv_shortcuts": len(convs),
        "linear_shortcuts": roles["@shortcut"] - len(convs),
        "heads": [d.site.name for d in report.decisions if "@head" in d.site.roles],
        "notes": list(report.notes),
        "plan_seconds": round(planned - start, 2),
        "seconds": round(time.process_time() - start, 2),
    }


def main() -> None:
    limit = int(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, out_of_time)
    for name in map(str.strip, sys.stdin):
        signal.alarm(limit)
        try:
            result = examine(name)
        except TooSlow:
            result = {"model": name, "outcome": "failed", "message": f"took longer than {limit} s"}
        except Exception as error:  # a tool that proves itself on a zoo must survive each animal
            result = {"model": name, "outcome": "failed", "message": f"{type(error).__name__}: {error}"[:300]}
        finally:
            signal.alarm(0)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
