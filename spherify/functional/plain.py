"""SphereConv by plain operations, for compilers, exporters, transforms, and gradients of gradients."""

from __future__ import annotations

from torch import Tensor

from spherify.errors import OptionError
from spherify.functional import in_graphs
from spherify.functional.cosine import conv_cosine_and_type, is_seen_through, linear_cosine_and_type
from spherify.functional.responses import RESPONSES


def plain_sphere(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operator: str,
    k: float | Tensor | None,
    eps: float,
    gain: Tensor | None,
    window: dict,
) -> Tensor:
    """The response, linear for (O, D). Compiled for training on the CPU, some layers go to the kernels all the same."""
    filters, dims = weight.shape[0], weight.dim() - 2
    if dims == 0 and x.dim() > 2 and is_seen_through():
        # Of (N, H, W, D) that comes of a permutation the compiler would make angles in an order that no matrix product
        # can take, and copy them number by number.
        rows = plain_sphere(x.reshape(-1, x.shape[-1]), weight, bias, operator, k, eps, gain, window)
        return rows.view(*x.shape[:-1], filters)
    if in_graphs.serves(x, weight, operator, window):
        if isinstance(k, Tensor):
            per_filter(k, filters, 0, "k")
        return with_gain_and_bias(in_graphs.response(x, weight, operator, k, eps, window), gain, bias, filters, dims)
    is_unclamped = operator == "cosine" and in_graphs.goes_without_clamp(x, weight)
    scale = per_filter(gain, filters, 0, "gain") if is_unclamped and gain is not None else None
    if dims == 0:
        cosine, out_type = linear_cosine_and_type(x, weight, eps, scale)
    else:
        cosine, out_type = conv_cosine_and_type(x, weight, **window, eps=eps, scale=scale)
    if is_unclamped:
        return with_gain_and_bias(cosine, None, bias, filters, dims).to(out_type)
    return respond(cosine, operator, k, gain, bias, filters, dims).to(out_type)


def per_filter(value: Tensor, filters: int, trailing_dims: int, name: str) -> Tensor:
    """(O,), (1,) or () shaped so that it broadcasts against (N, O, ...)."""
    if value.numel() not in (1, filters):
        raise OptionError(f"{name} has {value.numel()} numbers; give one, or one for each of the {filters} filters.")
    return value.reshape(-1, *[1] * trailing_dims)


def respond(
    cosine: Tensor,
    operator: str,
    k: float | Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    filters: int,
    trailing_dims: int,
) -> Tensor:
    """g(cosine) * gain + bias, filter by filter."""
    if isinstance(k, Tensor):
        k = per_filter(k, filters, trailing_dims, "k")
    return with_gain_and_bias(RESPONSES[operator].function(cosine, k), gain, bias, filters, trailing_dims)


def with_gain_and_bias(
    out: Tensor, gain: Tensor | None, bias: Tensor | None, filters: int, trailing_dims: int
) -> Tensor:
    if gain is not None:
        out = out * per_filter(gain, filters, trailing_dims, "gain")
    if bias is not None:
        out = out + per_filter(bias, filters, trailing_dims, "bias")
    return out
