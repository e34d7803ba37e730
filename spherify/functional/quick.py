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
from spherify.functional.cpu_convolve import empty, kernel_for
from spherify.functional.curves import curve_of, prepare
from spherify.functional.folded import (
    BOUNDS,
    Numbers,
    SharedNorms,
    activated_,
    normalised_input,
    normalises_input,
    norms_by_kernel,
    served,
)
from spherify.functional.fused import takes

ByFilter = float | Tensor | None
Constants = tuple[Tensor | None, Tensor | None, ByFilter]  # bias, scale, steepness
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]  # None: the long way must be gone
NO_NUMBERS: Numbers = ((), (), (), 1)  # of a linear layer
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
        if not takes(x) or torch._C._is_any_autocast_enabled():
            return None
        if (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled():
            return None
        return self.ways.get(key_of(x, weight, bias, scale, steepness))

    def remember(
        self, x: Tensor, weight: Tensor, constants: Constants, *, groups: int, make: Callable[[], Run | None]
    ) -> None:
        """Keep what ``make`` makes for such an input when it comes the second time in a row."""
        rows = x if x.dim() == weight.dim() else x.reshape(-1, x.shape[-1])
        if torch._C._is_any_autocast_enabled() or not served(rows, groups) or not all(map(is_ready, constants)):
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
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, steepness: ByFilter
) -> tuple[Any, ...]:
    return (
        x.shape,
        x.stride(),
        x.dtype,
        weight.shape,
        weight.dtype,
        torch.get_num_threads(),
        None if bias is None else bias.data_ptr(),
        None if scale is None else scale.data_ptr(),
        steepness.data_ptr() if isinstance(steepness, Tensor) else steepness,
    )


def is_ready(value: ByFilter) -> bool:
    """Whether the kernels read the very numbers that lie there, not a copy."""
    if not isinstance(value, Tensor):
        return True
    return value.device.type == "cpu" and value.dtype == torch.float32 and value.is_contiguous() and value.numel() > 1


def ready_layer(
    x: Tensor,
    product: Tensor,
    window: tuple[int, ...],
    numbers: Numbers,
    operator: str,
    eps: float,
    power: float,
    constants: Constants,
    activation: str | None,
) -> cpu_binding.Layer | None:
    """What the kernels are told of inputs (N, C, ...) and products (N, O, ...) that lie as these do."""
    first = cpu_kernels.patch_inverse_norm(x, window, *numbers, eps, power)
    fit = cpu_binding.takes(product, first.shape[1]) and cpu_binding.fits(product, first)
    filters = product.shape[1]
    if not fit or any(isinstance(value, Tensor) and value.numel() != filters for value in constants):
        return None
    bias, scale, steep = constants
    guard = torch.inf if operator == "cosine" else cpu_kernels.guard_of(operator)
    low, high = BOUNDS[activation]
    values = dict(gain=scale, bias=bias, steep=steep)
    response, alive = cpu_kernels.elementwise(
        product,
        first,
        operator,
        values,
        guard=guard,
        low=low,
        high=high,
        curve=curve_of(operator, steep),
        is_gelu=activation == "gelu",
    )
    layer = cpu_binding.Layer(cpu_kernels.described_window(x, window, *numbers)[0], response, eps, power)
    # what was made here lives as long; the layer's own constants are known by their places
    layer.kept = [value for value in alive[1:] if not any(value is given for given in constants)]
    return layer


