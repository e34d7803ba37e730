"""GA-Softmax with m = 4 from scratch on the paper's nine-layer network: loss and test accuracy, epoch by epoch.

python -m benchmarks.ga_softmax --data digits
python -m benchmarks.ga_softmax --data cifar10 --epochs 8      # SPHERIFY_DATA or ../shared/data
"""

from __future__ import annotations

import argparse
import io
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from spherify import parameter_groups, spherify
from spherify.heads import MarginSchedule, criterion

SCHEDULES = {
    "none": MarginSchedule(),
    "gentle": MarginSchedule(base=100.0, gamma=0.1, power=1.0),
    "short": MarginSchedule(base=100.0, gamma=0.1, power=2.0),  # for hundreds of steps, not thousands
}


def digits() -> tuple[Tensor, ...]:
    """scikit-learn's 1,797 digits of 8x8; every fifth is for the test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    labels = torch.tensor(found.target)
    is_test = torch.arange(len(labels)) % 5 == 0
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def cifar10() -> tuple[Tensor, ...]:
    """4,000 training and 1,000 test images of CIFAR-10, true pixels: PNGs with the images one below the other."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    folder = Path(os.environ.get("SPHERIFY_DATA") or Path(__file__).parents[2] / "shared" / "data")
    found: list[Tensor] = []
    with np.load(folder / "cifar10" / "cifar10-lossless-4k1k.npz") as pack:
        for part in ("train", "test"):
            pixels = np.array(Image.open(io.BytesIO(pack[f"{part}_png"].tobytes()))).reshape(-1, 32, 32, 3)
            found += [
                torch.tensor(pixels).permute(0, 3, 1, 2) / 128.0 - 1.0,
                torch.tensor(pack[f"{part}_labels"]).long(),
            ]
    return tuple(found)


def cnn9(channels: int, widths: tuple[int, int, int], side: int, with_norm: bool) -> nn.Sequential:
    """Three stages of three 3x3 convolutions with BatchNorm and ReLU, and a fully connected layer.

    Without a norm behind that layer the feature is a vector of responses, as in the authors' last code: short at
    first, and nothing can shrink it. With one, as in their first code, it is long and learns faster, but a margin
    that comes too early shrinks it to nothing.
    """
    layers: list[nn.Module] = []
    for width in widths:
        for _ in range(3):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    features = channels * (side // 8) ** 2
    layers += [nn.Flatten(), nn.Linear(features, 256, bias=False)]
    layers += [nn.BatchNorm1d(256), nn.ReLU()] if with_norm else []
    return nn.Sequential(*layers, nn.Linear(256, 10))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [
        (model(part).argmax(1) == truth).sum() for part, truth in zip(images.split(250), labels.split(250), strict=True)
    ]
    model.train()
    return 100.0 * float(sum(right)) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--head-operator", default="linear")
    parser.add_argument("--margin", type=float, default=4.0)
    parser.add_argument("--schedule", choices=SCHEDULES, default="short")
    parser.add_argument("--feature-norm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--widths", type=int, nargs=3, default=(16, 24, 32))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    images, labels, test_images, test_labels = digits() if given.data == "digits" else cifar10()
    model = spherify(
        cnn9(images.shape[1], tuple(given.widths), images.shape[-1], given.feature_norm),
        operator="linear",
        head="ga-softmax",
        head_operator=given.head_operator,
        margin=given.margin,
        gain="none",
        example_input=images[:2],
        inplace=True,
    )
    loss_of = criterion(model, schedule=SCHEDULES[given.schedule])
    optimizer = torch.optim.Adam(parameter_groups(model, weight_decay=0.0), lr=given.lr)
    steps = given.epochs * (len(images) // 64)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.lr, total_steps=steps)
    started = time.time()
    for epoch in range(given.epochs):
        total, order = 0.0, torch.randperm(len(images))
        for batch in order[: len(images) // 64 * 64].view(-1, 64):
            loss = loss_of(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            loss_of.step()
            total += float(loss.detach())
        found = accuracy(model, test_images, test_labels)
        mean = total / (len(images) // 64)
        print(
            f"epoch {epoch + 1:2}: loss {mean:7.4f}, margin share {float(loss_of.share):.3f}, "
            f"test {found:.2f} %, {time.time() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
