"""Images per second of training on CIFAR-sized input, with and without what makes a GPU fast: one line each.

``python -m benchmarks.train_speed`` prints a table and, with ``--output FILE``, writes it as CSV beside the names of
device and versions. On a CPU it runs too, slowly; ``--steps 3 --batch-size 16`` shows that it works.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from spherify.convert import spherify
from spherify.data.dataset import ArrayImages, DataSet
from spherify.data.preprocess import Preprocessing
from spherify.train.conduct import Conduct
from spherify.train.fit import fit
from spherify.train.loaders import loaders_for
from spherify.train.recipe import Recipe

WIDTHS = (128, 192, 256)  # of the paper's CNN-9, as its authors' code has them
HOW = Preprocessing(input_size=(3, 32, 32), mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
WAYS: dict[str, dict[str, bool]] = {
    "float32": {},
    "bfloat16": {"amp": True},
    "bfloat16, channels last": {"amp": True, "channels_last": True},
    "bfloat16, channels last, compiled": {"amp": True, "channels_last": True, "torchcompile": True},
}
COLUMNS = ("model", "operator", "way", "data", "images_per_second")


def cnn9() -> nn.Module:
    """Three times three convolutions with BatchNorm and ReLU, pooled in between; the paper's CNN-9."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in WIDTHS:
        for _ in range(3):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * 16, 256), nn.BatchNorm1d(256), nn.Linear(256, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn9": cnn9,
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10),
}


def photographs(count: int) -> DataSet:
    """Noise of CIFAR's size: what is in an image does not change how long it takes."""
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    split = ArrayImages(images, np.arange(count) % 10)
    names = tuple(map(str, range(10)))
    return DataSet(
        name="noise", classes=names, train=split, test=split, mean=HOW.mean, std=HOW.std, size=(3, 32, 32), mirrors=True
    )


def speed(model: nn.Module, data: DataSet, recipe: Recipe, steps: int, workers: int) -> float:
    """Images per second over the last ``steps`` steps, after as many to warm up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    marks: list[float] = []

    def mark(step: int, total: int) -> None:
        if step in (steps, total - 1):
            if device == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    loaders = loaders_for(HOW, data, recipe, workers=workers, device=device)
    fit(model, (loaders.train, None), recipe, on_step=[mark], conduct=Conduct(quiet=True, log_interval=10**9))
    return (steps - 1) * recipe.batch_size / (marks[1] - marks[0])


def measure(arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    data = photographs(max(4096, 2 * arguments.batch_size))
    rows = []
    for name in arguments.models:
        for operator in arguments.operators:
            for way, values in WAYS.items():
                for on_device in (False, True):
                    recipe = Recipe(
                        steps=2 * arguments.steps,
                        batch_size=arguments.batch_size,
                        train_crop_mode="pad",
                        data_on_device=on_device,
                        **values,
                    )
                    torch.manual_seed(0)
                    model = MODELS[name]()
                    if operator != "none":
                        model = spherify(
                            model, operator=operator, example_input=torch.zeros(2, 3, 32, 32), inplace=True
                        )
                    found = speed(model, data, recipe, arguments.steps, arguments.workers)
                    place = "on the device" if on_device else f"loader, {arguments.workers} workers"
                    rows.append((name, operator, way, place, f"{found:.0f}"))
                    print("  ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--operators", nargs="+", default=["none", "cosine"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(f"{device}, torch {torch.__version__}, batch {arguments.batch_size}", flush=True)
    rows = measure(arguments)
    if arguments.output is not None:
        with arguments.output.open("w", newline="") as file:
            csv.writer(file).writerows([(*COLUMNS, device), *rows])


if __name__ == "__main__":
    main()
