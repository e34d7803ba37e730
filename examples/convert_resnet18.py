"""Convert ResNet-18, save it, load it again, and look at a photograph through its angles.

    python examples/convert_resnet18.py --operator cosine --output resnet18-cosine

Needs scikit-learn and pillow, for the photograph: ``pip install spherify[train]``. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import spherify
from spherify.functional import conv_cosine
from spherify.layers import SphereConv2d

LAYERS = ("conv1", "layer4.1.conv2")  # the stem sees the pixels, the last convolution sees everything
NEAREST = 5
OPERATORS = ("cosine", "linear", "sigmoid", "learnable")


def main() -> None:
    arguments = read_arguments()
    torch.manual_seed(0)
    plain = timm.create_model("resnet18")

    print("1. The plan\n")
    plan = spherify.plan(plain, operator=arguments.operator, skip_shortcuts=True)
    print(plan)
    converted = plan.apply()

    print("\n2. The folder\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = spherify.save(converted, arguments.output or Path(scratch) / f"resnet18-{arguments.operator}")
        reloaded = spherify.load(folder)
        for file in sorted(folder.iterdir()):
            print(f"   {file.name:20} {file.stat().st_size:12,} bytes")
        print(f"   in {folder}{'' if arguments.output else ' (removed at the end; keep one with --output)'}")

    print(f"\n3. {arguments.photograph} through all three\n")
    image = read_photograph(arguments.photograph, plain)
    outputs = {
        name: logits_of(model, image)
        for name, model in (("original", plain), ("converted", converted), ("reloaded", reloaded))
    }
    for name, logits in outputs.items():
        print(f"   {name:10} mean {logits.mean():+8.4f}   deviation {logits.std():7.4f}   highest {logits.max():+8.4f}")
    difference = (outputs["converted"] - outputs["original"]).norm() / outputs["original"].norm()
    print(f"   relative difference of original and converted: {difference:.3f} (no weight is trained yet)")
    if not torch.equal(outputs["reloaded"], outputs["converted"]):
        sys.exit("The reloaded model does not answer as the converted one did.")
    print("   reloaded equals converted bit for bit")

    print("\n4. The filters with the smallest angle to some patch of the photograph\n")
    print(f"   {'layer':15} {'filter':>6} {'degrees':>8}   {'at row, column'}")
    for layer in LAYERS:
        for number, degrees, row, column in nearest_filters(converted, layer, image):
            print(f"   {layer:15} {number:6} {degrees:8.2f}   {row:6}, {column:6}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operator", default="cosine", choices=OPERATORS)
    parser.add_argument("--output", type=Path, help="folder to write (default: a temporary one)")
    parser.add_argument("--photograph", default="china.jpg", choices=("china.jpg", "flower.jpg"))
    return parser.parse_args()


def read_photograph(name: str, model: nn.Module) -> Tensor:
    """One of scikit-learn's photographs, cropped and normalised as timm does it for this model: (1, 3, 224, 224)."""
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    return transform(Image.fromarray(load_sample_image(name))).unsqueeze(0)


@torch.no_grad()
def logits_of(model: nn.Module, image: Tensor) -> Tensor:
    return model.eval()(image)


@torch.no_grad()
def nearest_filters(model: nn.Module, layer: str, image: Tensor) -> list[tuple[int, float, int, int]]:
    """Of the filters that come nearest to a patch: number, angle in degrees, row and column of the patch."""
    conv = model.get_submodule(layer)
    assert isinstance(conv, SphereConv2d)
    seen: list[Tensor] = []
    hook = conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits_of(model, image)
    hook.remove()
    cosine = conv_cosine(seen[0], conv.weight, stride=conv.stride, padding=conv.padding, eps=conv.eps)[0]
    best, place = cosine.flatten(1).max(dim=1)  # of each filter, over all patches
    columns = cosine.shape[2]
    return [
        (int(number), float(best[number].acos().rad2deg()), int(place[number]) // columns, int(place[number]) % columns)
        for number in best.topk(NEAREST).indices
    ]


if __name__ == "__main__":
    main()
