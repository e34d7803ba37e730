"""Layers of a folded model: angular layers whose constants are computed once, and what stands for a folded norm."""

from __future__ import annotations

import math
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from typing_extensions import Self

from spherify.errors import ModelError
from spherify.functional.folded import SharedNorms, folded_conv, folded_linear
from spherify.functional.learned_k import k_from_logit
from spherify.functional.quick import QuickCalls, ready_conv, ready_linear
from spherify.layers.angular import AngularLayer
from spherify.layers.attention import SphereMultiheadAttention
from spherify.layers.conv import SphereConv, SphereConv1d, SphereConv2d, SphereConv3d
from spherify.layers.linear import SphereLinear
from spherify.layers.removed import Removed
from spherify.layers.timm_convs import (
    SphereConv2dSame,
    SphereScaledStdConv2d,
    SphereScaledStdConv2dSame,
    SphereStdConv2d,
    SphereStdConv2dSame,
)


class Folded(AngularLayer):
    """Mixed into an angular layer: its weight holds unit filters, its gain and bias all that follows the response.

    Attributes:
        power: what the filters were divided by besides their length.
        shared: where the norms of an input are kept that other layers read too, or None.
        activation: relu, relu6 or gelu where the layer took it in, or None.
        quick: how the last input was computed, for the next of its shape.
    """

    quick: QuickCalls
    power: float
    shared: SharedNorms | None
    activation: str | None

    def filters(self) -> Tensor:
        return self.weight

    def output_gain(self) -> Tensor | None:
        return self.gain

    @property
    def steepness(self) -> Tensor | float | None:
        if self.fixed_k is not None:
            return 0.5 / self.fixed_k
        if self.operator != "learnable":
            return None
        assert self.k_logit is not None
        return self.quick.steepness(self.k_logit, lambda logit: 0.5 / k_from_logit(logit))

    def weight_and_constants(self) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | float | None]]:
        """Weight; bias, gain, steepness. ``__getattr__`` is passed by: cold, its calls are a tenth of a small layer."""
        held = self._parameters
        weight = held["weight"]
        assert weight is not None
        return weight, (held["bias"], held.get("gain"), None if self.operator == "cosine" else self.steepness)

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ModelError(f"{type(self).__name__} is folded for inference; train the model it was folded from.")
        return super().train(mode)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation}"
        return f"{super().extra_repr()}, folded=True{activation}"


class FoldedConv(Folded, SphereConv):
    """The convolutions in common."""

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self.padded(x)
        weight, constants = self.weight_and_constants()
        way = self.quick.way_for(x, weight, *constants)
        if way is not None and (out := way(x, weight, constants[0])) is not None:
            return out
        out = self.slowly(x, padding)
        if isinstance(padding, tuple) and self.padding_mode == "zeros" and x.dim() == weight.dim():
            window, numbers = tuple(weight.shape[2:]), (self.stride, padding, self.dilation, self.groups)
            options: dict[str, Any] = dict(operator=self.operator, eps=self.eps, power=self.power)
            options |= dict(shared=self.shared, activation=self.activation)
            self.quick.remember(
                x,
                weight,
                constants,
                groups=self.groups,
                make=lambda: ready_conv(x, out, window=window, numbers=numbers, constants=constants, **options),
            )
        return out

    def slowly(self, x: Tensor, padding: Any) -> Tensor:
        return folded_conv(
            x,
            self.weight,
            self.bias,
            self.gain,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            operator=self.operator,
            steepness=self.steepness,
            eps=self.eps,
            power=self.power,
            shared=self.shared,
            activation=self.activation,
        )


class FoldedConv1d(FoldedConv, SphereConv1d):
    """``SphereConv1d`` for inference."""


class FoldedConv2d(FoldedConv, SphereConv2d):
    """``SphereConv2d`` for inference."""


class FoldedConv3d(FoldedConv, SphereConv3d):
    """``SphereConv3d`` for inference."""


