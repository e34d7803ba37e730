"""Whether a folded layer should compute the activation behind it: single passes, and whole networks with and without.

``python -m benchmarks.fold_activation [MODEL ...]``. CPU time of this process, one thread.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherify.bench.timing import interleaved
from spherify.convert import spherify
from spherify.export import fold as folding
from spherify.functional.blocks import blocks
from spherify.models.resolve import build, resolve

SHAPE = (8, 256, 56, 56)
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": torch.ops.aten.gelu_.default,
}


def passes(activation: Callable[[Tensor], Tensor], product: Tensor) -> dict[str, Callable[[], object]]:
    """The folded cosine's two passes over a product, with an activation in each block, behind all, or without one."""
    inverse, bias = torch.rand(SHAPE[0], 1, *SHAPE[2:]), torch.randn(SHAPE[1], 1, 1)

    def in_blocks(after_block: Callable[[Tensor], object], after_all: Callable[[Tensor], object]) -> object:
        for block in blocks(product.normal_()):
            after_block(product[block].mul_(inverse[block]).add_(bias))
        return after_all(product)

    def nothing(x: Tensor) -> None:
        return None

    return {
        "without": lambda: in_blocks(nothing, nothing),
        "in each block": lambda: in_blocks(activation, nothing),
        "behind": lambda: in_blocks(nothing, activation),
    }


def folded_with_and_without(name: str) -> dict[str, nn.Module]:
    model = spherify(build(resolve(name)), operator="cosine").eval()
    taken_in = folding.takes_in
    forms = {"taken in": folding.fold(model)}
    folding.takes_in = lambda layer, behind: False
    try:
        forms["behind"] = folding.fold(model)
    finally:
        folding.takes_in = taken_in
    return forms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["timm:resnet18", "timm:resnet50", "timm:mobilenetv2_100"])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = dict(repeats=arguments.repeats, clock=time.process_time)
    with torch.inference_mode():
        for name, activation in IN_PLACE.items():
            found = interleaved(passes(activation, torch.empty(SHAPE)), **settings)
            rest = found["without"].least
            extra = {form: (found[form].least - rest) * 1e3 for form in ("in each block", "behind")}
            print(f"{name:10s} adds " + ", ".join(f"{ms:.2f} ms {form}" for form, ms in extra.items()), flush=True)
        for name in arguments.models:
            x = torch.randn(8, 3, 112, 112)
            forms = folded_with_and_without(name)
            steps = {form: functools.partial(model, x) for form, model in forms.items()}
            taken_in, behind = interleaved(steps, **settings).values()
            ratio, least = taken_in.ratio_to(behind), taken_in.ratio_of_least(behind)
            print(f"{name:24s} taken in / behind: {ratio:.3f} (least {least:.3f})", flush=True)


if __name__ == "__main__":
    main()