def ready_run(
    layer: cpu_binding.Layer,
    strides: tuple[int, ...],
    multiply: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    norms_of: Callable[[Tensor], Tensor] | None,
) -> Run:
    """Norms, product, response. ``norms_of``: of an input whose norms are shared; else they are the kernels' own."""
    kernels = cpu_binding.library()
    assert kernels is not None
    hold, respond, respond_at_once = kernels.hold_norms, kernels.respond_to_norms, kernels.respond_to_patches
    place = ctypes.byref(layer)

    def sharing(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        assert norms_of is not None
        inverse = norms_of(x)
        product = multiply(x, weight, None, *arguments)
        if product.stride() != strides:
            return None
        respond(inverse.data_ptr(), product.data_ptr(), place)
        return product

    def holding(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if hold(x.data_ptr(), place):
            raise MemoryError(cpu_kernels.NO_MEMORY)
        product = multiply(x, weight, None, *arguments)
        if product.stride() != strides:
            return None
        respond(None, product.data_ptr(), place)
        return product

    def at_once(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        product = multiply(x, weight, None, *arguments)
        if product.stride() != strides:
            return None
        cpu_kernels.checked(respond_at_once(x.data_ptr(), product.data_ptr(), place))
        return product

    if norms_of is not None:
        return sharing
    return holding if kernels.can_hold(place) else at_once


def ready_conv(
    x: Tensor,
    out: Tensor,
    *,
    window: tuple[int, ...],
    numbers: Numbers,
    constants: Constants,
    operator: str,
    eps: float,
    power: float,
    shared: SharedNorms | None,
    activation: str | None,
) -> Run | None:
    """``folded_conv`` of inputs like ``x`` that it answered with tensors like ``out``."""
    convolve = CONVOLUTIONS[len(window)]
    if normalises_input(operator, activation, x.shape[1], out.shape[1], window, numbers):
        normalised = ready_unit(x, eps, power)

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if shared is None:
                return convolve(normalised(x), weight, bias, *numbers)
            return convolve(normalised_input(x, window, numbers, eps, power, shared), weight, bias, *numbers)

        return multiply
    layer = ready_layer(x, out, window, numbers, operator, eps, power, constants, activation)
    if layer is None:
        return None

    if shared is None and len(window) == 2 and (at_once := ready_depthwise(layer, out)) is not None:
        return at_once

    def shared_norms(x: Tensor) -> Tensor:
        return norms_by_kernel(x, window, numbers, eps, power, shared)

    return ready_run(layer, out.stride(), convolve, numbers, None if shared is None else shared_norms)


def ready_depthwise(layer: cpu_binding.Layer, like: Tensor) -> Run | None:
    """Product, norms and response in one pass, where the kernels have a convolution of their own (depthwise)."""
    convolve, place, sizes, rows = kernel_for(layer), ctypes.byref(layer), tuple(like.shape), layer.window.channels_last
    if convolve is None:
        return None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if not weight.is_contiguous():
            return None
        out = empty(sizes, rows)
        cpu_kernels.checked(convolve(x.data_ptr(), weight.data_ptr(), out.data_ptr(), place))
        return out

    return run


def ready_unit(x: Tensor, eps: float, power: float) -> Callable[[Tensor], Tensor]:
    """``cpu_kernels.normalised`` of inputs that lie as ``x`` does, (N, C, ...) with norms of single pixels."""
    ones = (1,) * (x.dim() - 2)
    described, _ = cpu_kernels.described_window(x, ones, ones, (0,) * len(ones), ones, 1)
    kernels = cpu_binding.library()
    assert kernels is not None
    normalise, place = kernels.normalise, ctypes.byref(described)

    def unit(x: Tensor) -> Tensor:
        made = torch.empty_like(x)
        normalise(x.data_ptr(), None, made.data_ptr(), place, eps, power)
        return made

    return unit


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
    size, filters = x.shape[-1], out.shape[-1]
    rows = x.view(-1, size)
    if operator == "cosine" and size < 2 * filters:
        normalised = ready_unit(rows, eps, power)

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            unit = normalised(x) if shared is None else shared.get(x, ("rows", eps, power), lambda: normalised(x))
            product = F.linear(unit, weight, bias)
            return product if activation is None else activated_(product, activation)

        return multiply
    products = out.view(-1, filters)
    layer = ready_layer(rows, products, (), NO_NUMBERS, operator, eps, power, constants, activation)
    if layer is None:
        return None

    def shared_norms(x: Tensor) -> Tensor:
        def compute() -> Tensor:
            return cpu_kernels.patch_inverse_norm(x.view(-1, size), (), *NO_NUMBERS, eps, power)

        assert shared is not None
        return shared.get(x, (eps, power), compute)

    return ready_run(layer, out.stride(), F.linear, (), None if shared is None else shared_norms)
