"""The speed suite: ``python -m benchmarks.speed`` writes JSON under results/, and ``--report`` the docs' table."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
import torch._inductor.config
from torch import nn

from benchmarks.peers import as_peer
from spherify.bench.compare import PHASES, Settings, compare_forms, machine, number_of_threads
from spherify.bench.timing import interleaved
from spherify.convert import plan
from spherify.export.atomic import replace_file
from spherify.layers.conv import SphereConv2d

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
OPERATORS = ("cosine", "linear", "sigmoid", "learnable")


def cnn9() -> nn.Module:
    """The paper's CNN-9 for 32 pixels: three times three convolutions of 64, 96, 128 filters."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 96, 128):
        for _ in range(3):
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.Linear(256, 10))


MODELS = {
    "cnn9": cnn9,
    "resnet18": lambda: timm.create_model("resnet18"),
    "resnet50": lambda: timm.create_model("resnet50"),
    "convnext_tiny": lambda: timm.create_model("convnext_tiny"),
    "vit_small": lambda: timm.create_model("vit_small_patch16_224", dynamic_img_size=True),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_100"),
}
INFERENCES = 3  # rounds of them for one of training steps, each of which takes so much longer
ON_CPU = {  # batch, pixels
    "cnn9": (16, 32),
    "resnet18": (8, 112),
    "resnet50": (4, 96),
    "convnext_tiny": (4, 96),
    "vit_small": (4, 96),
    "mobilenetv2": (8, 96),
}
ON_CUDA = {
    "cnn9": (512, 32),
    "resnet18": (256, 224),
    "resnet50": (128, 224),
    "convnext_tiny": (64, 224),
    "vit_small": (128, 224),
    "mobilenetv2": (128, 224),
}


@dataclass(frozen=True)
class Case:
    """One model, the forms measured side by side, how, and in which phases."""

    model: str
    operators: tuple[str, ...]
    peers: tuple[str, ...]
    settings: Settings
    phases: tuple[str, ...] = PHASES

    @property
    def name(self) -> str:
        return f"{self.model}{' compiled' if self.settings.compiled else ''}"


def cases(device: str, repeats: int, all_compiled: bool = False) -> Iterator[Case]:
    if device == "cuda":
        common = dict(device="cuda", dtype="bfloat16", channels_last=True, warmup=3, repeats=repeats, calls=4)
        for name, (batch, size) in ON_CUDA.items():
            settings = Settings(batch=batch, size=size, **common)  # type: ignore[arg-type]
            peers = ("authors", "im2col", "b-cos") if name == "resnet18" else ()
            yield Case(name, OPERATORS if name == "resnet18" else ("cosine", "sigmoid"), peers, settings)
        for name in ("resnet18", "resnet50", "convnext_tiny", "vit_small", "cnn9"):
            batch, size = ON_CUDA[name]
            yield Case(name, ("cosine",), (), Settings(batch=batch, size=size, compiled=True, **common))  # type: ignore[arg-type]
        return
    for name, (batch, size) in ON_CPU.items():
        peers = ("authors", "im2col", "b-cos") if name in ("cnn9", "resnet18") else ()
        yield Case(name, OPERATORS, peers, Settings(batch=batch, size=size, threads=1, repeats=repeats, cpu_time=True))
    for name in ("cnn9", "resnet18"):
        batch, size = ON_CPU[name]
        yield Case(
            name,
            ("cosine",),
            (),
            Settings(batch=batch, size=size, threads=1, repeats=repeats, compiled=True, cpu_time=True),
        )
    for name in ("cnn9", "resnet18", "resnet50", "vit_small", "convnext_tiny", "mobilenetv2") if all_compiled else ():
        batch, size = ON_CPU[name]
        operators = OPERATORS[1:] if name in ("cnn9", "resnet18") else OPERATORS
        settings = Settings(batch=batch, size=size, threads=1, repeats=repeats, compiled=True, cpu_time=True)
        yield Case(name, operators, (), settings, ("train",))


