"""Folded layers on the CPU in few steps: what does not depend on an input's numbers is made once for its shape."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.functional import cpu_binding, cpu_kernels
from spherify.functional.cosine import CONVOLUTIONS
from spherify.functional.curves import curve_of, prepare
from spherify.functional.folded import BOUNDS, SharedNorms, finish, needs_graph, served
from spherify.functional.fused import takes

ByFilter = float | Tensor | None
Constants = tuple[Tensor | None, Tensor | None, ByFilter]  # bias, scale, steepness
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
MOST_WAYS = 16  # of a layer; images of many sizes must not fill the memory


class QuickCalls:
    """How a folded layer was computed for the shapes of input it has met. Nothing of it is copied or pickled."""

    def __init__(self) -> None:
        self.ways: dict[Any, Run] = {}
        self.met: Any = None
        self.softness: tuple[Any, Tensor] | None = None

    def __reduce__(self) -> tuple[type[QuickCalls], tuple[()]]:
        return QuickCalls, ()

    def way_for(self, x: Tensor, weight: Tensor, *constants: ByFilter) -> Run | None:
        """What serves such an input, if it is known, with constants (bias, scale, steepness) lying where they lie."""
        if not takes(x) or needs_graph(x) or torch.is_autocast_enabled("cpu"):
            return None
        return self.ways.get(key_of(x, weight, constants))

    def remember(
        self, x: Tensor, weight: Tensor, *constants: ByFilter, groups: int, make: Callable[[], Run | None]
    ) -> None:
        """Keep what ``make`` makes for such an input when it comes the second time in a row."""
        rows = x if x.dim() == weight.dim() else x.reshape(-1, x.shape[-1])
        if torch.is_autocast_enabled("cpu") or not served(rows, groups) or not all(map(is_ready, constants)):
            return
        key = key_of(x, weight, constants)
        if self.met != key:
            self.met = key
        elif (way := make()) is not None:
            if len(self.ways) >= MOST_WAYS:
                self.ways = {}
            self.ways[key] = way

    def steepness(self, logit: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """``compute(logit)``, once as long as the logit stays what it is."""
        if not takes(logit) or logit.is_inference():
            return compute(logit)
        key = (logit.data_ptr(), logit._version, logit.dtype, logit.shape)
        held = self.softness
        if held is None or held[0] != key:
            held = self.softness = (key, compute(logit))
            prepare(held[1])
        return held[1]


def key_of(x: Tensor, weight: Tensor, constants: tuple[ByFilter, ...]) -> tuple[Any, ...]:
    places = (value.data_ptr() if isinstance(value, Tensor) else value for value in constants)
    return x.shape, x.stride(), x.dtype, weight.shape, weight.dtype, torch.get_num_threads(), *places


def is_ready(value: ByFilter) -> bool:
    """Whether the kernels read the very numbers that lie there, not a copy."""
    if not isinstance(value, Tensor):
        return True
    return value.device.type == "cpu" and value.dtype == torch.float32 and value.is_contiguous() and value.numel() > 1


def ready_response(
    product: Tensor, inverse: Tensor, operator: str, constants: Constants, activation: str | None
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """``finish`` for products and norms that lie as these do: of (product, inverse), in place."""
    groups = inverse.shape[1]
    filters = product.shape[1]
    fit = cpu_binding.takes(product, groups) and cpu_binding.fits(product, inverse)
    if not fit or any(isinstance(value, Tensor) and value.numel() != filters for value in constants):
        return None
    bias, scale, steep = constants
    guard = torch.inf if operator == "cosine" else cpu_kernels.guard_of(operator)
    low, high = BOUNDS[activation]
    values = dict(gain=scale, bias=bias, steep=steep)
    described, alive = cpu_kernels.elementwise(
        product, inverse, operator, values, guard=guard, low=low, high=high, curve=curve_of(operator, steep)
    )
    kernels = cpu_binding.library()
    assert kernels is not None
    forward, template, strides = kernels.forward, bytes(described), product.stride()
    copied, by_reference = cpu_binding.Elementwise.from_buffer_copy, ctypes.byref
    kept = [value for value in alive[1:] if not any(value is given for given in constants)]  # those made here

    def respond_(product: Tensor, inverse: Tensor) -> Tensor:
        if product.requires_grad or product.dtype != torch.float32 or product.stride() != strides:
            return finish(product, inverse, operator, steep, scale, bias, activation, by_kernels=True)
        own = copied(template)  # several threads may be here
        own.inverse = inverse.data_ptr()
        forward(product.data_ptr(), None, by_reference(own))
        return product

    respond_.kept = kept  # type: ignore[attr-defined]
    return respond_


def ready_conv(
    x: Tensor,
    out: Tensor,
    *,
    window: tuple[int, ...],
    numbers: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
    constants: Constants,
    operator: str,
    eps: float,
    power: float,
    shared: SharedNorms | None,
    activation: str | None,
) -> Run | None:
    """``folded_conv`` of inputs like ``x`` that it answered with tensors like ``out``."""
    norms_of = ready_norms(x, window, numbers, eps, power)
    respond_ = ready_response(out, norms_of(x), operator, constants, activation)
    convolve, key = CONVOLUTIONS[len(window)], (window, numbers, eps, power)
    if respond_ is None:
        return None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inverse = norms_of(x) if shared is None else shared.get(x, key, lambda: norms_of(x))
        return respond_(convolve(x, weight, None, *numbers), inverse)

    return run


def ready_norms(
    x: Tensor,
    window: tuple[int, ...],
    numbers: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
    eps: float,
    power: float,
) -> Callable[[Tensor], Tensor]:
    """``cpu_kernels.patch_inverse_norm`` of inputs that lie as ``x`` does."""
    first = cpu_kernels.patch_inverse_norm(x, window, *numbers, eps, power)
    if cpu_binding.lies_in_rows(x, numbers[3]) and all(size == 1 for size in window):
        return lambda x: cpu_kernels.patch_inverse_norm(x, window, *numbers, eps, power)
    described, _ = cpu_kernels.described_window(x, window, *numbers)
    kernels = cpu_binding.library()
    assert kernels is not None
    compute, place, shape, strides = kernels.patch_inverse_norm, ctypes.byref(described), first.shape, first.stride()

    def norms_of(x: Tensor) -> Tensor:
        out = torch.empty_strided(shape, strides, dtype=torch.float32, device="cpu")
        cpu_kernels.checked(compute(x.data_ptr(), out.data_ptr(), place, eps, power))
        return out

    return norms_of


def ready_linear(
    x: Tensor,
    out: Tensor,
    *,
    constants: Constants,
    operator: str,
    eps: float,
    power: float,
    shared: SharedNorms | None,
    activation: str | None,
) -> Run | None:
    """``folded_linear`` of inputs like ``x`` that it answered with tensors like ``out``."""
    if not x.is_contiguous():
        return None
    size, filters, shape = x.shape[-1], out.shape[-1], out.shape
    rows, threads = x.numel() // size, cpu_binding.threads_for(x.numel())
    kernels = cpu_binding.library()
    assert kernels is not None
    if operator == "cosine" and size < 2 * filters:
        normalise = kernels.normalised_rows

        def unit(x: Tensor) -> Tensor:
            made = torch.empty((rows, size), dtype=torch.float32, device="cpu")
            normalise(x.data_ptr(), made.data_ptr(), rows, size, eps, power, threads)
            return made

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            found = unit(x) if shared is None else shared.get(x, ("rows", eps, power), lambda: unit(x))
            product = F.linear(found, weight, bias)
            return (product if activation is None else product.clamp_(*BOUNDS[activation])).view(shape)

        return multiply
    lengths = kernels.inverse_lengths

    def norms_of(x: Tensor) -> Tensor:
        made = torch.empty((rows, 1), dtype=torch.float32, device="cpu")
        lengths(x.data_ptr(), made.data_ptr(), rows, size, eps, power, threads)
        return made

    respond_ = ready_response(out.view(rows, filters), norms_of(x), operator, constants, activation)
    if respond_ is None:
        return None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inverse = norms_of(x) if shared is None else shared.get(x, (eps, power), lambda: norms_of(x))
        return respond_(F.linear(x.view(rows, size), weight), inverse).view(shape)

    return run