class FoldedConv2dSame(FoldedConv, SphereConv2dSame):
    """``SphereConv2dSame`` for inference."""


class FoldedStdConv2d(FoldedConv, SphereStdConv2d):
    """``SphereStdConv2d`` for inference; its filters are standardised once."""


class FoldedStdConv2dSame(FoldedConv, SphereStdConv2dSame):
    """``SphereStdConv2dSame`` for inference; its filters are standardised once."""


class FoldedScaledStdConv2d(FoldedConv, SphereScaledStdConv2d):  # type: ignore[misc]
    """``SphereScaledStdConv2d`` for inference; its filters are standardised once."""


class FoldedScaledStdConv2dSame(FoldedConv, SphereScaledStdConv2dSame):  # type: ignore[misc]
    """``SphereScaledStdConv2dSame`` for inference; its filters are standardised once."""


class FoldedLinear(Folded, SphereLinear):
    """``SphereLinear`` for inference."""

    def forward(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        weight, constants = self.weight_and_constants()
        constants = constants if bias is None else (bias, *constants[1:])
        way = self.quick.way_for(x, weight, *constants)
        if way is not None and (out := way(x, weight, constants[0])) is not None:
            return out
        # detached: an owner that calls the layer for F.linear by its very weight must not do so here
        weight = weight.detach()
        options: dict[str, Any] = dict(operator=self.operator, eps=self.eps, power=self.power)
        options |= dict(shared=self.shared, activation=self.activation)
        out = folded_linear(x, weight, *constants[:2], steepness=constants[2], **options)
        self.quick.remember(
            x, weight, constants, groups=1, make=lambda: ready_linear(x, out, constants=constants, **options)
        )
        return out


class FoldedMultiheadAttention(Folded, SphereMultiheadAttention):
    """``SphereMultiheadAttention`` for inference."""

    def project(self, x: Tensor, rows: slice) -> Tensor:
        steep, gain, bias = self.steepness, self.gain, self.in_proj_bias
        return folded_linear(
            x,
            self.in_proj_weight[rows],
            None if bias is None else bias[rows],
            None if gain is None else gain[rows],
            operator=self.operator,
            steepness=steep[rows] if isinstance(steep, Tensor) and steep.numel() > 1 else steep,
            eps=self.eps,
            power=self.power,
            shared=None,
        )


FOLDED: dict[type[nn.Module], type[Folded]] = {
    SphereConv1d: FoldedConv1d,
    SphereConv2d: FoldedConv2d,
    SphereConv3d: FoldedConv3d,
    SphereConv2dSame: FoldedConv2dSame,
    SphereStdConv2d: FoldedStdConv2d,
    SphereStdConv2dSame: FoldedStdConv2dSame,
    SphereScaledStdConv2d: FoldedScaledStdConv2d,
    SphereScaledStdConv2dSame: FoldedScaledStdConv2dSame,
    SphereLinear: FoldedLinear,
    SphereMultiheadAttention: FoldedMultiheadAttention,
}


ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.GELU: "gelu",
    timm.layers.activations.GELU: "gelu",
}


def takes_in(layer: nn.Module, behind: nn.Module) -> bool:
    """Whether the folded form of a layer can compute the activation, too."""
    is_exact = getattr(behind, "approximate", "none") == "none"  # GELU by tanh stays
    can = issubclass(FOLDED.get(type(layer), nn.Module), (FoldedConv, FoldedLinear))
    return can and is_exact and type(behind) in ACTIVATIONS


class FoldedAway(Removed):
    """What stands where a BatchNorm or an activation was folded into the layer before it.

    Of a norm of timm's the activation inside stays, unless that is folded, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self._modules else x

    def extra_repr(self) -> str:
        return f"was {self.source_type.__name__}, folded"


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(O,) factor and (O,) summand of a BatchNorm in eval mode, in float32 or wider."""
    held: Any = norm
    wide = torch.promote_types(held.running_var.dtype, torch.float32)
    factor = torch.rsqrt(held.running_var.to(wide) + held.eps)
    factor = factor if held.weight is None else factor * held.weight.to(wide)
    summand = -held.running_mean.to(wide) * factor
    return factor, summand if held.bias is None else summand + held.bias.to(wide)


