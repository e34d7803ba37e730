"""Responses of layers whose filters lie innermost, written beside the product, as compiled graphs call them."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_void_p
from typing import Any, TypeVar

import torch
from torch import Tensor

from spherify.functional import cpu_binding
from spherify.functional.cpu_binding import Elementwise
from spherify.functional.cpu_kernels import ByFilter, by_filter, checked, constants, elementwise, guard_of
from spherify.functional.families import family
from spherify.functional.fits import fit_of

MOST_HELD = 512  # descriptions; a network has one for each shape of output
Key = TypeVar("Key")
Found = TypeVar("Found")
HELD: dict[tuple[object, ...], tuple[Elementwise, list[Tensor | None]]] = {}


class Rows(ctypes.Structure):
    """As in cpu_rows.h."""

    _fields_ = tuple((name, c_void_p) for name in ("product", "gradient", "saved", "out", "along", "sums"))


def takes(product: Tensor, inverse: Tensor) -> bool:
    """Whether the numbers of one position lie side by side, with one norm, (N, 1, ...), for all of them."""
    return inverse.shape[1] == 1 and cpu_binding.takes(product, 1) and bool(cpu_binding.is_rows(product))


@functools.cache
def library() -> ctypes.CDLL:
    kernels = cpu_binding.library()
    assert kernels is not None
    kernels.respond_rows.argtypes = kernels.respond_rows_backward.argtypes = (c_void_p, c_void_p)
    kernels.respond_rows.restype = None
    return kernels


def terms_of(
    product: Tensor, inverse: Tensor, length: Tensor, k: Tensor | None, operator: str, fixed_k: float
) -> tuple[Elementwise, list[Tensor | None]]:
    """As ``elementwise``, with polynomials; all but this call's tensors is made once for each shape."""
    filters = product.shape[1]
    key = (operator, fixed_k, k is None, product.shape, inverse.shape[1], torch.get_num_threads())
    if (held := HELD.get(key)) is None:
        values: dict[str, ByFilter] = dict(length=length, **constants(operator, fixed_k or None if k is None else k))
        described, (_, _, *fillers) = elementwise(product, inverse, operator, values, guard=guard_of(operator))
        describe_fit(described, values)
        held = hold(HELD, key, (described, fillers))
    described, fillers = held
    described, own = Elementwise.from_buffer_copy(described), by_filter(length, filters)
    assert own is not None
    described.inverse, described.length = inverse.data_ptr(), own.data_ptr()
    return described, [*fillers, own, None if k is None else describe_k(described, k, filters)]


def describe_k(described: Any, k: Tensor, filters: int) -> Tensor:
    """Point a description at what a learned k makes of the response, (3, O), which must outlive the call."""
    kernels, own = cpu_binding.library(), by_filter(k, filters)
    assert kernels is not None
    assert own is not None
    terms = own.new_empty((3, filters))
    first, step = terms.data_ptr(), filters * terms.element_size()
    kernels.softness_terms(own.data_ptr(), first, filters)
    described.steep, described.rise, described.end = first, first + step, first + 2 * step
    return terms


def hold(held: dict[Key, Found], key: Key, found: Found) -> Found:
    """Keep what was found, and forget the rest where that is much: images of many sizes must not fill the memory."""
    if len(held) >= MOST_HELD:
        held.clear()
    held[key] = found
    return found


def describe_fit(described: Any, values: dict[str, ByFilter]) -> None:
    """Point a description at the polynomials of these constants, or at those for any, if there are some."""
    rise, steep = values.get("rise"), values.get("steep")
    if isinstance(steep, Tensor):
        described.family = ctypes.addressof(family())
    elif isinstance(rise, float) and (fit := fit_of(steep, rise)) is not None:
        described.fit = ctypes.addressof(fit)


def respond(
    product: Tensor, inverse: Tensor, length: Tensor, k: Tensor | None, operator: str, fixed_k: float
) -> Tensor:
    """The response to ``product inverse length``, for tensors that ``takes``."""
    out = torch.empty_like(product)
    terms, alive = terms_of(product, inverse, length, k, operator, fixed_k)
    tensors = Rows(product.data_ptr(), None, None, out.data_ptr(), None, None)
    library().respond_rows(ctypes.byref(tensors), ctypes.byref(terms))
    del alive
    return out


def respond_backward(
    gradient: Tensor,
    response: Tensor,
    inverse: Tensor,
    length: Tensor,
    k: Tensor | None,
    operator: str,
    fixed_k: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by the product, the sum along each patch, (N, 1, ...), and (2, O): with the response, and for k.

    That last is zero where no k is learned.
    """
    if gradient.stride() != response.stride():
        gradient = torch.empty_like(response).copy_(gradient)
    product, along = torch.empty_like(response), torch.empty_like(inverse)
    sums = response.new_zeros((2, response.shape[1]))
    terms, alive = terms_of(response, inverse, length, k, operator, fixed_k)
    pointers = (tensor.data_ptr() for tensor in (gradient, response, product, along))
    tensors = Rows(None, *pointers, None if k is None else sums.data_ptr())
    checked(library().respond_rows_backward(ctypes.byref(tensors), ctypes.byref(terms)))
    del alive
    return product, along, sums
