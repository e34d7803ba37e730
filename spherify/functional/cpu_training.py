"""SphereConv's product and its gradient by the CPU's kernels, in few calls: what a shape decides is found once for it.

Python around the kernels costs a small layer more than its arithmetic, the more so behind a large product that has
filled the caches.
"""

from __future__ import annotations

import ctypes
import functools
import math
from ctypes import byref, c_float, c_int, c_long, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spherify.functional import cpu_binding, cpu_kernels
from spherify.functional.filters import multiply, multiply_backward

Axes = tuple[int, ...]  # one number a trailing dimension; none for a linear layer
BLOCKS = 4
TERMS = 7  # by filter; as in cpu_training.h
NO_MEMORY, KEEPS, DIVIDES = 1, 2, 4
MOST_WAYS = 1024  # images of many sizes must not fill the memory


class Trained(ctypes.Structure):
    """As in cpu_training.h."""

    _fields_ = (
        ("window", cpu_binding.Window),
        ("response", cpu_binding.Elementwise),
        ("eps", c_float),
        ("k", c_float),
        ("threads", c_int),
    )


class Places(ctypes.Structure):
    """Where the tensors of one call lie; as in cpu_training.h."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("x", "weight", "gain", "bias", "k", "terms", "inverse", "product", "kept"),
            *("gradient", "saved", "by_product", "along", "norms", "sums", "by_x", "by_weight"),
        )
    )


@functools.cache
def library() -> ctypes.CDLL:
    kernels = cpu_binding.library()
    assert kernels is not None
    for name in ("before_product", "after_product", "finish_gradients"):
        getattr(kernels, name).argtypes = (c_void_p, c_void_p)
    for name in ("before_gradients", "after_gradients"):
        getattr(kernels, name).argtypes = (c_void_p, c_void_p, c_long, c_long)
    for name in ("after_product", "finish_gradients"):
        getattr(kernels, name).restype = None
    return kernels


class Call(NamedTuple):
    """What is called, but for the tensors.

    Attributes:
        fixed_k: where k is no tensor; 0 for operators that have none.
    """

    stride: Axes
    padding: Axes
    dilation: Axes
    groups: int
    operator: str
    fixed_k: float
    eps: float


class Given(NamedTuple):
    """The tensors of a call; bias, gain and k are (O,), or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gain: Tensor | None
    k: Tensor | None


class Product(NamedTuple):
    """The output, and what its gradient needs.

    Attributes:
        answer: the output, or the response before gain and bias where it cannot be had from that; None where neither
            is needed.
        is_response: which of the two.
        inverse: 1 / |patch|, (N, G, ...); None where it is nearly as large as the output (depthwise layers), and
            computed again.
        terms: what the filters alone decide: (7, O).
        divides: whether the gradient by the gain may be had by a division.
    """

    out: Tensor
    answer: Tensor | None
    is_response: bool
    inverse: Tensor | None
    terms: Tensor
    divides: bool


class Gradients(NamedTuple):
    """By input and weight; by bias, gain and k in the first three rows of (4, O)."""

    x: Tensor | None
    weight: Tensor | None
    by_filter: Tensor


class Way:
    """How layers are computed whose inputs, weights and outputs have these shapes and lie like these."""

    def __init__(self, x: Tensor, weight: Tensor, product: Tensor, call: Call) -> None:
        stride, padding, dilation, groups, operator, fixed_k, eps = call
        window = tuple(weight.shape[2:])
        described, sizes = cpu_kernels.described_window(x, window, stride, padding, dilation, groups)
        rows = cpu_binding.lies_in_rows(product, groups)
        response = cpu_binding.Elementwise(
            images=x.shape[0],
            filters=product.shape[1],
            positions=math.prod(product.shape[2:]),
            groups=groups,
            guard=cpu_kernels.guard_of(operator),
            step=torch.finfo(torch.float32).eps,
            low=-math.inf,
            high=math.inf,
            operator=cpu_binding.CODES[operator],
            channels_last=rows,
        )
        self.layer = Trained(described, response, eps, fixed_k, torch.get_num_threads())
        self.place = byref(self.layer)
        self.window = (stride, padding, dilation, groups)
        self.strides, self.filters, self.norms = product.stride(), product.shape[1], sizes
        self.norm_strides = strides_of(sizes, described.channels_last and groups > 1)
        self.keeps_norms = math.prod(sizes) * 4 <= product.numel()
        self.keeps_answer = operator != "cosine" or weight.dim() > 2
        self.blocks = in_blocks(product, weight)
        self.shape = tuple(product.shape)
        is_depthwise = weight.shape == (groups, 1, 3, 3) and product.is_contiguous()
        self.convolves = is_depthwise and bool(library().can_convolve(byref(described), self.filters))

    def forward(self, given: Given, *, keeps: bool) -> Product | None:
        """None where the product of this call lies otherwise. ``keeps``: for a gradient later."""
        x, weight, bias, gain, k = given
        inverse = x.new_empty_strided(self.norms, self.norm_strides)
        terms = x.new_empty((TERMS, self.filters))
        product = x.new_empty(self.shape) if self.convolves else None
        places = Places(
            *(x.data_ptr(), weight.data_ptr(), place(gain), place(bias), place(k), terms.data_ptr()),
            *(inverse.data_ptr(), place(product)),
        )
        found = before_product(self, places)
        if found & NO_MEMORY:
            raise MemoryError(cpu_kernels.NO_MEMORY)
        if product is None:
            product = multiply(x, weight, *self.window)
            if product.stride() != self.strides:
                return None
        response = torch.empty_like(product) if keeps and found & KEEPS else None
        places.product, places.kept = product.data_ptr(), place(response)
        after_product(self, places)
        answer = (product.detach() if response is None else response) if keeps and self.keeps_answer else None
        kept = inverse if self.keeps_norms else None
        return Product(product, answer, response is not None, kept, terms, bool(found & DIVIDES))

    def backward(
        self,
        gradient: Tensor,
        given: Given,
        answer: Tensor | None,
        is_response: bool,
        inverse: Tensor | None,
        terms: Tensor,
        needs_x: bool,
        needs_weight: bool,
    ) -> Gradients:
        """From what ``Product`` holds."""
        x, weight, bias, gain, k = given
        if gradient.stride() != self.strides:
            gradient = gradient.new_empty_strided(gradient.shape, self.strides).copy_(gradient)
        several, most = len(self.blocks) > 1, self.blocks[0][1]
        by_product = gradient.new_empty_strided((most, *gradient.shape[1:]), self.strides)
        along = x.new_empty_strided((most, *self.norms[1:]), self.norm_strides)
        norms = torch.empty_like(along) if inverse is None else None
        sums, by_all = x.new_empty((4, self.filters)), torch.empty_like(x) if needs_x and several else None
        saved = place(answer)
        places = Places(
            *(x.data_ptr(), weight.data_ptr(), place(gain), place(bias), place(k), terms.data_ptr(), place(inverse)),
            *(None, saved if is_response else None, gradient.data_ptr(), saved, by_product.data_ptr()),
            *(along.data_ptr(), place(norms), sums.data_ptr()),
        )
        by_x, by_weight = None, None
        for first, count in self.blocks:
            cpu_kernels.checked(before_gradients(self, places, first, count))
            some, part = (by_product[:count], x[first : first + count]) if several else (by_product, x)
            by_x, by_filters = multiply_backward(some, part, weight, *self.window, needs_x, needs_weight)
            if by_filters is not None:
                by_weight = by_filters.contiguous() if by_weight is None else by_weight.add_(by_filters)
            if by_x is None:
                continue
            if by_all is not None:
                by_x = by_all[first : first + count].copy_(by_x)
            elif by_x.stride() != x.stride():
                by_x = torch.empty_like(x).copy_(by_x)
            places.by_x = by_x.data_ptr()
            cpu_kernels.checked(after_gradients(self, places, first, count))
        places.by_weight = place(by_weight)
        finish_gradients(self, places)
        return Gradients(by_x if by_all is None else by_all, by_weight, sums)


