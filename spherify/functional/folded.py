"""SphereConv for inference: filters made ready beforehand, patch norms shared by layers that read one tensor."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.functional import cpu_binding, cpu_kernels
from spherify.functional.blocks import blocks, energy_of, grouped
from spherify.functional.cosine import CONVOLUTIONS, box_sum, flat, padded, padding_at_both_ends, patch_energy, per_axis
from spherify.functional.cpu_convolve import convolved
from spherify.functional.curves import curve_of
from spherify.functional.fused import patch_inverse_norm, takes
from spherify.functional.responses import angle_from_equator

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "relu6": F.relu6, "gelu": F.gelu}
BOUNDS = {None: (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0), "gelu": (-math.inf, math.inf)}


class SharedNorms:
    """The norms of the last tensor that was asked about, for layers known to read the very same one.

    It holds the tensor weakly and knows it by identity and by its version, so that a change in place is seen. What
    it has found is not copied or pickled, nor kept under ``torch.compile``, which sees itself what is computed twice.
    """

    def __init__(self) -> None:
        self.found: tuple[Any, int, dict[Any, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"found": None}

    def get(self, x: Tensor, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        version = 0 if x.is_inference() else x._version
        found = self.found
        if found is None or found[0]() is not x or found[1] != version:
            found = (weakref.ref(x), version, {})
            self.found = found
        if key not in found[2]:
            found[2][key] = compute()
        return found[2][key]


def inverse_norms(
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    pads: list[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    power: float,
    shared: SharedNorms | None,
) -> Tensor:
    """``power`` / |patch|, (N, G, P, Q)."""
    is_eager = takes(x)
    store = shared if shared is not None and can_share(x) else None

    def energy() -> Tensor:
        return energy_of(x, groups) if is_eager and not needs_graph(x) else patch_energy(x, groups)

    def inverse() -> Tensor:
        if store is None and is_eager and not needs_graph(x) and all(before == after for before, after in pads):
            padding = [before for before, _ in pads]
            return patch_inverse_norm(x, window, list(stride), padding, list(dilation), groups, eps).mul_(power)
        found = energy() if store is None else store.get(x, groups, energy)
        if any(map(any, pads)):
            found = F.pad(found, flat(pads))
        return torch.rsqrt(box_sum(found, window, stride, dilation) + eps) * power

    if store is None:
        return inverse()
    return store.get(x, (groups, *window, *stride, *pads, *dilation, eps, power), inverse)


def served(x: Tensor, groups: int) -> bool:
    """Whether the CPU's kernels take this input: eager inference in float32."""
    return takes(x) and x.dim() <= 4 and not needs_graph(x) and cpu_binding.takes(x, groups)


Numbers = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups


def norms_by_kernel(
    x: Tensor, window: tuple[int, ...], numbers: Numbers, eps: float, power: float, shared: SharedNorms | None
) -> Tensor:
    """``power`` / |patch|, (N, G, P, Q). A norm of single pixels is shared by layers of any stride."""
    if shared is None:
        return cpu_kernels.patch_inverse_norm(x, window, *numbers, eps, power)
    stride, padding, dilation, groups = numbers
    is_sparse = is_pointwise(window, padding) and any(step != 1 for step in stride)

    def compute() -> Tensor:
        if not is_sparse:
            return cpu_kernels.patch_inverse_norm(x, window, *numbers, eps, power)
        dense = norms_by_kernel(x, window, ((1,) * len(stride), padding, dilation, groups), eps, power, shared)
        kept = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
        return dense[kept].contiguous()

    return shared.get(x, (window, numbers, eps, power), compute)


def is_pointwise(window: Sequence[int], padding: Sequence[int]) -> bool:
    return all(size == 1 for size in window) and not any(padding)


def normalises_input(
    operator: str, activation: str | None, channels: int, filters: int, window: Sequence[int], numbers: Numbers
) -> bool:
    """Whether the input is normalised: it has fewer numbers than the output, over which nothing else passes."""
    stride, padding, _, groups = numbers
    is_dense = is_pointwise(window, padding) and groups == 1 and all(step == 1 for step in stride)
    return operator == "cosine" and activation is None and is_dense and channels < filters


