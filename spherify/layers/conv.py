"""SphereConv1d, SphereConv2d and SphereConv3d: subclasses of their torch twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_1_t, _size_2_t, _size_3_t
from torch.nn.modules.conv import _ConvNd
from typing_extensions import Self

from spherify.errors import ModelError
from spherify.functional.cosine import DEFAULT_EPS
from spherify.functional.responses import KShared
from spherify.functional.sphere import sphere_conv1d, sphere_conv2d, sphere_conv3d
from spherify.layers.angular import AngularLayer, sharing_parameters


class SphereConv(AngularLayer, _ConvNd):
    """What the three have in common; make one of them instead."""

    twin: ClassVar[type[_ConvNd]]
    apply_operator: ClassVar[Callable[..., Tensor]]

    @classmethod
    def from_conv(cls, conv: _ConvNd, **operator: Any) -> Self:
        """Take over ``conv``'s very Parameters and hooks: no copy is made, and a tied weight stays tied.

        Args:
            conv: the torch twin of this class, or a subclass of it that computes the same.
            operator: operator, k, k_shared, eps, gain, as in the constructor.

        Raises:
            ModelError: ``conv`` is another kind of layer, or computes something else.
            OptionError: as in the constructor.
        """
        kind = type(conv)
        if not isinstance(conv, cls.twin) or isinstance(conv, AngularLayer):
            raise ModelError(f"{cls.__name__}.from_conv: got a {kind.__name__}; give a {cls.twin.__name__}.")
        is_own_forward = kind.forward is not cls.twin.forward or "forward" in vars(conv)
        if is_own_forward or kind._conv_forward is not cls.twin._conv_forward:
            raise ModelError(
                f"{cls.__name__}.from_conv: {kind.__name__} has a forward of its own, which would be lost; "
                f"give a plain {cls.twin.__name__}."
            )
        module = sharing_parameters(conv, cls)
        assert isinstance(module, cls)
        module.set_operator(**operator)
        return module

    def padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """The input, and what is still to be padded; subclasses that pad by the input's size do it here."""
        return x, self.padding

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self.padded(x)
        return type(self).apply_operator(
            x,
            self.filters(),
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            operator=self.operator,
            k=self.k,
            eps=self.eps,
            gain=self.output_gain(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operator_repr()}"


class SphereConv1d(SphereConv, nn.Conv1d):
    """``SphereConv2d`` in one dimension: (N, C, L) -> (N, O, Q), or without N."""

    twin = nn.Conv1d
    apply_operator = staticmethod(sphere_conv1d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: str | _size_1_t = 0,
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        operator: str = "cosine",
        k: float | None = None,
        k_shared: KShared = "filter",
        eps: float = DEFAULT_EPS,
        gain: bool = False,
    ) -> None:
        nn.Conv1d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.set_operator(operator, k=k, k_shared=k_shared, eps=eps, gain=gain)


class SphereConv2d(SphereConv, nn.Conv2d):
    """Response of the angle between each patch and each filter, times a gain if it has one.

    A subclass of ``nn.Conv2d`` so that a converted model keeps its keys, attributes and API. It is not a linear
    map: tools that fuse or quantise by ``isinstance`` must be kept from it.

    Args:
        operator: cosine, linear, sigmoid, learnable.
        k: softness of sigmoid (default 0.3) and learnable (initial value, default 0.5), in [1e-3, 1e3].
        k_shared: filter, layer or network: what shares one learned k. A layer alone cannot share with a network;
            the engine ties the layers' ``k_logit``.
        eps: added to squared norms, inside the root.
        gain: learn a factor for each filter, started so that the output has the scale of the plain convolution's.
        The others are those of ``nn.Conv2d``.

    Shape: (N, C, H, W) -> (N, O, P, Q), or without N.

    Raises:
        OptionError: unknown operator, k out of range, unknown k_shared, eps not positive.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, eq. 1.
    """

    twin = nn.Conv2d
    apply_operator = staticmethod(sphere_conv2d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        operator: str = "cosine",
        k: float | None = None,
        k_shared: KShared = "filter",
        eps: float = DEFAULT_EPS,
        gain: bool = False,
    ) -> None:
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.set_operator(operator, k=k, k_shared=k_shared, eps=eps, gain=gain)


class SphereConv3d(SphereConv, nn.Conv3d):
    """``SphereConv2d`` in three dimensions: (N, C, T, H, W) -> (N, O, S, P, Q), or without N."""

    twin = nn.Conv3d
    apply_operator = staticmethod(sphere_conv3d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: str | _size_3_t = 0,
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        operator: str = "cosine",
        k: float | None = None,
        k_shared: KShared = "filter",
        eps: float = DEFAULT_EPS,
        gain: bool = False,
    ) -> None:
        nn.Conv3d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.set_operator(operator, k=k, k_shared=k_shared, eps=eps, gain=gain)
