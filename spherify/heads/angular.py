"""Angular heads: classifier layers whose logits are responses of angles to the class weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spherify.errors import OptionError
from spherify.functional.cosine import (
    CONVOLUTIONS,
    DEFAULT_EPS,
    box_sum,
    flat,
    padded,
    padding_at_both_ends,
    patch_energy,
)
from spherify.functional.precision import widened, without_autocast
from spherify.functional.responses import RESPONSES
from spherify.heads.kinds import HeadSettings, settings_for

NORM_FACTOR = -64.0  # a power of two, exact in every float type; so negative that softmax and argmax pass it over


class AngularHead(nn.Module):
    """Mixed into a torch layer: makes it a classifier on angles.

    In eval mode the output is that of the plain layer in shape: one logit a class, ``|x| g(theta)`` or
    ``scale g(theta)``, without a margin. In train mode, and only where the margin needs it (a-softmax and ga-softmax
    with m > 1), one more channel follows the classes: ``-64 |x|``. ``AngularLoss`` reads the length of the feature
    from it; no argmax ever takes it, and a plain cross-entropy gives it next to no probability. It is an
    ordinary part of the output, so it goes through pooling, flattening, averaging, DDP, autocast, compilation and
    checkpointing like the logits themselves.

    Everything is computed and returned in float32 or wider, also under autocast.

    Attributes:
        settings: kind, operator, k, margin, scale, eps.
    """

    weight: Tensor
    settings: HeadSettings

    def product_and_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inner products with the class weights at length one, and the length of what they are taken with."""
        raise NotImplementedError

    @property
    def class_dim(self) -> int:
        """Where the classes stand in the output, from the end."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """How many class weights it has; without the channel of train mode."""
        return self.weight.shape[0]

    def unit_weight(self) -> Tensor:
        """(M, ...): the class weights at length one, in float32 or wider."""
        wide = widened(self.weight)
        inverse_length = torch.rsqrt(wide.square().flatten(1).sum(1) + self.settings.eps)
        return wide * inverse_length.view(-1, *[1] * (wide.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        settings = self.settings
        with without_autocast(x.device):
            product, norm = self.product_and_norm(widened(x))
            response = RESPONSES[settings.operator].function(product / norm, settings.k)
            if settings.scale is not None:
                return response * settings.scale
            logits = response * norm
            if self.training and settings.gives_norm:
                logits = torch.cat([logits, norm * NORM_FACTOR], dim=self.class_dim)
            return logits

    def take_settings(self, settings: HeadSettings) -> None:
        """Make it the head that the settings describe. Raises OptionError where the layer cannot be one."""
        self.settings = settings

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, head={self.settings}"


class AngularLinear(AngularHead, nn.Linear):
    """A linear classifier on angles.

    Args:
        in_features: length of the feature.
        out_features: number of classes.
        head: an entry of ``HEAD_KINDS``.
        operator, k, margin, scale: None is the kind's default.
        eps: added to squared norms, inside the root.

    Shape: (..., D) -> (..., M), in train mode (..., M + 1) for a-softmax and ga-softmax with a margin.

    Raises:
        OptionError: unknown head, or a value that does not go with it.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, section 2.4, eq. 10 and 11.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        head: str = "ga-softmax",
        operator: str | None = None,
        k: float | None = None,
        margin: float | None = None,
        scale: float | None = None,
        eps: float = DEFAULT_EPS,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, False, device, dtype)
        options: dict[str, Any] = dict(operator=operator, k=k, margin=margin, scale=scale, eps=eps)
        self.take_settings(settings_for(head, out_features, **options))

    @property
    def class_dim(self) -> int:
        return -1

    def product_and_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., M) and (..., 1)."""
        norm = torch.sqrt(x.square().sum(-1, keepdim=True) + self.settings.eps)
        return F.linear(x, self.unit_weight()), norm


class AngularConv(AngularHead, _ConvNd):
    """What the convolutional classifiers have in common; make one of them instead."""

    @property
    def class_dim(self) -> int:
        return 1 - self.weight.dim()

    def product_and_norm(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, M, P, Q) and (N, 1, P, Q)."""
        dims = self.weight.dim() - 2
        is_unbatched = x.dim() == dims + 1
        x = x[None] if is_unbatched else x
        pads = padding_at_both_ends(self.padding, self.kernel_size, self.stride, self.dilation)
        x, pads, padding = padded(x, pads, self.padding, self.padding_mode)
        product = CONVOLUTIONS[dims](x, self.unit_weight(), None, self.stride, padding, self.dilation, 1)
        energy = patch_energy(x, 1)
        energy = F.pad(energy, flat(pads)) if any(map(any, pads)) else energy
        norm = torch.sqrt(box_sum(energy, self.kernel_size, self.stride, self.dilation) + self.settings.eps)
        return (product[0], norm[0]) if is_unbatched else (product, norm)

    def take_settings(self, settings: HeadSettings) -> None:
        if self.groups != 1:
            raise OptionError(f"a convolution with {self.groups} groups cannot be an angular head; give one group.")
        super().take_settings(settings)


class AngularConv1d(AngularConv, nn.Conv1d):
    """``AngularLinear`` at every position of a sequence: (N, C, L) -> (N, M, Q)."""


class AngularConv2d(AngularConv, nn.Conv2d):
    """``AngularLinear`` at every position of a map: (N, C, H, W) -> (N, M, P, Q).

    Args:
        in_channels, out_channels, kernel_size, stride, padding: as in ``nn.Conv2d``.
        head, operator, k, margin, scale, eps: as in ``AngularLinear``.

    Raises:
        OptionError: as in ``AngularLinear``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: Literal["same", "valid"] | int | tuple[int, int] = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        head: str = "ga-softmax",
        operator: str | None = None,
        k: float | None = None,
        margin: float | None = None,
        scale: float | None = None,
        eps: float = DEFAULT_EPS,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, bias=False, device=device, dtype=dtype
        )
        options: dict[str, Any] = dict(operator=operator, k=k, margin=margin, scale=scale, eps=eps)
        self.take_settings(settings_for(head, out_channels, **options))


class AngularConv3d(AngularConv, nn.Conv3d):
    """``AngularLinear`` at every position of a volume: (N, C, T, H, W) -> (N, M, S, P, Q)."""
