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
from spherify.functional.folded import BOUNDS, SharedNorms, served
from spherify.functional.fused import takes

ByFilter = float | Tensor | None
Constants = tuple[Tensor | None, Tensor | None, ByFilter]  # bias, scale, steepness
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]  # None: the long way must be gone
Place = tuple[Any, ...]  # the arguments of ``cpu_kernels.patch_inverse_norm`` behind the input
MOST_WAYS = 16  # of a layer; images of many sizes must not fill the memory


class QuickCalls:
    """How a folded layer was computed for the shapes of input it has met. Nothing of it is copied or pickled."""

    def __init__(self) -> None:
        self.ways: dict[Any, Run] = {}
        self.met: Any = None
        self.softness: tuple[Any, Tensor] | None = None

    def __reduce__(self) -> tuple[type[QuickCalls], tuple[()]]:
        return QuickCalls, ()

    def way_for(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, steepness: ByFilter
    ) -> Run | None:
        """What serves such an input, if it is known, with constants lying where they lie."""
        if not takes(x) or torch.is_autocast_enabled("cpu"):
            return None
        if (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled():
            return None
        return self.ways.get(key_of(x, weight, bias, scale, steepness))

    def remember(
        self, x: Tensor, weight: Tensor, *constants: ByFilter, groups: int, make: Callable[[], Run | None]
    ) -> None:
        """Keep what ``make`` makes for such an input when it comes the second time in a row."""
        rows = x if x.dim() == weight.dim() else x.reshape(-1, x.shape[-1])
        if torch.is_autocast_enabled("cpu") or not served(rows, groups) or not all(map(is_ready, constants)):
            return
        key = key_of(x, weight, *constants)
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


def key_of(
    x: Tensor, weight: Tensor, bias: ByFilter = None, scale: ByFilter = None, steepness: ByFilter = None
) -> tuple[Any, ...]:
    return (
        x.shape,
        x.stride(),
        x.dtype,
        weight.shape,
        weight.dtype,
        torch.get_num_threads(),
        place_of(bias),
        place_of(scale),
        place_of(steepness),
    )


def place_of(value: ByFilter) -> ByFilter:
    return value.data_ptr() if isinstance(value, Tensor) else value


def is_ready(value: ByFilter) -> bool:
    """Whether the kernels read the very numbers that lie there, not a copy."""
    if not isinstance(value, Tensor):
        return True
    return value.device.type == "cpu" and value.dtype == torch.float32 and value.is_contiguous() and value.numel() > 1


def ready_response(
    x: Tensor,
    product: Tensor,
    place: Place,
    operator: str,
    constants: Constants,
    activation: str | None,
    shared: SharedNorms | None,
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Norms and ``finish`` in one call, of inputs and products that lie as these do; in the product's place."""
    *numbers, eps, power = place
    first = cpu_kernels.patch_inverse_norm(x, *place)
    fit = cpu_binding.takes(product, first.shape[1]) and cpu_binding.fits(product, first)
    filters = product.shape[1]
    if not fit or any(isinstance(value, Tensor) and value.numel() != filters for value in constants):
        return None
    bias, scale, steep = constants
    guard = torch.inf if operator == "cosine" else cpu_kernels.guard_of(operator)
    low, high = BOUNDS[activation]
    response, alive = cpu_kernels.elementwise(
        product,
        first,
        operator,
        dict(gain=scale, bias=bias, steep=steep),
        guard=guard,
        low=low,
        high=high,
        curve=curve_of(operator, steep),
    )
    layer = cpu_binding.Layer(cpu_kernels.described_window(x, *numbers)[0], response, eps, power)
    kernels = cpu_binding.library()
    assert kernels is not None
    respond, by_reference, is_linear = kernels.respond_to_patches, ctypes.byref(layer), not numbers[0]

    def norms_of(x: Tensor) -> Tensor:
        return cpu_kernels.patch_inverse_norm(x.view(-1, x.shape[-1]) if is_linear else x, *place)

    def respond_(x: Tensor, product: Tensor) -> Tensor:
        if shared is None:
            failed = respond(x.data_ptr(), None, product.data_ptr(), by_reference)
        else:
            inverse = shared.get(x, place, lambda: norms_of(x))
            failed = respond(None, inverse.data_ptr(), product.data_ptr(), by_reference)
        cpu_kernels.checked(failed)
        return product

    # what was made here lives with it; the layer's own constants are known by their places
    respond_.kept = [value for value in alive[1:] if not any(value is given for given in constants)]  # type: ignore[attr-defined]
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
    respond_ = ready_response(x, out, (window, *numbers, eps, power), operator, constants, activation, shared)
    convolve, strides = CONVOLUTIONS[len(window)], out.stride()
    if respond_ is None:
        return None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        product = convolve(x, weight, None, *numbers)
        return respond_(x, product) if product.stride() == strides else None

    return run


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
    size, filters, strides = x.shape[-1], out.shape[-1], out.stride()
    rows, threads = x.numel() // size, cpu_binding.threads_for(x.numel())
    kernels = cpu_binding.library()
    assert kernels is not None
    if operator == "cosine" and size < 2 * filters:
        normalise = kernels.normalised_rows

        def unit(x: Tensor) -> Tensor:
            made = torch.empty_like(x)
            normalise(x.data_ptr(), made.data_ptr(), rows, size, eps, power, threads)
            return made

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            found = unit(x) if shared is None else shared.get(x, ("rows", eps, power), lambda: unit(x))
            product = F.linear(found, weight, bias)
            return product if activation is None else product.clamp_(*BOUNDS[activation])

        return multiply
    place = ((), (), (), (), 1, eps, power)
    rows_of = x.view(rows, size), out.view(rows, filters)
    respond_ = ready_response(*rows_of, place, operator, constants, activation, shared)
    if respond_ is None:
        return None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        product = F.linear(x, weight)
        return respond_(x, product) if product.stride() == strides else None

    return run
