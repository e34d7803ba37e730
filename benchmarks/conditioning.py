"""Where a converted model loses digits: each convolution's distance from float64, and how small its patches are.

``python -m benchmarks.conditioning [MODEL] [--operator cosine]``. BatchNorms get small random running statistics.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.bench.compare import Settings, images_for
from spherify.convert import spherify
from spherify.layers import SphereConv2d
from spherify.models.resolve import build, resolve


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


def calls_of(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each SphereConv2d, by path, in the order in which they ran."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str) -> Any:
        return lambda module, args, output: found.update({path: (args[0].clone(), output.clone())})

    for path, module in model.named_modules():
        if isinstance(module, SphereConv2d):
            module.register_forward_hook(note(path))
    model(x)
    return found


def patch_lengths(layer: SphereConv2d, x: Tensor) -> Tensor:
    ones = x.new_ones(layer.groups, *layer.weight.shape[1:])
    padded, padding = layer.padded(x)
    return F.conv2d(padded * padded, ones, None, layer.stride, padding, layer.dilation, layer.groups).sqrt()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="timm:ghostnet_050")
    parser.add_argument("--operator", default="cosine")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    plain = build(resolve(arguments.model))
    x = images_for(plain, Settings(batch=2))
    model = spherify(plain, operator=arguments.operator, example_input=x, inplace=True).eval()
    for part in model.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.normal_(0, 0.02)
            part.running_var.uniform_(0.01, 0.1)
    wide = copy.deepcopy(model).double()
    narrow_calls, wide_calls = calls_of(model, x), calls_of(wide, x.double())
    print(
        "layer, groups: distance from float64 of its input and its output; shares of patches of length 0 and below 0.1"
    )
    for path, (taken, given) in wide_calls.items():
        layer = wide.get_submodule(path)
        assert isinstance(layer, SphereConv2d)
        lengths = patch_lengths(layer, taken)
        nothing, little = (lengths == 0).double().mean(), (lengths < 0.1).double().mean()
        print(
            f"{path:40s} {layer.groups:4d}: {distance(narrow_calls[path][0], taken):.1e} "
            f"{distance(narrow_calls[path][1], given):.1e}; {nothing:.3f} {little:.3f}"
        )


if __name__ == "__main__":
    main()