def place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def before_product(way: Way, places: Places) -> int:
    """Norms of patches and filters, what k makes of the response, 3x3 depthwise products; what of the flags holds."""
    return int(library().before_product(way.place, byref(places)))


def after_product(way: Way, places: Places) -> None:
    """Response, gain and bias, in place of the product."""
    library().after_product(way.place, byref(places))


def before_gradients(way: Way, places: Places, first: int, count: int) -> int:
    """The gradient by the product of some images, and what it sums to by patch and by filter."""
    return int(library().before_gradients(way.place, byref(places), first, count))


def after_gradients(way: Way, places: Places, first: int, count: int) -> int:
    """What the gradient by these images has along their patches is taken off."""
    return int(library().after_gradients(way.place, byref(places), first, count))


def finish_gradients(way: Way, places: Places) -> None:
    """What the gradient by the weight has along its filters is taken off; gradients by gain and k."""
    library().finish_gradients(way.place, byref(places))


def strides_of(sizes: tuple[int, ...], rows: bool) -> tuple[int, ...]:
    layout = torch.channels_last if rows and len(sizes) == 4 else torch.contiguous_format
    return torch.empty(sizes, device="meta", memory_format=layout).stride()


def in_blocks(product: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    """The first and how many, of some images at a time, where the output is large beside the weight: of its gradient by
    the product only a part stands beside the rest, and that part stays in the cache."""
    images, threads = product.shape[0], torch.get_num_threads()
    step = max(-(-images // BLOCKS), threads)
    if weight.dim() == 2 or product.numel() < 4 * weight.numel() or product.numel() < 1 << 17:
        step = images
    return [(first, min(step, images - first)) for first in range(0, images, step)]


WAYS: dict[Any, Way | None] = {}
NOT_MET = object()


def way_for(x: Tensor, weight: Tensor, call: Call) -> Way | None:
    """Made by multiplying them once; None where the kernels do not read how they or their product lie."""
    dtypes_fit, groups = x.dtype == weight.dtype == torch.float32 and weight.is_cpu, call.groups
    if not dtypes_fit or x.dim() > 4 or not cpu_binding.takes(x, groups) or weight.numel() == 0:
        return None
    product = multiply(x, weight, call.stride, call.padding, call.dilation, groups)
    if not cpu_binding.takes(product, groups):
        return None
    way = Way(x, weight, product, call)
    return way if cpu_binding.fits(product, x.new_empty_strided(way.norms, way.norm_strides)) else None


def forward(given: Given, call: Call, compute: torch.dtype, *, keeps: bool) -> tuple[Way, Product] | None:
    """The output by the kernels, and the way it went; None where they do not serve.

    Args:
        compute: the type to compute in.
    """
    x, weight = given.x, given.weight
    if compute != torch.float32 or not weight.is_contiguous():
        return None
    key = (x.shape, x.stride(), x.dtype, weight.shape, weight.dtype, weight.device, call, torch.get_num_threads())
    way = WAYS.get(key, NOT_MET)
    if way is NOT_MET:
        if len(WAYS) >= MOST_WAYS:  # another thread may do the same meanwhile
            WAYS.clear()
        way = WAYS[key] = way_for(x, weight, call)
    if not isinstance(way, Way):
        return None
    ready = (cpu_kernels.by_filter(value, way.filters) for value in given[2:])
    found = way.forward(Given(x, weight, *ready), keeps=keeps)
    return None if found is None else (way, found)
