"""What calibration keeps of real pretrained networks: ``python -m benchmarks.calibration cifar --depth 20``."""

from __future__ import annotations

import argparse
import copy
import os
import resource
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torchvision
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.cifar_resnet import Block, CifarResNet
from spherify.calibrate.calibrate import calibrate
from spherify.calibrate.statistics import average_norms_
from spherify.convert import spherify
from spherify.data.sources import open_data
from spherify.models.checkpoint import load_checkpoint_

DATA = Path(os.environ.get("SPHERIFY_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data")
CIFAR_FILES = {20: "resnet20-12fca82f.th", 32: "resnet32-d509ac18.th", 44: "resnet44-014dd654.th"}
MOBILENETS = {0.25: ("mobilenetv1_025_128.pth", 128), 0.5: ("mobilenetv1_050_160.pth", 160)}


def folded(model: CifarResNet) -> CifarResNet:
    """The same function without BatchNorms."""
    model = copy.deepcopy(model)
    for owner in [model, *(block for block in model.modules() if isinstance(block, Block))]:
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if isinstance(getattr(owner, norm, None), nn.BatchNorm2d):
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
                setattr(owner, norm, nn.Identity())
    return model


def cifar(split: str, name: str = "cifar10-lossless-4k1k.npz") -> tuple[Tensor, Tensor]:
    images = open_data(str(DATA / "cifar10" / name)).split(split)
    pixels = np.stack([np.asarray(images[index][0]) for index in range(len(images))])
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.from_numpy(pixels).float() / 255 - mean) / deviation
    return x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(images.labels)


def imagenet(side: int) -> tuple[Tensor, Tensor]:
    """Scaled to side / 0.875, the middle cut out, in [-1, 1]."""
    split = open_data(str(DATA / "imagenet" / "imagenet-sample1000-256px-q90.npz")).train
    scaled, pictures = round(side / 0.875), []
    edge = (scaled - side) // 2
    for index in range(len(split)):
        image = split[index][0].resize((scaled, scaled), PIL.Image.Resampling.BICUBIC)
        pictures.append(np.asarray(image.crop((edge, edge, edge + side, edge + side))))
    x = torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1
    return x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(split.labels)


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [model(part).argmax(1) for part in images.split(100)]
    return 100 * torch.cat(right).eq(labels).float().mean().item()


def measure(arguments: argparse.Namespace) -> None:
    exclude: list[str] = []
    if arguments.network == "cifar":
        donor: nn.Module = CifarResNet(arguments.depth)
        load_checkpoint_(donor, DATA / "cifar10" / CIFAR_FILES[arguments.depth])
        donor = folded(donor.eval()) if arguments.folded else donor.eval()
        seen, test = cifar("train")[0][: arguments.images], cifar("test")
    else:
        file, side = MOBILENETS[arguments.width]
        donor = _gen_mobilenet_v1("mobilenetv1_100", arguments.width, fix_stem_head=False, pad_type="same").eval()
        load_checkpoint_(donor, DATA / "imagenet" / file)
        images, labels = imagenet(side)
        seen, test = images[:500], (images[500:], labels[500:])
        exclude = [] if arguments.all_convs else ["@depthwise"]
    exclude += arguments.exclude
    model = spherify(donor, operator=arguments.operator, k=arguments.k, exclude=exclude, example_input=seen[:2])
    truth, swapped = top1(donor, *test), top1(model, *test)
    started, busy = time.perf_counter(), time.process_time()
    how = {"refit_kept": not arguments.no_refit, "keep_worst": arguments.keep_worst}
    how |= {"output_solves": arguments.output_solves}
    report = calibrate(model, seen, arguments.method, donor=donor, **how)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    kept = top1(model, *test)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    name = f"{arguments.network} {arguments.depth if arguments.network == 'cifar' else arguments.width}"
    print(
        f"{name}{' folded' if arguments.folded else ''} {arguments.operator} {arguments.method}: donor {truth:.1f}, "
        f"swapped {swapped:.1f}, calibrated {kept:.1f} = {100 * kept / truth:.1f} % of the donor; "
        f"{seconds:.0f} s, {busy:.0f} s of CPU time, {peak:.1f} GB",
        *report.notes,
        sep="\n",
        flush=True,
    )
    if report.sensitivity is not None:
        print(f"taken back: {', '.join(report.kept)}\n{report.sensitivity}", flush=True)


def resnet50(arguments: argparse.Namespace) -> None:
    """Time and memory of a ResNet-50 at 224 pixels: random weights, BatchNorm statistics of the images."""
    images = imagenet(224)[0][: min(arguments.images, 256)]
    torch.manual_seed(0)
    donor = torchvision.models.resnet50(weights=None)
    average_norms_(donor, list(images[:64].split(16)))
    model = spherify(donor.eval(), operator=arguments.operator, k=arguments.k, example_input=images[:2])
    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    started, busy = time.perf_counter(), time.process_time()
    report = calibrate(model, images, arguments.method, donor=donor, output_solves=arguments.output_solves)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    assert report.logits is not None
    print(
        f"resnet50 {arguments.operator} {arguments.method}, {len(images)} images at 224 pixels: {seconds:.0f} s, "
        f"{busy:.0f} s of CPU time, {peak:.1f} GB ({at_start:.1f} before); error of the outputs "
        f"{100 * report.logits.error_before:.0f} % -> {100 * report.logits.error:.0f} %",
        *report.notes,
        sep="\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=["cifar", "mobilenet", "resnet50"])
    parser.add_argument("--depth", type=int, default=20, choices=CIFAR_FILES)
    parser.add_argument("--width", type=float, default=0.25, choices=MOBILENETS)
    parser.add_argument("--operator", default="cosine")
    parser.add_argument("--k", type=float)
    parser.add_argument("--method", default="transplant")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--folded", action="store_true", help="fold the donor's BatchNorms away first")
    parser.add_argument("--all-convs", action="store_true", help="convert depthwise convolutions too")
    parser.add_argument("--no-refit", action="store_true", help="leave plain layers as they are")
    parser.add_argument("--output-solves", type=int, default=8, help="linear solves of the outputs at the end")
    parser.add_argument("--keep-worst", type=int, default=0, help="take so many layers back to plain ones")
    parser.add_argument("--exclude", nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    resnet50(arguments) if arguments.network == "resnet50" else measure(arguments)


if __name__ == "__main__":
    main()
