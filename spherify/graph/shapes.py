"""What functions return on tensors without data: their shape rules, for torch computes them in Python, slowly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.graph.blanks import PLAIN_TYPES, blank, blank_like, common_shape, is_dense, is_like

Answer = Tensor | tuple[Tensor, ...] | None  # None: ask torch itself
DIMS_OF_MODE = {"nearest": (3, 4, 5), "nearest-exact": (3, 4, 5), "linear": (3,), "bilinear": (4,), "bicubic": (4,)}


def shape_of_activation(x: Tensor, inplace: bool = False) -> Answer:
    """The shape and type of the input; in place, the input itself."""
    if not x.is_floating_point():
        return None
    return x if inplace else blank_like(x)


def shape_of_leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Answer:
    return shape_of_activation(x, inplace)


def shape_of_elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Answer:
    return shape_of_activation(x, inplace)


def shape_of_gelu(x: Tensor, approximate: str = "none") -> Answer:
    return shape_of_activation(x)


def shape_of_unary(x: Tensor) -> Answer:
    return shape_of_activation(x)


def shape_of_unary_in_place(x: Tensor) -> Answer:
    return shape_of_activation(x, inplace=True)


def shape_of_softmax(x: Tensor, dim: int | None = None, *args: Any, dtype: torch.dtype | None = None) -> Answer:
    fits = isinstance(dim, int) and -x.dim() <= dim < x.dim()
    return blank(x.shape, x) if fits and dtype is None and x.is_floating_point() and x.is_contiguous() else None


def shape_of_arithmetic(x: Tensor, other: Any) -> Answer:
    """With a number, or with a tensor of the same type; of both shapes, the common one."""
    if isinstance(other, (int, float)):
        return shape_of_activation(x)
    if not is_like(x, other):
        return None
    shape = common_shape(x.shape, other.shape)
    if shape is None:
        return None
    if shape == tuple(x.shape) and is_dense(x.shape, x.stride()):
        return blank_like(x)
    if x.is_contiguous() and other.is_contiguous():
        return blank(shape, x)
    has_no_order = sum(size > 1 for size in x.shape) < 2  # then the strides follow the other
    return blank_like(other) if has_no_order and shape == tuple(other.shape) else None


def shape_of_arithmetic_in_place(x: Tensor, other: Any) -> Answer:
    if isinstance(other, (int, float)):
        return shape_of_activation(x, inplace=True)
    return x if is_like(x, other) and common_shape(x.shape, other.shape) == tuple(x.shape) else None


def shape_of_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Answer:
    """Torch is asked where it would complain: one value a channel in training, another number of channels."""
    if x.dim() < 2 or (training and x.numel() == x.shape[1]):
        return None
    vectors = [vector for vector in (running_mean, running_var, weight, bias) if vector is not None]
    return blank_like(x) if all(len(vector) == x.shape[1] for vector in vectors) else None


def shape_of_layer_norm(x: Tensor, normalized_shape: Any, *args: Any, **kwargs: Any) -> Answer:
    fits = tuple(x.shape[-len(normalized_shape) :]) == tuple(normalized_shape)
    return blank_like(x) if fits and x.is_floating_point() else None


def shape_of_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Answer:
    channels = x.shape[1]
    vectors = [vector for vector in (weight, bias) if vector is not None]
    fits = all(tuple(vector.shape) == (channels,) and is_like(x, vector) for vector in vectors)
    has_many = x.numel() > x.shape[0] * num_groups
    return blank(x.shape, x) if fits and has_many and channels % num_groups == 0 and x.is_contiguous() else None


def shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Answer:
    filters, features = weight.shape
    fits = is_like(x, weight) and x.shape[-1] == features
    has_bias = bias is None or (is_like(x, bias) and tuple(bias.shape) == (filters,))
    return blank((*x.shape[:-1], filters), x) if fits and has_bias else None


def shape_of_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Answer:
    """A batch, with the padding in numbers."""
    filters, *window = weight.shape[:1] + weight.shape[2:]
    axes = [(number,) * len(window) if isinstance(number, int) else number for number in (stride, padding, dilation)]
    if x.dim() != weight.dim() or not is_like(x, weight) or not (x.is_contiguous() and weight.is_contiguous()):
        return None
    if x.shape[1] != weight.shape[1] * groups or filters % groups:
        return None
    if bias is not None and not (is_like(x, bias) and tuple(bias.shape) == (filters,)):
        return None
    sizes = [
        (size + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, spread in zip(x.shape[2:], window, *axes, strict=True)
    ]
    return blank((x.shape[0], filters, *sizes), x) if all(size > 0 for size in sizes) and x.shape[0] else None


def shape_of_matmul(x: Tensor, other: Tensor) -> Answer:
    """Stacks of matrices, as many of both."""
    fits = is_like(x, other) and x.dim() == other.dim() > 2 and x.shape[:-2] == other.shape[:-2]
    return blank((*x.shape[:-1], other.shape[-1]), x) if fits and x.shape[-1] == other.shape[-2] else None


def shape_of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Answer:
    """As many heads of queries as of keys."""
    if not (is_like(query, key) and is_like(query, value)) or query.dim() < 3:
        return None
    scores = (*query.shape[:-1], key.shape[-2])
    if attn_mask is not None:
        kinds = (torch.bool, query.dtype)
        if is_causal or attn_mask.dtype not in kinds or common_shape(scores, attn_mask.shape) != scores:
            return None
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    fits = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    return blank((*query.shape[:-1], value.shape[-1]), query) if same and fits else None


def shape_of_cat(tensors: Sequence[Tensor], dim: int = 0) -> Answer:
    first = tensors[0]
    axis = dim % first.dim()
    others = [(*x.shape[:axis], *x.shape[axis + 1 :]) for x in tensors]
    if not all(is_like(first, x) and x.is_contiguous() for x in tensors) or len(set(others)) != 1:
        return None
    if not -first.dim() <= dim < first.dim() or first.numel() == 0:
        return None
    return blank((*first.shape[:axis], sum(x.shape[axis] for x in tensors), *first.shape[axis + 1 :]), first)


def shape_of_mean(x: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Answer:
    if not (x.is_floating_point() and x.is_contiguous()):
        return None
    dims = [dim] if isinstance(dim, int) else list(dim)
    axes = {axis % x.dim() for axis in dims if -x.dim() <= axis < x.dim()}
    if not dims or len(axes) != len(dims):
        return None
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keepdim or axis not in axes]
    return blank(kept, x)


def shape_of_interpolate(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Answer:
    is_nearest = mode in ("nearest", "nearest-exact")
    if x.dim() not in DIMS_OF_MODE.get(mode, ()) or antialias or (is_nearest and align_corners is not None):
        return None
    if (size is None) == (scale_factor is None) or not (x.is_floating_point() and x.is_contiguous()):
        return None
    given = scale_factor if size is None else size
    numbers: list[Any] = [given] * (x.dim() - 2) if isinstance(given, (int, float)) else list(given or ())
    if size is None:
        numbers = [math.floor(before * scale) for before, scale in zip(x.shape[2:], numbers, strict=True)]
    fits = len(numbers) == x.dim() - 2 and all(isinstance(after, int) and after > 0 for after in numbers)
    return blank((*x.shape[:2], *numbers), x) if fits else None


def shape_of_adaptive_pool(x: Tensor, output_size: int | Sequence[int | None]) -> Answer:
    sizes = [output_size] * 2 if isinstance(output_size, int) else list(output_size)
    after = [before if size is None else size for before, size in zip(x.shape[-2:], sizes, strict=True)]
    fits = x.dim() == 4 and all(size > 0 for size in (*x.shape, *after)) and x.is_floating_point()
    return blank((*x.shape[:2], *after), x) if fits and x.is_contiguous() else None


def shape_of_lstm(x: Any, state: Any, weights: Any, *flags: Any, **kwargs: Any) -> Answer:
    """A padded sequence, without projection; torch would go through it step by step."""
    if kwargs or len(flags) != 6 or not isinstance(state, tuple):
        return None
    _, layers, _, _, bidirectional, batch_first = flags
    hidden, cell = state
    directions = 2 if bidirectional else 1
    batch = x.shape[0 if batch_first else 1]
    sizes = (layers * directions, batch)
    if x.dim() != 3 or tuple(hidden.shape[:2]) != sizes or hidden.shape != cell.shape:
        return None
    if weights[0].shape[1] != x.shape[2]:
        return None
    out = blank((*(x.shape[1::-1] if batch_first else x.shape[:2]), directions * hidden.shape[2]), x)
    return out.transpose(0, 1) if batch_first else out, blank_like(hidden), blank_like(cell)


SHAPE_RULES: Mapping[Any, Callable[..., Answer]] = {
    **dict.fromkeys((F.relu, F.relu6, F.silu, F.mish, F.hardswish, F.hardsigmoid), shape_of_activation),
    **dict.fromkeys((torch.sigmoid, torch.tanh, torch.relu, torch.exp, torch.rsqrt), shape_of_unary),
    **dict.fromkeys((Tensor.sigmoid, Tensor.tanh, Tensor.relu, Tensor.exp, Tensor.rsqrt, Tensor.neg), shape_of_unary),
    **dict.fromkeys((Tensor.sigmoid_, Tensor.tanh_, Tensor.relu_), shape_of_unary_in_place),
    **dict.fromkeys((torch.add, torch.sub, torch.mul, torch.div), shape_of_arithmetic),
    **dict.fromkeys((Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.__rsub__), shape_of_arithmetic),
    **dict.fromkeys((Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_), shape_of_arithmetic_in_place),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), shape_of_softmax),
    **dict.fromkeys((torch.matmul, Tensor.matmul), shape_of_matmul),
    **dict.fromkeys((torch.mean, Tensor.mean), shape_of_mean),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), shape_of_conv),
    F.leaky_relu: shape_of_leaky_relu,
    F.elu: shape_of_elu,
    F.gelu: shape_of_gelu,
    F.batch_norm: shape_of_batch_norm,
    F.layer_norm: shape_of_layer_norm,
    F.rms_norm: shape_of_layer_norm,
    F.group_norm: shape_of_group_norm,
    F.linear: shape_of_linear,
    F.scaled_dot_product_attention: shape_of_attention,
    F.interpolate: shape_of_interpolate,
    F.adaptive_avg_pool2d: shape_of_adaptive_pool,
    torch.cat: shape_of_cat,
    torch.lstm: shape_of_lstm,
}


def answer(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Answer:
    """The result of a function on meta tensors by its rule, or None where it has none or torch should be asked."""
    rule = SHAPE_RULES.get(function)
    if rule is None or not args:
        return None
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    if type(first) not in PLAIN_TYPES or not first.is_meta:
        return None
    try:
        return rule(*args, **kwargs)
    except (TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError):
        return None  # called as no rule expects: torch will say what is wrong