def run(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = MODELS[case.model]()
    x = torch.randn(2, 3, case.settings.size or 224, case.settings.size or 224)
    forms = {operator: plan(plain, operator=operator, example_input=x).apply() for operator in case.operators}
    forms |= {name: as_peer(plain, name) for name in case.peers}
    rows = []
    for phase in case.phases:
        rounds = INFERENCES if phase == "infer" and case.settings.device == "cpu" else 1
        settings = replace(case.settings, repeats=rounds * case.settings.repeats)
        rows += compare_forms(plain, forms, settings, (phase,))
    return {"model": case.model, "settings": asdict(case.settings), "rows": [row.to_dict() for row in rows]}


def sweep(repeats: int) -> list[dict[str, Any]]:
    """Training steps of one 3x3 layer with four times the batch, pixels or channels, plain and angular."""
    start = dict(batch=4, pixels=16, channels=32)
    rows = []
    for axis, value in start.items():
        for factor in (1, 2, 4):
            shape = {**start, axis: value * factor}
            x = torch.randn(shape["batch"], shape["channels"], shape["pixels"], 16)
            conv = nn.Conv2d(shape["channels"], 64, 3, padding=1, bias=False)
            layers = {"plain": conv, "cosine": SphereConv2d.from_conv(conv, operator="cosine")}
            steps = {name: training_step(layer, x) for name, layer in layers.items()}
            timing = interleaved(steps, repeats=3 * repeats, clock=time.process_time)
            for name, found in timing.items():
                rows.append({"axis": axis, "factor": factor, "form": name, "least_ms": found.least * 1e3})
    return rows


def training_step(layer: nn.Module, x: torch.Tensor) -> Any:
    leaf = x.clone().requires_grad_()

    def step() -> None:
        leaf.grad = None
        layer.zero_grad(set_to_none=True)
        layer(leaf).square().mean().backward()

    return step


def measure(
    device: str,
    repeats: int,
    minutes: float,
    only: list[str],
    out: Path,
    operators: tuple[str, ...] = OPERATORS,
    *,
    all_compiled: bool = False,
    adds: bool = False,
) -> None:
    """Every case, written after each; no new one is begun when the time is up.

    Args:
        adds: keep what the file holds, but for the forms measured again; for the same machine and code.
    """
    end = time.monotonic() + 60 * minutes
    found: dict[str, Any] = json.loads(out.read_text()) if adds else {"cases": [], "left_out": []}
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with number_of_threads(1 if device == "cpu" else None):
        found["machine"] = {**machine(), "timm": timm.__version__}
        if device == "cpu" and (not only or "sweep" in only):
            found["sweep"] = sweep(repeats)
        for case in cases(device, repeats, all_compiled):
            chosen = replace(case, operators=tuple(one for one in case.operators if one in operators))
            if (only and case.name not in only) or not chosen.operators:
                continue
            if time.monotonic() > end:
                found["left_out"].append(case.name)
                continue
            print(case.name, *chosen.operators, flush=True)
            try:
                measured = run(chosen)
            except Exception as error:  # one model that fails must not cost the others' figures
                found["left_out"].append(f"{case.name}: {type(error).__name__}: {error}")
            else:
                left = (not_again(held, measured) for held in found["cases"])
                found["cases"] = [*filter(None, left), measured]
            replace_file(out, (json.dumps(found, indent=1) + "\n").encode())
    print(f"wrote {out}; left out: {found['left_out'] or 'nothing'}")


def not_again(held: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any] | None:
    """A result without the forms that another of the same network has measured again; None if none is left."""
    if (held["model"], held["settings"]["compiled"]) != (measured["model"], measured["settings"]["compiled"]):
        return held
    again = {(row["phase"], row["form"]) for row in measured["rows"] if not row["form"].startswith("plain")}
    rows = [row for row in held["rows"] if (row["phase"], row["form"]) not in again]
    return {**held, "rows": rows} if any(not row["form"].startswith("plain") for row in rows) else None


def tables(paths: list[Path]) -> str:
    """Markdown of every results file."""
    parts = []
    for path in paths:
        found = json.loads(path.read_text())
        here = found["machine"]
        parts.append(
            f"`{path.name}`: {here['gpu'] or here['processor']}, {here['threads']} thread(s), torch {here['torch']}, "
            f"timm {here['timm']}, {found['date'][:10]}. Median of paired ratios (ratio of the least times)."
        )
        parts.append("| model | form | train | memory | infer | folded |\n|---|---|--:|--:|--:|--:|")
        lines = [line for case in found["cases"] for line in lines_of(case)]
        parts[-1] += "\n" + "\n".join(lines)
        if found["left_out"]:
            parts.append(f"Not measured: {'; '.join(found['left_out'])}.")
    return "\n\n".join(parts)


def lines_of(case: dict[str, Any]) -> Iterator[str]:
    rows = {(row["phase"], row["form"]): row for row in case["rows"]}
    settings = case["settings"]
    how = f"{settings['batch']} x {settings['size']} px{', compiled' if settings['compiled'] else ''}"
    for form in dict.fromkeys(form for _, form in rows if not form.endswith("folded")):
        if form == "plain":
            continue
        train, infer = rows.get(("train", form)), rows.get(("infer", form))
        folded = rows.get(("infer", f"{form} folded"))
        memory = f"{train['memory_ratio']:.2f}" if train else ""
        yield f"| {case['model']}, {how} | {form} | {ratio(train)} | {memory} | {ratio(infer)} | {ratio(folded)} |"


def ratio(row: dict[str, Any] | None) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_of_least']:.2f})" if row else ""


def plot(paths: list[Path], out: Path) -> None:
    """Training ratios of every model and operator as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "spherify"  # the same bytes from the same figures
    import matplotlib.pyplot as plt

    found: dict[str, dict[str, float]] = {}  # operator to ratio, by network
    for case in (case for path in paths for case in json.loads(path.read_text())["cases"]):
        label = f"{case['model']}{' (compiled)' if case['settings']['compiled'] else ''}"
        ratios = {row["form"]: row["ratio"] for row in case["rows"] if row["phase"] == "train"}
        found.setdefault(label, {}).update(ratios)
    figure, axes = plt.subplots(figsize=(9, 4))
    for offset, operator in enumerate(OPERATORS):
        heights = [ratios.get(operator, 0.0) for ratios in found.values()]
        axes.bar([place + 0.2 * offset for place in range(len(found))], heights, 0.19, label=operator)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([place + 0.3 for place in range(len(found))], list(found), fontsize=8, rotation=20, ha="right")
    axes.set_ylabel("training step, ratio to plain")
    axes.set_ylim(0.8, None)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def report(paths: list[Path], page: Path) -> None:
    """Put tables and plot between the marks of the page."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    plot(paths, page.with_suffix(".svg"))
    body = f"{BEGIN}\n\n{tables(paths)}\n\n![Training step relative to the plain network](speed.svg)\n\n{END}"
    replace_file(page, (before + body + after).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=9, help="rounds of training steps")
    parser.add_argument("--minutes", type=float, help="begin no new case after this time; 7 on a GPU, 60 on the CPU")
    parser.add_argument("--only", nargs="*", default=[], help="names such as resnet18 or 'resnet18 compiled'")
    parser.add_argument("--operators", nargs="*", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--all-compiled", action="store_true", help="training of every network compiled, too (CPU)")
    parser.add_argument("--add", action="store_true", help="add to the results file what it does not hold")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--report", action="store_true", help="write docs/speed.md from the results that are there")
    given = parser.parse_args()
    if given.report:
        report(sorted(RESULTS.glob("speed-*.json")), DOCS / "speed.md")
        return
    # What Inductor has in its cache was compiled by whatever version of this package there was then.
    torch._inductor.config.force_disable_caches = True
    out = given.out or RESULTS / f"speed-{given.device}.json"
    operators = tuple(given.operators)
    chosen = dict(all_compiled=given.all_compiled, adds=given.add)
    minutes = given.minutes or (7.0 if given.device == "cuda" else 60.0)
    measure(given.device, given.repeats, minutes, given.only, out, operators, **chosen)


if __name__ == "__main__":
    main()