def normalised_input(
    x: Tensor, window: tuple[int, ...], numbers: Numbers, eps: float, power: float, shared: SharedNorms | None
) -> Tensor:
    """``x power / |x|`` at each pixel."""
    if shared is None:
        return cpu_kernels.normalised(x, eps, power)
    inverse = norms_by_kernel(x, window, numbers, eps, power, shared)
    return shared.get(x, ("normalised", eps, power), lambda: cpu_kernels.normalised(x, eps, power, inverse))


def can_share(x: Tensor) -> bool:
    """Whether norms may be kept for a second layer: in eager inference, and while ``torch.export`` runs the model."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_dynamo_compiling()
    return takes(x) and not needs_graph(x)


def needs_graph(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def folded_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    *,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    operator: str,
    steepness: float | Tensor | None,
    eps: float,
    power: float,
    shared: SharedNorms | None,
    activation: str | None = None,
) -> Tensor:
    """``scale g(theta) + bias`` with ``weight`` holding unit filters over ``power``; for the cosine, times the scale.

    Args:
        x: (N, C, H, W).
        steepness: 1 / 2k of sigmoid and learnable: a number, or (O,) numbers.
        activation: what follows: relu, relu6, gelu, or None.
        The others are as in ``sphere_conv2d``.

    Returns:
        (N, O, P, Q), in the type of the plain convolution.
    """
    dims = weight.dim() - 2
    is_unbatched = x.dim() == dims + 1
    x = x[None] if is_unbatched else x
    window = weight.shape[2:]
    stride, dilation = per_axis(stride, dims, "stride"), per_axis(dilation, dims, "dilation")
    pads = padding_at_both_ends(padding, window, stride, dilation)
    x, pads, padding = padded(x, pads, padding, padding_mode)
    numbers = (tuple(stride), tuple(before for before, _ in pads), tuple(dilation), groups)
    by_kernels = all(before == after for before, after in pads) and served(x, groups)
    if by_kernels and normalises_input(operator, activation, weight.shape[1], weight.shape[0], window, numbers):
        unit = normalised_input(x, tuple(window), numbers, eps, power, shared)
        out = CONVOLUTIONS[dims](unit, weight, bias, stride, padding, dilation, groups)
        return out[0] if is_unbatched else out
    if by_kernels and shared is None and dims == 2:
        values, arguments = arguments_of(operator, steepness, scale, bias, activation)
        found = convolved(x, weight, numbers, operator, values, eps=eps, power=power, **arguments)
        if found is not None:
            return found[0] if is_unbatched else found
    if by_kernels:
        inverse = norms_by_kernel(x, tuple(window), numbers, eps, power, shared)
    else:
        inverse = inverse_norms(x, window, stride, pads, dilation, groups, eps, power, shared)
    product = CONVOLUTIONS[dims](x, weight, None, stride, padding, dilation, groups)
    out = finish(product, inverse, operator, steepness, scale, bias, activation, by_kernels)
    return out[0] if is_unbatched else out


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    *,
    operator: str,
    steepness: float | Tensor | None,
    eps: float,
    power: float,
    shared: SharedNorms | None,
    activation: str | None = None,
) -> Tensor:
    """``folded_conv`` for (..., D) and (O, D)."""

    given = x.reshape(-1, x.shape[-1])
    by_kernels = served(given, 1)
    if by_kernels and operator == "cosine" and x.shape[-1] < 2 * weight.shape[0]:
        # fewer numbers in the input than passes over the output would touch, and the product adds the bias itself
        def unit() -> Tensor:
            return cpu_kernels.normalised(given, eps, power).view(x.shape)

        out = F.linear(unit() if shared is None else shared.get(x, ("rows", eps, power), unit), weight, bias)
        return out if activation is None else activated_(out, activation)

    def inverse() -> Tensor:
        if by_kernels:
            return cpu_kernels.patch_inverse_norm(given, (), (), (), (), 1, eps, power)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if takes(x) and not needs_graph(x):
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            return length.square_().add_(eps).rsqrt_().mul_(power)
        return torch.rsqrt((wide * wide).sum(-1, keepdim=True) + eps) * power

    found = inverse() if shared is None or not can_share(x) else shared.get(x, (eps, power), inverse)
    product = F.linear(x, weight)
    flat, norms = product.reshape(-1, weight.shape[0]), found.reshape(-1, 1)
    rows = finish(flat, norms, operator, steepness, scale, bias, activation, by_kernels)
    return rows.view(*x.shape[:-1], weight.shape[0])


def finish(
    product: Tensor,
    inverse: Tensor,
    operator: str,
    steepness: float | Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    by_kernels: bool,
) -> Tensor:
    """What is left after the product, in place where nobody looks. ``by_kernels``: they have taken the input."""
    groups = inverse.shape[1]
    is_taken = by_kernels and not product.requires_grad and cpu_binding.takes(product, groups)
    if is_taken and cpu_binding.fits(product, inverse):
        values, arguments = arguments_of(operator, steepness, scale, bias, activation)
        cpu_kernels.normalise_and_respond_(product, inverse, operator, values, **arguments)
        return product
    dims = product.dim() - 2
    scale, bias = by_filter(scale, inverse.dtype, dims), by_filter(bias, inverse.dtype, dims)
    steep = by_filter(steepness, inverse.dtype, dims) if isinstance(steepness, Tensor) else steepness
    if not takes(product) or product.requires_grad or product.dtype != inverse.dtype:
        cosine = (grouped(product, inverse.shape[1]) * inverse.unsqueeze(2)).flatten(1, 2)
        out = responded(cosine, operator, steep, scale, bias).to(product.dtype)
        return out if activation is None else ACTIVATIONS[activation](out)
    for block in blocks(product):
        part = product[block]
        grouped(part, groups).mul_(inverse[block].unsqueeze(2))
        if operator != "cosine":
            guard = 1.0 - torch.finfo(part.dtype).eps
            part.clamp_(-guard, guard).asin_()
            if steep is not None:  # 2 sigmoid(2x) - 1 is tanh(x) to 6e-8, at a fifth of its time on the CPU
                part.mul_(steep * 2.0).sigmoid_().mul_(2.0).sub_(1.0)
        if scale is not None:
            part.mul_(scale)
        if bias is not None:
            part.add_(bias)
        if activation is not None:
            activated_(part, activation)
    return product


def arguments_of(
    operator: str,
    steepness: float | Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
) -> tuple[dict[str, cpu_kernels.ByFilter], dict[str, Any]]:
    """What the kernels are told of a response: the values of each filter, and the rest by name."""
    low, high = BOUNDS[activation]
    guard = math.inf if operator == "cosine" else None
    curve = curve_of(operator, steepness)
    values: dict[str, cpu_kernels.ByFilter] = dict(gain=scale, bias=bias, steep=steepness)
    return values, dict(guard=guard, low=low, high=high, curve=curve, is_gelu=activation == "gelu")


def activated_(out: Tensor, activation: str) -> Tensor:
    """In place where nobody looks."""
    if activation != "gelu":
        return out.clamp_(*BOUNDS[activation])
    if out.requires_grad:
        return F.gelu(out)
    return cpu_kernels.gelu_(out) if cpu_binding.takes(out, 1) else out.copy_(F.gelu(out))


def by_filter(value: Tensor | None, dtype: torch.dtype, dims: int) -> Tensor | None:
    return None if value is None else value.to(dtype).view(-1, *[1] * dims)


def responded(
    cosine: Tensor, operator: str, steep: float | Tensor | None, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    out = cosine
    if operator != "cosine":
        out = angle_from_equator(cosine)
        out = out if steep is None else torch.tanh(out * steep)
    out = out if scale is None else out * scale
    return out if bias is None else out + bias
