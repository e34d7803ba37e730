"""The Triton kernels against the plain blocks; run by test_triton.py in Triton's interpreter, or on a GPU."""

import itertools
import sys

import torch

from spherify.functional import blocks, eager, filters, fused, triton_kernels
from spherify.functional.plain import plain_sphere

FORMATS = ("contiguous", "channels_last", "linear")
OPERATORS = {"cosine": None, "linear": None, "sigmoid": 0.3, "learnable": torch.linspace(0.3, 1.5, 6)}
# Relative to the largest number; halves by their last bit, which the interpreter rounds in its own way.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tensor(*shape, seed, dtype=torch.float32, layout="contiguous", device="cpu"):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return values.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else values


def error(one, other):
    return float(
        (one.double() - other.double()).detach().abs().max() / other.detach().double().abs().max().clamp_min(1e-6)
    )


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
    found |= {"bias": error(sums[0], truth.bias), "filter": error(sums[1], truth.along_filter)}
    if not is_cosine:
        found["gain"] = error(sums[2], truth.gain)
    return [f"{dtype} {layout} {groups} {operator} {has_gain}: {name} {value:.1e}"
            for name, value in found.items() if not value <= TOLERANCE[dtype]]  # fmt: skip


def with_kernels(kernels_for, function, *arguments):
    """Call it with these kernels instead of the device's."""
    modules = (blocks, filters, fused)
    kept = [module.kernels_for for module in modules]
    try:
        for module in modules:
            module.kernels_for = kernels_for
        return function(*arguments)
    finally:
        for module, was in zip(modules, kept, strict=True):
            module.kernels_for = was


def plain(function, *arguments):
    return with_kernels(lambda *tensors: None, function, *arguments)


def by_kernels(function, *arguments):
    def kernels_for(*tensors):
        assert all(map(triton_kernels.takes, tensors))
        return triton_kernels

    return with_kernels(kernels_for, function, *arguments)


# x, weight, stride, padding, dilation, groups
LAYERS = {
    "3x3": ((2, 6, 7, 9), (8, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "wide": ((1, 150, 3, 5), (140, 150, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strided 1x1": ((2, 6, 7, 9), (8, 6, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "stem": ((2, 3, 13, 12), (5, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "uneven": ((2, 8, 9, 8), (6, 4, 3, 2), (2, 1), (2, 0), (2, 3), 2),
    "groups": ((2, 8, 6, 5), (12, 4, 3, 3), (1, 2), (1, 1), (1, 1), 2),
    "depthwise": ((2, 40, 6, 5), (40, 1, 3, 3), (2, 1), (1, 1), (1, 1), 40),
    "depthwise, two filters each": ((2, 5, 6, 5), (10, 1, 3, 3), (1, 1), (1, 1), (1, 1), 5),
    "one channel": ((2, 1, 6, 5), (1, 1, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "sequence": ((2, 6, 11), (8, 3, 3), (2,), (1,), (2,), 2),
    "linear": ((70, 10), (33, 10), (), (), (), 1),
}


def problems_of_layer(device, name, operator, layout, dtype=torch.float32):
    """Output and gradients of the whole operator by the kernels, against the plain operations in float64."""
    shape, rows, stride, padding, dilation, groups = LAYERS[name]
    where = dict(device=device, layout=layout if len(shape) == 4 else "contiguous")
    k = OPERATORS[operator]
    k = torch.linspace(0.3, 1.5, rows[0]) if isinstance(k, torch.Tensor) else k
    leaves = [tensor(*shape, seed=1, dtype=dtype, **where), tensor(*rows, seed=2, dtype=dtype, **where)]
    leaves += [tensor(rows[0], seed=seed, device=device) for seed in (3, 4)]
    leaves += [k.to(device)] if isinstance(k, torch.Tensor) else []
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    window = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)

    def fast():
        x, weight, bias, gain, *softness = leaves
        numbers = (list(stride), list(padding), list(dilation), groups, operator, 0.0 if softness else k or 0.0, 1e-6)
        softness = softness[0] if softness else None
        out = eager.SphereProduct.apply(x, weight, bias, gain, softness, *numbers, dtype)
        return out, torch.autograd.grad((out.double() * slope).sum(), leaves)

    x, weight, bias, gain, *softness = exact
    softness = softness[0] if softness else k
    truth = plain_sphere(x, weight, bias, operator, softness, 1e-6, gain, {**window, "padding_mode": "zeros"})
    slope = tensor(*truth.shape, seed=6, dtype=torch.float64, **where)
    by_hand = torch.autograd.grad((truth * slope).sum(), exact)
    serves, eager.cpu_training.forward = eager.cpu_training.forward, lambda *arguments, **named: None
    divides, fused.is_safe_divisor = fused.is_safe_divisor, lambda gain: False  # as on a GPU
    try:
        out, gradients = by_kernels(fast)
    finally:
        eager.cpu_training.forward, fused.is_safe_divisor = serves, divides
    which = ("output", "x", "weight", "bias", "gain", "k")
    pairs = dict(zip(which, zip((out, *gradients), (truth, *by_hand), strict=True), strict=False))
    limit = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    return [f"{name} {operator} {layout} {dtype}: {which} {error(*pair):.1e}"
            for which, pair in pairs.items() if not error(*pair) <= limit]  # fmt: skip


def all_problems(device, few=False):
    """``few``: every kernel, operator and layout once, and the halves once."""
    choices = list(itertools.product(TOLERANCE, FORMATS, (1, 2), OPERATORS, (False, True)))
    if few:
        layouts = {"cosine": FORMATS[0], "linear": FORMATS[1], "sigmoid": FORMATS[2], "learnable": FORMATS[1]}
        choices = [
            (torch.float32, layout, 1 + (layout != "linear"), operator, True) for operator, layout in layouts.items()
        ]
        choices += [(dtype, "contiguous", 1, "linear", False) for dtype in (torch.bfloat16, torch.float16)]
    found = [] if triton_kernels.works(device) else ["works: no"]
    found += [line for choice in choices if not (choice[1] == "linear" and choice[2] == 2)
             for line in problems(device, *choice)]  # fmt: skip
    operators = itertools.cycle(OPERATORS) if few else None
    for name, layout in itertools.product(LAYERS, FORMATS[:2]):
        for operator in [next(operators)] if operators else OPERATORS:
            found += problems_of_layer(device, name, operator, layout)
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("3x3", "depthwise", "linear"):
            found += problems_of_layer(device, name, "cosine", "channels_last", dtype)
    return found


if __name__ == "__main__":
    found = all_problems("cpu", few="--few" in sys.argv)
    print("\n".join(found))
    sys.exit(bool(found))
