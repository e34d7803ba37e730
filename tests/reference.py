"""Slow twins in float64: im2col and the paper's printed formulas, sharing no code with the package."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_error(result: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of ``truth``."""
    assert result.shape == truth.shape, f"{tuple(result.shape)} is not {tuple(truth.shape)}"
    return float((result.double() - truth.double()).abs().max() / truth.double().abs().max())


def for_each_axis(value, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)


def padded(x: Tensor, window, padding, dilation, padding_mode: str) -> Tensor:
    """``x`` with its borders added; ``"same"`` puts the odd pixel of an even kernel last."""
    if padding == "valid":
        return x
    dims = len(window)
    if padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(dilation, window, strict=True)]
        ends = [(total // 2, total - total // 2) for total in totals]
    else:
        ends = [(number, number) for number in for_each_axis(padding, dims)]
    last_axis_first = [number for pair in ends[::-1] for number in pair]
    return F.pad(x, last_axis_first, mode="constant" if padding_mode == "zeros" else padding_mode)


def patches(
    x: Tensor, window, *, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros"
) -> tuple[Tensor, list[int]]:
    """(N, G, L, D): every patch of every group, cut out one by one; and the output size whose product is L."""
    dims = len(window)
    stride, dilation = for_each_axis(stride, dims), for_each_axis(dilation, dims)
    x = padded(x.double(), window, padding, dilation, padding_mode)
    spans = [gap * (size - 1) + 1 for gap, size in zip(dilation, window, strict=True)]
    sizes = [(x.shape[2 + axis] - spans[axis]) // stride[axis] + 1 for axis in range(dims)]
    cut = []
    for position in itertools.product(*map(range, sizes)):
        index = [slice(None), slice(None)]
        for axis in range(dims):
            start = position[axis] * stride[axis]
            index.append(slice(start, start + spans[axis], dilation[axis]))
        cut.append(x[tuple(index)].reshape(x.shape[0], groups, -1))
    return torch.stack(cut, dim=2), sizes


def conv_cosine(x: Tensor, weight: Tensor, *, eps=1e-4, **window) -> Tensor:
    """<w, x> / (|w| |x|) for each patch and filter, with eps inside both roots."""
    cut, sizes = patches(x, weight.shape[2:], **window)
    groups = cut.shape[1]
    filters = weight.double().reshape(groups, weight.shape[0] // groups, -1)
    product = torch.einsum("ngld,god->ngol", cut, filters)
    patch_length = ((cut**2).sum(-1) + eps).sqrt()[:, :, None, :]
    filter_length = ((filters**2).sum(-1) + eps).sqrt()[None, :, :, None]
    return (product / (patch_length * filter_length)).reshape(x.shape[0], weight.shape[0], *sizes)


def linear_cosine(x: Tensor, weight: Tensor, *, eps=1e-4) -> Tensor:
    x, weight = x.double(), weight.double()
    product = torch.einsum("...d,od->...o", x, weight)
    x_length, weight_length = ((x**2).sum(-1, keepdim=True) + eps).sqrt(), ((weight**2).sum(-1) + eps).sqrt()
    return product / (x_length * weight_length)


def response(cosine: Tensor, operator: str, k=None) -> Tensor:
    """g(theta) as printed: Liu et al. 2017, eq. 2 to 4. ``k`` broadcasts against ``cosine``."""
    theta = torch.acos(cosine.double())
    if operator == "cosine":
        return torch.cos(theta)
    if operator == "linear":
        return -2 / math.pi * theta + 1
    k = torch.as_tensor(k, dtype=torch.float64)
    middle = math.pi / (2 * k)
    scale = (1 + torch.exp(-middle)) / (1 - torch.exp(-middle))
    return scale * (1 - torch.exp(theta / k - middle)) / (1 + torch.exp(theta / k - middle))


def scaled_and_shifted(out: Tensor, gain, bias, trailing_dims: int) -> Tensor:
    shape = (-1, *[1] * trailing_dims)
    out = out if gain is None else out * gain.double().reshape(shape)
    return out if bias is None else out + bias.double().reshape(shape)


def sphere_conv(x, weight, bias=None, *, operator="cosine", k=None, eps=1e-4, gain=None, **window) -> Tensor:
    """The slow twin of ``sphere_conv1d``, ``sphere_conv2d`` and ``sphere_conv3d``."""
    dims = weight.dim() - 2
    if isinstance(k, Tensor):
        k = k.reshape(-1, *[1] * dims)
    out = response(conv_cosine(x, weight, eps=eps, **window), operator, k)
    return scaled_and_shifted(out, gain, bias, dims)


def sphere_linear(x, weight, bias=None, *, operator="cosine", k=None, eps=1e-4, gain=None) -> Tensor:
    """The slow twin of ``sphere_linear``."""
    return scaled_and_shifted(response(linear_cosine(x, weight, eps=eps), operator, k), gain, bias, 0)
