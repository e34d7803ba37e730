"""What angular heads do to features: a network with a two-dimensional feature, trained on digits with several heads.

    python examples/feature_plot.py                        # MNIST from SPHERIFY_DATA or ../shared/data, about 4 minutes
    python examples/feature_plot.py --data mnist.npz       # another file, with x_train/y_train or train_images/...
    python examples/feature_plot.py --data digits          # scikit-learn's small digits, without any file

Needs ``pip install spherify[plot]``.
"""

from __future__ import annotations

import argparse
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spherify import parameter_groups, spherify
from spherify.heads import MarginSchedule, criterion

MNIST = Path("mnist") / "mnist.npz"
GENTLE = MarginSchedule(base=100.0, gamma=0.2, power=1.0, lambda_min=1.0)
HEADS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "w-softmax (cosine)": dict(head="w-softmax"),
    "ga-softmax, cosine (a-softmax)": dict(head="ga-softmax", head_operator="cosine"),
    "ga-softmax, linear": dict(head="ga-softmax", head_operator="linear"),
    "ga-softmax, sigmoid k=0.3": dict(head="ga-softmax", head_operator="sigmoid", head_k=0.3),
}


def data(given: str | None, count: int) -> tuple[Tensor, Tensor]:
    """(N, 1, H, W) in [-1, 1] and labels: MNIST where it can be found, else scikit-learn's digits."""
    folder = Path(os.environ.get("SPHERIFY_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = folder / MNIST if given is None else Path(given)
    if given != "digits" and path.is_file():
        with np.load(path) as pack:
            labels = pack["train_labels"] if "train_labels" in pack else pack["y_train"]
            images = next(
                read(pack[key], len(labels)) for key in ("train_images", "x_train", "train_png") if key in pack
            )
        pixels = torch.tensor(images[:count], dtype=torch.float32)[:, None]
        return pixels / 127.5 - 1.0, torch.tensor(labels[:count]).long()
    if given not in (None, "digits"):
        raise SystemExit(f"{given} is no file; give an .npz, or 'digits'.")
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    return nn.functional.interpolate(pixels, size=28, mode="bilinear"), torch.tensor(found.target)


def read(stored: np.ndarray, count: int) -> np.ndarray:
    """(N, H, W); what has one dimension is a PNG with the images one below the other."""
    if stored.ndim > 1:
        return stored
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    picture = np.asarray(Image.open(io.BytesIO(stored.tobytes())))
    return picture.reshape(count, picture.shape[1], picture.shape[1])


def network(features: int = 2) -> nn.Sequential:
    """Three stages, a feature of two numbers, and a classifier."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(width), nn.PReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, features), nn.Linear(features, 10))


def train(options: dict[str, Any], images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = network()
    if options:  # the classifier alone; the body stays a plain network
        model = spherify(model, include="@head", example_input=images[:2], inplace=True, **options)
    loss_of = criterion(model, schedule=GENTLE if "ga-softmax" in options.values() else "none")
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=1e-4))
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // 128 * 128].view(-1, 128):
            loss = loss_of(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_of.step()
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Features, class weights, angle of each feature to its class's weight in degrees, accuracy in percent."""
    body, classifier = model[:-1], model[-1]  # type: ignore[index]
    features = torch.cat([body(part) for part in images.split(500)])
    weight = classifier.weight.detach()
    cosine = nn.functional.cosine_similarity(features, weight[labels])
    right = (classifier(features).argmax(1) == labels).float().mean()
    return features, weight, torch.rad2deg(torch.acos(cosine.clamp(-1, 1))), 100.0 * float(right)


def draw(results: dict[str, tuple[Tensor, Tensor, Tensor, float]], labels: Tensor, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13.5, 9.2), constrained_layout=True)
    colours = [pyplot.get_cmap("tab10")(digit) for digit in range(10)]
    for axis, (name, (features, weight, angles, accuracy)) in zip(axes.flat, results.items(), strict=False):
        reach = float(features.norm(dim=1).quantile(0.995)) * 1.08
        for digit in range(10):
            of_class = features[labels == digit]
            axis.scatter(of_class[:, 0], of_class[:, 1], s=2, color=colours[digit], alpha=0.5, linewidths=0)
            direction = weight[digit] / weight[digit].norm() * reach
            axis.plot([0, direction[0]], [0, direction[1]], color=colours[digit], linewidth=1.2)
            axis.annotate(
                str(digit),
                (1.06 * direction[0], 1.06 * direction[1]),
                ha="center",
                va="center",
                color=colours[digit],
                weight="bold",
                annotation_clip=False,
            )
        axis.set(xlim=(-1.15 * reach, 1.15 * reach), ylim=(-1.15 * reach, 1.15 * reach), aspect="equal")
        axis.set_title(
            f"{name}\ntest {accuracy:.1f} %, angle to own class: median {float(angles.median()):.1f} deg", fontsize=10
        )
        axis.grid(alpha=0.2)
    last = axes.flat[-1]
    for name, (_, _, angles, _) in results.items():
        last.plot(angles.sort().values, np.linspace(0, 100, len(angles)), label=name)
    last.set(
        xlim=(0, 40),
        ylim=(0, 100),
        xlabel="angle to the weight of the own class (degrees)",
        ylabel="test images within that angle (%)",
        title="how narrow the classes are",
    )
    last.legend(loc="lower right")
    last.grid(alpha=0.2)
    figure.savefig(output, dpi=70)
    print(f"Wrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an .npz, or 'digits'")
    parser.add_argument("--images", type=int, default=12000, help="how many are used; the last sixth is for the test")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("features.png"))
    given = parser.parse_args()
    images, labels = data(given.data, given.images)
    kept = math.ceil(len(images) * 5 / 6)
    results = {}
    for name, options in HEADS.items():
        model = train(options, images[:kept], labels[:kept], given.epochs)
        results[name] = measured(model, images[kept:], labels[kept:])
        print(f"{name}: test {results[name][3]:.1f} %, median angle {float(results[name][2].median()):.1f} degrees")
    draw(results, labels[kept:], given.output)


if __name__ == "__main__":
    main()
