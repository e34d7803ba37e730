"""The Triton kernels against the plain blocks; run by test_triton.py in Triton's interpreter, or on a GPU."""

import itertools
import sys

import torch

from spherify.functional import blocks, triton_kernels

FORMATS = ("contiguous", "channels_last", "linear")
OPERATORS = {"cosine": None, "linear": None, "sigmoid": 0.3, "learnable": torch.linspace(0.3, 1.5, 6)}
# Relative to the largest number; halves by their last bit, which the interpreter rounds in its own way.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tensor(*shape, seed, dtype=torch.float32, layout="contiguous", device="cpu"):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return values.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else values


def error(one, other):
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-6))


def problems(device, dtype, layout, groups, operator, has_gain):
    shape, trailing = ((9, 6), ()) if layout == "linear" else ((2, 6, 5, 7), (1, 1))
    where = dict(dtype=dtype, layout=layout, device=device)
    x, product, gradient = (tensor(*shape, seed=seed, **where) for seed in range(3))
    product *= 0.3
    by_filter = [tensor(6, *trailing, seed=seed, device=device) for seed in (3, 4, 5)]
    gain, bias, length = (by_filter[0], by_filter[1], by_filter[2].abs() + 0.5) if has_gain else (None, None, None)
    k = OPERATORS[operator]
    k = k.to(device).reshape(-1, *trailing) if isinstance(k, torch.Tensor) else k
    inverse = tensor(shape[0], groups, *shape[2:], seed=6, device=device).abs() + 0.5
    found = {"energy": error(triton_kernels.energy(x, groups), plain(blocks.energy_of, x, groups))}
    forward = (inverse, length, operator, k, gain, bias)
    answer = plain(blocks.normalise_and_respond_, product.clone(), *forward)
    found["forward"] = error(triton_kernels.normalise_and_respond_(product.clone(), *forward), answer)
    is_cosine = operator == "cosine"
    offset = bias if is_cosine else None
    saved = answer if is_cosine else plain(blocks.normalise_and_respond_, product.clone(), *forward[:4], None, None)
    backward = (gradient, saved, inverse, length, operator, k, gain, offset)
    needs_k = operator == "learnable"
    truth = plain(blocks.respond_backward, *backward, (True, True, True, True, needs_k))
    by_product, along, sums = triton_kernels.respond_backward(*backward)
    found |= {"product": error(by_product, truth.product), "along": error(along, truth.along)}
    found |= {"bias": error(sums[0], truth.bias), "filter": error(sums[3], truth.along_filter)}
    if not is_cosine:
        found["gain"] = error(sums[1], truth.gain)
    return [f"{dtype} {layout} {groups} {operator} {has_gain}: {name} {value:.1e}"
            for name, value in found.items() if not value <= TOLERANCE[dtype]]  # fmt: skip


def plain(function, *arguments):
    kept, blocks.kernels_for = blocks.kernels_for, lambda *tensors: None
    try:
        return function(*arguments)
    finally:
        blocks.kernels_for = kept


def all_problems(device, few=False):
    """``few``: every kernel, operator and layout once, and the halves once."""
    choices = list(itertools.product(TOLERANCE, FORMATS, (1, 2), OPERATORS, (False, True)))
    if few:
        layouts = {"cosine": FORMATS[0], "linear": FORMATS[1], "sigmoid": FORMATS[2], "learnable": FORMATS[1]}
        choices = [
            (torch.float32, layout, 1 + (layout != "linear"), operator, True) for operator, layout in layouts.items()
        ]
        choices += [(dtype, "contiguous", 1, "linear", False) for dtype in (torch.bfloat16, torch.float16)]
    return [line for choice in choices if not (choice[1] == "linear" and choice[2] == 2)
            for line in problems(device, *choice)]  # fmt: skip


if __name__ == "__main__":
    found = all_problems("cpu", few="--few" in sys.argv)
    print("\n".join(found))
    sys.exit(bool(found))
