"""Responses of layers whose filters lie innermost, written beside the product, as compiled graphs call them."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_void_p
from typing import Any, TypeVar

import torch
from torch import Tensor

from spherify.functional import cpu_binding
from spherify.functional.cpu_binding import Elementwise, empty_at_once
from spherify.functional.cpu_kernels import by_filter, checked, constants, elementwise, guard_of
from spherify.functional.families import family
from spherify.functional.fits import fit_of

MOST_HELD = 512  # descriptions; a network has one for each shape of output
Key = TypeVar("Key")
Found = TypeVar("Found")
Held = tuple[int, Elementwise, list[Tensor | None]]  # its address, and what it points into
HELD: dict[tuple[object, ...], Held | None] = {}


def takes(product: Tensor, inverse: Tensor) -> bool:
    """Whether the numbers of one position lie side by side, with one norm, (N, 1, ...), for all of them."""
    return inverse.shape[1] == 1 and cpu_binding.takes(product, 1) and bool(cpu_binding.is_rows(product))


@functools.cache
def library() -> ctypes.CDLL:
    kernels = cpu_binding.library()
    assert kernels is not None
    kernels.respond_rows_at.argtypes = (c_void_p,) * 6
    kernels.respond_rows_backward_at.argtypes = (c_void_p,) * 9
    return kernels


def described(product: Tensor, inverse: Tensor, k: Tensor | None, operator: str, fixed_k: float) -> Held | None:
    """What serves all calls of a shape, found once; None where the kernels do not serve them."""
    lie = (product.shape, product.stride(), product.dtype, inverse.shape, inverse.stride())
    key = (lie, operator, fixed_k, k is None, torch.get_num_threads())
    try:
        return HELD[key]
    except KeyError:
        pass
    if not takes(product, inverse):
        return hold(HELD, key, None)
    soft = fixed_k or None if k is None else k
    terms, (_, *fillers) = elementwise(product, inverse, operator, constants(operator, soft), guard=guard_of(operator))
    describe_fit(terms, operator, soft)
    return hold(HELD, key, (ctypes.addressof(terms), terms, fillers))


def hold(held: dict[Key, Found], key: Key, found: Found) -> Found:
    """Keep what was found, and forget the rest where that is much: images of many sizes must not fill the memory."""
    if len(held) >= MOST_HELD:
        held.clear()
    held[key] = found
    return found


def describe_fit(described: Any, operator: str, k: Tensor | float | None) -> None:
    """Point a description at the polynomials of this k, or at those for any if it is learned, if there are some."""
    if isinstance(k, Tensor):
        described.family = ctypes.addressof(family())
        return
    values = constants(operator, k)
    rise, steep = values.get("rise"), values.get("steep")
    if isinstance(rise, float) and not isinstance(steep, Tensor) and (fit := fit_of(steep, rise)) is not None:
        described.fit = ctypes.addressof(fit)


def respond(
    product: Tensor, inverse: Tensor, length: Tensor, k: Tensor | None, operator: str, fixed_k: float
) -> Tensor | None:
    """The response to ``product inverse length``; None for tensors that the kernels do not take."""
    if (held := described(product, inverse, k, operator, fixed_k)) is None:
        return None
    out, filters = empty_at_once(product.shape, product.stride()), product.shape[1]
    own, soft = by_filter(length, filters), by_filter(k, filters)
    checked(library().respond_rows_at(held[0], *places_of(product, inverse, own, soft, out)))
    return out


def respond_backward(
    gradient: Tensor,
    response: Tensor,
    inverse: Tensor,
    length: Tensor,
    k: Tensor | None,
    operator: str,
    fixed_k: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradient by the product, the sum along each patch, (N, 1, ...), and (2, O): with the response, and for k.

    That last is empty where no k is learned. None for tensors that the kernels do not take.
    """
    if (held := described(response, inverse, k, operator, fixed_k)) is None:
        return None
    if gradient.stride() != response.stride():
        gradient = torch.empty_like(response).copy_(gradient)
    filters = response.shape[1]
    own, soft = by_filter(length, filters), by_filter(k, filters)
    product = empty_at_once(response.shape, response.stride())
    along = empty_at_once(inverse.shape, inverse.stride())
    sums = empty_at_once(shape_of_sums(filters, k), (filters, 1))
    places = places_of(gradient, response, inverse, own, soft, product, along, sums)
    checked(library().respond_rows_backward_at(held[0], *places))
    return product, along, sums


def shape_of_sums(filters: int, k: Tensor | float | None) -> tuple[int, int]:
    """Of the gradient with the response, and for k, by filter; there are none where no k is learned."""
    return (2 if isinstance(k, Tensor) else 0, filters)


def places_of(*tensors: Tensor | None) -> list[int | None]:
    """Addresses; who asks must hold the tensors for as long as they are used."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
