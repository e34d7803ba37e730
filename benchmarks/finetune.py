"""Fine-tuning CIFAR ResNet-20 from several starts, the same steps each: ``python -m benchmarks.finetune``."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.calibration import CIFAR_FILES, DATA, cifar, top1
from benchmarks.cifar_resnet import CifarResNet
from spherify.calibrate.anneal import Annealing, divergence_at
from spherify.calibrate.calibrate import calibrate
from spherify.convert import spherify
from spherify.models.checkpoint import load_checkpoint_

STARTS = ("scratch", "swapped", "statistics", "transplant", "reconstruct", "together", "progressive")
FILES = {"jpeg": "cifar10-jpegpack.npz", "true": "cifar10-lossless-4k1k.npz"}
BATCH = 128


def started(start: str, donor: nn.Module, seen: Tensor, cache: Path | None) -> nn.Module:
    """The network before its first step; a calibrated one is kept in ``cache`` and taken from there."""
    if start == "scratch":
        return spherify(CifarResNet(20), example_input=seen[:2])
    model = spherify(donor, example_input=seen[:2])
    if start not in ("statistics", "transplant", "reconstruct"):
        return model
    file = None if cache is None else cache / f"resnet20-{start}-{len(seen)}.pt"
    if file is not None and file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    calibrate(model, seen, start, donor=donor)
    if file is not None:
        torch.save(model.state_dict(), file)
    return model


def augmented(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored at random, and shifted by up to 4 pixels over a border of zeros, as the donor was trained."""
    side = batch.shape[-1]
    mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
    wide = F.pad(torch.where(mirrored, batch.flip(3), batch), (4, 4, 4, 4))
    places = torch.randint(0, 9, (len(batch), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(wide, places, strict=True)])


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    donor: nn.Module,
    start: str,
    rate: float,
    given: argparse.Namespace,
) -> None:
    """SGD along a cosine; the images are gone through in a new order each time."""
    generator = torch.Generator().manual_seed(given.seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=given.decay, nesterov=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, given.steps)
    annealing = Annealing(model, schedule=start) if start in ("together", "progressive") else None
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    with contextlib.nullcontext() if annealing is None else annealing:
        for number in range(given.steps):
            if annealing is not None:
                annealing.on_step(number, given.steps)
            if len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(images), generator=generator)])
            chosen, order = order[:BATCH], order[BATCH:]
            batch = augmented(images[chosen], generator)
            outputs = model(batch)
            loss = (1 - given.distill) * F.cross_entropy(outputs, labels[chosen])
            if given.distill:
                with torch.no_grad():
                    wanted = donor(batch)
                loss = loss + given.distill * divergence_at(given.temperature, outputs, wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            falling.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", nargs="*", default=[start for start in STARTS if start != "reconstruct"])
    parser.add_argument("--images", default="jpeg", choices=FILES, help="50,000 as JPEG, or 4,000 true ones")
    parser.add_argument("--steps", type=int, default=391, help="of 128 images")
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--scratch-rate", type=float, default=0.1)
    parser.add_argument("--decay", type=float, default=1e-4)
    parser.add_argument("--distill", type=float, default=0.0, help="share of the donor's answers in the loss")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--seen", type=int, default=1000, help="images the start is calibrated with")
    parser.add_argument(
        "--held-out", type=int, default=0, help="test on so many training images instead, not trained on"
    )
    parser.add_argument("--cache", type=Path, help="folder for calibrated starts")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    images, labels = cifar("train", FILES[given.images])
    test = cifar("test", FILES[given.images])
    if given.held_out:
        cut = len(images) - given.held_out
        test, images, labels = (images[cut:], labels[cut:]), images[:cut], labels[:cut]
    donor = CifarResNet(20).eval()
    load_checkpoint_(donor, DATA / "cifar10" / CIFAR_FILES[20])
    print(f"donor {top1(donor, *test):.2f} on {len(test[0])} images", flush=True)
    for start in given.starts:
        torch.manual_seed(given.seed)
        model = started(start, donor, images[: given.seen], given.cache)
        before, busy = top1(model, *test), time.process_time()
        rate = given.scratch_rate if start == "scratch" else given.rate
        train(model, images, labels, donor, start, rate, given)
        busy = time.process_time() - busy
        print(
            f"{start}: {before:.2f} -> {top1(model, *test):.2f} after {given.steps} steps, rate {rate:g}, "
            f"distilled {given.distill:g}, {busy:.0f} s of CPU time",
            flush=True,
        )


if __name__ == "__main__":
    main()
