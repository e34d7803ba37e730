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
from spherify.functional.cpu_kernels import ByFilter, checked, elementwise, guard_of
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
    product: Tensor, inverse: Tensor, operator: str, values: dict[str, ByFilter]
) -> tuple[Elementwise, list[Tensor | None]]:
    """As ``elementwise``, with polynomials where k is a number.

    It is made once for each shape where only the lengths, the first of ``values``, are a tensor.
    """
    length, *others = values.values()
    is_fixed = not any(isinstance(one, Tensor) for one in others)
    if not is_fixed or not isinstance(length, Tensor) or not is_plain(length, product):
        described, alive = elementwise(product, inverse, operator, values, guard=guard_of(operator))
        describe_fit(described, values)
        return described, alive
    key = (operator, *others, product.shape, inverse.shape[1], torch.get_num_threads())
    if (held := HELD.get(key)) is None:
        described, (_, _, *fillers) = elementwise(product, inverse, operator, values, guard=guard_of(operator))
        describe_fit(described, values)
        held = hold(HELD, key, (described, fillers))
    described, fillers = held
    described = Elementwise.from_buffer_copy(described)
    described.inverse, described.length = inverse.data_ptr(), length.data_ptr()
    return described, fillers


def hold(held: dict[Key, Found], key: Key, found: Found) -> Found:
    """Keep what was found, and forget the rest where that is much: images of many sizes must not fill the memory."""
    if len(held) >= MOST_HELD:
        held.clear()
    held[key] = found
    return found


def describe_fit(described: Any, values: dict[str, ByFilter]) -> None:
    """Point a description's ``fit`` at the polynomials of these constants, if there are some."""
    rise, steep = values.get("rise"), values.get("steep")
    if isinstance(rise, Tensor) or isinstance(steep, Tensor) or rise is None:
        return
    if (fit := fit_of(steep, rise)) is not None:
        described.fit = ctypes.addressof(fit)


def is_plain(length: Tensor, product: Tensor) -> bool:
    """Whether the kernels can read it as it is."""
    return length.dtype == torch.float32 and length.numel() == product.shape[1] and length.is_contiguous()


def respond(product: Tensor, inverse: Tensor, operator: str, values: dict[str, ByFilter]) -> Tensor:
    """The response to ``product inverse length``, for tensors that ``takes``; ``values`` as for ``elementwise``."""
    out = torch.empty_like(product)
    terms, alive = terms_of(product, inverse, operator, values)
    tensors = Rows(product.data_ptr(), None, None, out.data_ptr(), None, None)
    library().respond_rows(ctypes.byref(tensors), ctypes.byref(terms))
    del alive
    return out


def respond_backward(
    gradient: Tensor, response: Tensor, inverse: Tensor, operator: str, values: dict[str, ByFilter], has_k: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by the product, the sum along each patch, (N, 1, ...), and (2, O): with the response, and for k.

    Args:
        has_k: whether that last is wanted; else it is zero.
    """
    if gradient.stride() != response.stride():
        gradient = torch.empty_like(response).copy_(gradient)
    product, along = torch.empty_like(response), torch.empty_like(inverse)
    sums = response.new_zeros((2, response.shape[1]))
    terms, alive = terms_of(response, inverse, operator, values)
    pointers = (tensor.data_ptr() for tensor in (gradient, response, product, along))
    tensors = Rows(None, *pointers, sums.data_ptr() if has_k else None)
    checked(library().respond_rows_backward(ctypes.byref(tensors), ctypes.byref(terms)))
    del alive
    return product, along, sums
