"""Kernels in C for the CPU: patch norms, normalise-and-respond and their gradients, each in one pass, in float32."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spherify.functional.cpu_binding import (
    CODES,
    Backward,
    Elementwise,
    Pair,
    Window,
    library,
    lies_in_rows,
    threads_for,
)
from spherify.functional.curves import Curve


def sizes_of_output(
    sizes: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """How many windows there are along each axis."""
    axes = zip(sizes, window, stride, padding, dilation, strict=True)
    return [(size + 2 * pad - gap * (taken - 1) - 1) // step + 1 for size, taken, step, pad, gap in axes]


@functools.lru_cache(maxsize=1024)
def window_of(
    shape: torch.Size,
    window: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    rows: bool,
    threads: int,
) -> tuple[Window, tuple[int, ...]]:
    """The description for the kernels, and the output's shape; two dimensions at most."""
    missing = 2 - len(window)
    sizes = [*[1] * (4 - len(shape)), *shape[2:]]
    spread = [
        [filler] * missing + list(values) for values, filler in ((window, 1), (stride, 1), (padding, 0), (dilation, 1))
    ]
    out = sizes_of_output(sizes, *spread)
    described = Window(shape[0], shape[1], groups, *sizes, *out, *(Pair(*values) for values in spread), rows, threads)
    return described, (shape[0], groups, *out[missing:])


def described_window(
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Window, tuple[int, ...]]:
    rows, threads = lies_in_rows(x, groups), threads_for(x.numel())
    return window_of(x.shape, tuple(window), tuple(stride), tuple(padding), tuple(dilation), groups, rows, threads)


NO_MEMORY = "spherify's CPU kernels: out of memory."


def checked(status: int) -> None:
    if status:
        raise MemoryError(NO_MEMORY)


def patch_inverse_norm(
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    scale: float = 1.0,
) -> Tensor:
    """scale / |patch|: (N, C, H, W) to (N, G, P, Q); one dimension and none (linear layers) likewise."""
    kernels = library()
    assert kernels is not None
    described, sizes = described_window(x, window, stride, padding, dilation, groups)
    is_depthwise_in_rows = groups > 1 and described.channels_last
    layout = torch.channels_last if is_depthwise_in_rows else torch.contiguous_format
    out = torch.empty(sizes, dtype=torch.float32, device="cpu", memory_format=layout)
    checked(kernels.patch_inverse_norm(x.data_ptr(), out.data_ptr(), ctypes.byref(described), eps, scale))
    return out


def normalised(x: Tensor, eps: float, scale: float, inverse: Tensor | None = None) -> Tensor:
    """``x scale / |x|`` at each position of a (N, C, ...), or ``x inverse``, (N, 1, ...)."""
    kernels = library()
    assert kernels is not None
    ones = (1,) * (x.dim() - 2)
    described, _ = described_window(x, ones, ones, (0,) * len(ones), ones, 1)
    out, norms = torch.empty_like(x), None if inverse is None else inverse.data_ptr()
    kernels.normalise(x.data_ptr(), norms, out.data_ptr(), ctypes.byref(described), eps, scale)
    return out


def gelu_(x: Tensor) -> Tensor:
    """GELU by the error function, in place, of a dense tensor."""
    kernels = library()
    assert kernels is not None
    kernels.gelu(x.data_ptr(), x.numel(), threads_for(x.numel()))
    return x


