"""Twins of timm's convolutions: TensorFlow's dynamic padding and standardised weights, both kept."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn

from spherify.functional.responses import checked_k, response_named
from spherify.functional.sphere import sphere_conv2d
from spherify.layers.conv import SphereConv


class SphereConv2dSame(SphereConv, Conv2dSame):
    """Twin of timm's ``Conv2dSame``: pads as TensorFlow does, by the size of each input."""

    twin = Conv2dSame
    apply_operator = staticmethod(sphere_conv2d)

    def padded(self, x: Tensor) -> tuple[Tensor, Any]:
        return pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)), 0


class StandardisedFilters(SphereConv):
    """The angle is taken to the standardised filter: its mean is taken off, which changes its direction.

    The division by its standard deviation changes no direction and stays for ``identity`` alone.
    """

    standard_eps: float  # timm's eps, of the standardisation

    def set_operator(self, *args: Any, **options: Any) -> None:
        self.standard_eps = self.eps
        super().set_operator(*args, **options)

    def clear_operator(self) -> None:
        super().clear_operator()
        self.eps = self.standard_eps
        del self.__dict__["standard_eps"]

    def standardised(self, scale: Tensor | None) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        standard = F.batch_norm(rows, None, None, weight=scale, training=True, momentum=0.0, eps=self.standard_eps)
        return standard.reshape_as(self.weight)

    def filters(self) -> Tensor:
        return self.standardised(None)


class SphereStdConv2d(StandardisedFilters, StdConv2d):
    """Twin of timm's ``StdConv2d``."""

    twin = StdConv2d
    apply_operator = staticmethod(sphere_conv2d)


class DynamicPadding(SphereConv):
    """timm pads as TensorFlow does where ``same_pad`` says that it cannot be done beforehand."""

    def padded(self, x: Tensor) -> tuple[Tensor, Any]:
        if self.same_pad:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        return x, self.padding


class SphereStdConv2dSame(DynamicPadding, StandardisedFilters, StdConv2dSame):
    """Twin of timm's ``StdConv2dSame``."""

    twin = StdConv2dSame
    apply_operator = staticmethod(sphere_conv2d)


class OwnGain(StandardisedFilters):
    """timm's own gain per filter goes on as the gain of the response, started at the scale it had.

    A standardised filter has the length ``sqrt(fan_in)``, and timm multiplies it by ``gain * gamma / sqrt(fan_in)``:
    for an input of unit variance the output has the standard deviation ``gain * gamma``.
    """

    gain: nn.Parameter
    scale: float
    gain_factor: float

    def set_operator(self, *args: Any, **options: Any) -> None:
        gain = self.gain
        super().set_operator(*args, **{**options, "gain": False})
        self.gain = gain
        fan_in = self.weight[0].numel()
        k = checked_k(self.operator, options.get("k"))
        self.gain_factor = self.scale * fan_in**0.5 / response_named(self.operator).spread(k, fan_in)

    def clear_operator(self) -> None:
        gain = self.gain
        super().clear_operator()
        self.gain = gain
        del self.__dict__["gain_factor"]

    def filters(self) -> Tensor:
        scale = (self.gain * self.scale).view(-1) if self.operator == "identity" else None
        return self.standardised(scale)

    def output_gain(self) -> Tensor:
        return self.gain.view(-1) * self.gain_factor


class SphereScaledStdConv2d(OwnGain, ScaledStdConv2d):
    """Twin of timm's ``ScaledStdConv2d``."""

    twin = ScaledStdConv2d
    apply_operator = staticmethod(sphere_conv2d)


class SphereScaledStdConv2dSame(DynamicPadding, OwnGain, ScaledStdConv2dSame):
    """Twin of timm's ``ScaledStdConv2dSame``."""

    twin = ScaledStdConv2dSame
    apply_operator = staticmethod(sphere_conv2d)