def frozen(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=False)


def response_factor(layer: AngularLayer) -> Tensor | float:
    """What the response's last step multiplies by: 2/pi of the linear, 1 / tanh(pi/4k) of the sigmoid."""
    if layer.operator == "cosine":
        return 1.0
    k = layer.k
    if k is None:
        return 2.0 / math.pi
    return 1.0 / (torch.tanh(math.pi / (4.0 * k)) if isinstance(k, Tensor) else math.tanh(math.pi / (4.0 * k)))


@torch.no_grad()
def fold_angular_(
    layer: AngularLayer, norm: nn.Module | None, activation: nn.Module | None, shared: SharedNorms | None
) -> None:
    """Change an angular layer to its folded class; every constant is computed here, once.

    One tensor of the weight's size is made for a moment; the old weight goes.
    """
    target = FOLDED[type(layer)]
    weight, wide = layer.filters(), torch.promote_types(layer.weight.dtype, torch.float32)
    filters, name = weight.shape[0], "in_proj_bias" if isinstance(layer, SphereMultiheadAttention) else "bias"
    scale = weight.new_ones(filters, dtype=wide) * response_factor(layer)
    gain, offset = layer.output_gain(), getattr(layer, name)
    scale = scale if gain is None else scale * gain.to(wide)
    offset = offset if offset is None else offset.to(wide)
    if norm is not None:
        factor, summand = norm_affine(norm)
        scale, offset = scale * factor, summand if offset is None else summand + offset * factor
    fan_in = math.prod(weight.shape[1:])
    power = 2.0 ** math.ceil(math.log2(math.sqrt(max(fan_in, 1))))
    length = torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=wide)
    rows = torch.rsqrt(length.square() + layer.eps) / power
    is_cosine = layer.operator == "cosine"
    rows = rows * scale if is_cosine else rows
    unit = (weight.to(wide) * rows.view(-1, *[1] * (weight.dim() - 1))).to(layer.weight.dtype)
    key = "in_proj_weight" if isinstance(layer, SphereMultiheadAttention) else "weight"
    like = layer.weight
    setattr(layer, key, nn.Parameter(unit, requires_grad=False))
    layer.gain = None if is_cosine else frozen(scale, like)
    setattr(layer, name, None if offset is None else frozen(offset, like))
    if layer.k_logit is not None:
        layer.k_logit.requires_grad_(False)  # it may be tied
    layer.__class__ = target
    assert isinstance(layer, Folded)
    layer.power, layer.shared, layer.quick = power, shared, QuickCalls()
    layer.activation = None if activation is None else ACTIVATIONS[type(activation)]
    layer.training = False


@torch.no_grad()
def fold_plain_(layer: nn.Module, norm: nn.Module) -> None:
    """Fold a BatchNorm into a plain conv or linear layer."""
    held: Any = layer
    factor, summand = norm_affine(norm)
    weight = held.weight
    rows = factor.view(-1, *[1] * (weight.dim() - 1))
    offset = summand if held.bias is None else summand + held.bias.to(factor.dtype) * factor
    held.weight = frozen(weight.to(factor.dtype) * rows, weight)
    held.bias = frozen(offset, weight)


def take_away_(part: nn.Module) -> None:
    """Leave of a norm what timm keeps inside, of an activation nothing."""
    kind, words = type(part), part.extra_repr()
    part._parameters.clear()
    part._buffers.clear()
    part.__class__ = FoldedAway
    assert isinstance(part, FoldedAway)
    part.source_type, part.source_words, part.stored_state = kind, words, ({}, {})