def subtract_along_(
    by_x: Tensor,
    x: Tensor,
    along: Tensor,
    inverse: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """``by_x - x spread``, in place, with ``along inverse^2`` of each patch spread over its pixels."""
    kernels = library()
    assert kernels is not None
    described, _ = described_window(x, window, stride, padding, dilation, along.shape[1])
    pointers = (tensor.data_ptr() for tensor in (by_x, x, along, inverse))
    checked(kernels.subtract_along(*pointers, ctypes.byref(described)))
    return by_x


def subtract_own_(by: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """``by - x <by, x> inverse^2`` row by row, in place, for contiguous (R, D) and R numbers; the products, (R,)."""
    kernels = library()
    assert kernels is not None
    rows, size = x.shape
    along = by.new_empty(rows)
    pointers = (tensor.data_ptr() for tensor in (by, x, inverse, along))
    kernels.subtract_own(*pointers, rows, size, threads_for(x.numel()))
    return along


BY_FILTER = dict(length=1.0, steep=1.0, rise=1.0, end=1.0, gain=1.0, bias=0.0, offset=0.0, unscale=1.0)
ByFilter = float | Tensor | None


def by_filter(value: ByFilter, filters: int) -> Tensor | None:
    """(O,) contiguous."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return filler(value, filters)
    if not value.is_cpu:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cpu and {value.device}.")
    if value.dtype == torch.float32 and value.numel() == filters and value.is_contiguous():
        return value
    return value.detach().to(torch.float32).reshape(-1).expand(filters).contiguous()


@functools.lru_cache(maxsize=64)
def filler(value: float, filters: int) -> Tensor:
    return torch.full((filters,), value, dtype=torch.float32, device="cpu")


def elementwise(
    product: Tensor,
    inverse: Tensor,
    operator: str,
    values: dict[str, ByFilter],
    *,
    guard: float,
    low: float = -math.inf,
    high: float = math.inf,
    curve: Curve | None = None,
    is_gelu: bool = False,
) -> tuple[Elementwise, list[Tensor | None]]:
    """The description for the kernels, and the tensors it points into, which must outlive the call.

    Args:
        values: by names of ``BY_FILTER``: a number, or a tensor of one or O numbers.
        curve: stands for operator and steepness, without lengths; forward alone.
        is_gelu: GELU of what comes out, too; forward alone.
    """
    filters = product.shape[1]
    rows = lies_in_rows(product, inverse.shape[1])
    given = {name: by_filter(values.get(name), filters) for name in BY_FILTER}
    if rows and (curve or any(value is not None for value in given.values())):  # loops over filters want all or none
        given = {name: filler(BY_FILTER[name], filters) if v is None else v for name, v in given.items()}
    near, far = (None, None) if curve is None else curve
    alive = [inverse, *given.values(), near, far]
    described = Elementwise(
        *(None if value is None else value.data_ptr() for value in alive),
        0 if near is None else near.shape[1],
        product.shape[0],
        filters,
        math.prod(product.shape[2:]),
        inverse.shape[1],
        guard,
        torch.finfo(torch.float32).eps,
        low,
        high,
        CODES[operator if curve is None else "curve"],
        rows,
        is_gelu,
        threads_for(product.numel()),
    )
    return described, alive


def constants(operator: str, k: float | Tensor | None) -> dict[str, ByFilter]:
    """What the response is made of: 1 / 2k, the last factor, and for the sigmoid that factor's inverse."""
    if k is None:
        return dict(rise=2.0 / math.pi) if operator == "linear" else {}
    if not isinstance(k, Tensor):
        end = math.tanh(math.pi / (4.0 * k))
        return dict(steep=0.5 / k, rise=1.0 / end, end=end)
    kernels, given = library(), by_filter(k, k.numel())
    assert kernels is not None
    assert given is not None
    terms = given.new_empty((3, given.numel()))
    kernels.softness_terms(given.data_ptr(), terms.data_ptr(), given.numel())
    return dict(zip(("steep", "rise", "end"), terms.unbind(), strict=True))


def guard_of(operator: str) -> float:
    return 1.0 if operator == "cosine" else 1.0 - torch.finfo(torch.float32).eps


def normalise_and_respond_(
    product: Tensor,
    inverse: Tensor,
    operator: str,
    values: dict[str, ByFilter],
    *,
    guard: float | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    curve: Curve | None = None,
    is_gelu: bool = False,
) -> None:
    """The response to ``product inverse length``, times gain, plus bias, within [low, high], in place.

    Args:
        product: (N, O, ...).
        inverse: (N, G, ...).
        values: see ``elementwise``: length, gain, bias, steep, rise.
        guard: the largest cosine.
        curve, is_gelu: see ``elementwise``.
    """
    kernels = library()
    assert kernels is not None
    guard = guard_of(operator) if guard is None else guard
    described, alive = elementwise(
        product, inverse, operator, values, guard=guard, low=low, high=high, curve=curve, is_gelu=is_gelu
    )
    kernels.forward(product.data_ptr(), None, ctypes.byref(described))
    del alive


def respond_backward(
    gradient: Tensor, saved: Tensor, inverse: Tensor, operator: str, values: dict[str, ByFilter]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by the product, the sum along each patch (N, G, ...), and the four sums by filter, (4, O).

    The sums are of the gradient, of its product with the response, for k, and along the filter.

    Args:
        values: see ``elementwise``: length, gain, steep, end; offset and unscale, by which the response is found.
    """
    kernels = library()
    assert kernels is not None
    if gradient.stride() != saved.stride():
        gradient = torch.empty_like(saved).copy_(gradient)
    values = {"length": 1.0, **values}
    described, alive = elementwise(gradient, inverse, operator, values, guard=guard_of(operator))
    product, along = torch.empty_like(gradient), torch.empty_like(inverse)
    sums = gradient.new_empty((4, gradient.shape[1]))
    tensors = Backward(*(tensor.data_ptr() for tensor in (gradient, saved, product, along, sums)))
    checked(kernels.backward(ctypes.byref(tensors), ctypes.byref(described)))
    del alive
    return product, along, sums
