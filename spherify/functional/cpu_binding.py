"""How the C kernels of the CPU are found and called, and which tensors they can be given.

They are compiled on first use by the C compiler of the machine (twenty seconds), kept in the user's cache, and called
through ctypes. Without a compiler plain operations stand in. ``SPHERIFY_CPU_KERNELS=0`` turns them off.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from spherify.functional.c_library import NotCompiled, compiled, options_of

CODES = {"cosine": 0, "linear": 1, "sigmoid": 2, "learnable": 2, "curve": 3}
NUMBERS_A_THREAD = 1 << 15  # below it a second thread costs more than it brings

Pair = c_long * 2


class Window(ctypes.Structure):
    """As in cpu_kernels.c."""

    _fields_ = (
        *((name, c_long) for name in ("images", "channels", "groups", "height", "width", "out_height", "out_width")),
        *((name, Pair) for name in ("window", "stride", "padding", "dilation")),
        ("channels_last", c_int),
        ("threads", c_int),
    )


class Elementwise(ctypes.Structure):
    """As in cpu_kernels.c."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("inverse", "length", "steep", "rise", "end", "gain", "bias", "offset", "unscale")
        ),
        *((name, c_void_p) for name in ("near", "far")),
        *((name, c_long) for name in ("curves", "images", "filters", "positions", "groups")),
        *((name, c_float) for name in ("guard", "step", "low", "high")),
        *((name, c_int) for name in ("operator", "channels_last", "is_gelu", "threads")),
        ("fit", c_void_p),  # of rows, where k is a number
        ("family", c_void_p),  # of rows, where it is learned
    )


class Layer(ctypes.Structure):
    """As in cpu_folded.h."""

    _fields_ = (("window", Window), ("response", Elementwise), ("eps", c_float), ("scale", c_float))


class Backward(ctypes.Structure):
    """As in cpu_kernels.c."""

    _fields_ = tuple((name, c_void_p) for name in ("gradient", "saved", "product", "along", "sums"))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are turned off or cannot be had; ``state`` says why."""
    if os.environ.get("SPHERIFY_CPU_KERNELS") == "0":
        WHY_NOT.append("SPHERIFY_CPU_KERNELS is 0")
        return None
    try:
        here = Path(__file__)
        names = (
            "functions",
            "vectors",
            "norms",
            "planes",
            "curves",
            "folded",
            "convolve",
            "row_lanes",
            "learned_rows",
            "rows",
            "patches",
            "depthwise",
            "depthwise_folded",
            "depthwise_gradient",
            "training",
            "pointwise",
        )
        headers = tuple(here.with_name(f"cpu_{name}.h") for name in names)
        found = compiled(here.with_name("cpu_kernels.c"), headers)
    except NotCompiled as error:
        WHY_NOT.append(str(error))
        return None
    pointer = c_void_p
    found.patch_inverse_norm.argtypes = (pointer, pointer, pointer, c_float, c_float)
    found.subtract_along.argtypes = (pointer, pointer, pointer, pointer, pointer)
    found.inverse_lengths.argtypes = (pointer, pointer, c_long, c_long, c_float, c_float, c_int)
    found.inverse_lengths.restype = None
    found.normalise.argtypes = (pointer, pointer, pointer, pointer, c_float, c_float)
    found.normalise.restype = None
    found.forward.argtypes = (pointer, pointer, pointer)
    found.forward.restype = None
    found.gelu.argtypes = (pointer, c_long, c_int)
    found.gelu.restype = None
    found.can_hold.argtypes = (pointer,)
    found.hold_norms.argtypes = (pointer, pointer)
    found.respond_to_norms.argtypes = (pointer, pointer, pointer)
    found.respond_to_norms.restype = None
    found.respond_to_patches.argtypes = (pointer, pointer, pointer)
    found.backward.argtypes = (pointer, pointer)
    found.subtract_along_filters.argtypes = (pointer, pointer, pointer, pointer, c_long, c_long, c_int)
    found.subtract_along_filters.restype = None
    found.subtract_own.argtypes = (pointer, pointer, pointer, pointer, c_long, c_long, c_int)
    found.subtract_own.restype = None
    found.can_convolve.argtypes = (pointer, c_long)
    found.convolve_with_norms.argtypes = (pointer, pointer, pointer, pointer, pointer, c_float, c_float)
    found.convolve_and_respond.argtypes = (pointer, pointer, pointer, pointer)
    found.can_convolve_rows.argtypes = (pointer,)
    found.convolve_rows_and_respond.argtypes = (pointer, pointer, pointer, pointer)
    found.learned_k.argtypes = (pointer, pointer, pointer, c_long, c_float, c_float)
    found.learned_k.restype = None
    found.softness_terms.argtypes = (pointer, pointer, c_long)
    found.softness_terms.restype = None
    return found


WHY_NOT: list[str] = []


def state() -> str:
    """One line for reports: whether the kernels are in use here, and what they were compiled for."""
    if (kernels := library()) is None:
        return f"not in use ({WHY_NOT[0]}): plain operations stand in"
    return f"compiled ({options_of(kernels)})"


def empty_at_once(sizes: Sequence[int], strides: tuple[int, ...]) -> Tensor:
    """In float32. Graphs that Inductor makes take theirs in the same way, past torch's dispatcher."""
    return QUICKLY(tuple(sizes), strides, torch.float32)


def by_dispatcher(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cpu")


# without a public name; where it is missing, torch's own way stands in
QUICKLY: Callable[..., Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cpu", by_dispatcher
)


def threads_for(numbers: int) -> int:
    return max(1, min(torch.get_num_threads(), numbers // NUMBERS_A_THREAD))


def is_rows(x: Tensor) -> bool | None:
    """Whether filters or channels (dimension 1) lie innermost; None where neither they nor the positions do."""
    if x.dim() == 2:
        return True if x.is_contiguous() else None
    if x.is_contiguous():
        return math.prod(x.shape[2:]) == 1
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    return None


def takes(x: Tensor, groups: int) -> bool:
    """Whether a tensor (N, O, ...) of activations can be given to the kernels."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.numel() == 0:
        return False
    rows = is_rows(x)
    if rows is None or (rows and groups not in (1, x.shape[1]) and not x.is_contiguous()):
        return False
    return library() is not None


def lies_in_rows(x: Tensor, groups: int) -> bool:
    """Whether the kernels are to read it so.

    A depthwise (N, C, 1) counts as planes, which it is as well: padding may make several positions of it, whose norms
    have no channels-last layout.
    """
    return groups in (1, x.shape[1]) and bool(is_rows(x)) and not (groups > 1 and x.dim() == 3)


def fits(product: Tensor, inverse: Tensor) -> bool:
    """Whether norms lie as the kernels expect them beside this product: as it does, where there are several groups."""
    groups = inverse.shape[1]
    if groups == 1 or math.prod(product.shape[2:]) == 1:
        return True
    rows = lies_in_rows(product, groups)
    return inverse.is_contiguous(memory_format=torch.channels_last if rows else torch.contiguous_format)
