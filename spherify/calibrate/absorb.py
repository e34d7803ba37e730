"""Writing a fitted line into the layer: direction to the weight, length to gain or norm, offset to bias or norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.calibrate.parts import Part
from spherify.layers.angular import AngularLayer
from spherify.layers.timm_convs import OwnGain

LEAST_LENGTH = 0.1  # of a filter, so that the eps inside its norm changes nothing


@torch.no_grad()
def write_direction_(part: Part, unit: Tensor) -> Tensor:
    """Point the filters along ``unit`` (G, O/G, D); they keep their lengths.

    Returns:
        The lengths, (O,).
    """
    old = part.filters.detach().flatten(1)
    length = old.float().norm(dim=1).clamp_min(LEAST_LENGTH)
    new = unit.flatten(0, 1) * length[:, None]
    part.filters.data.copy_(new.view_as(part.filters))
    return length


@torch.no_grad()
def write_scale_(part: Part, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Have the part answer ``scale * z + shift`` where z is what its response alone would be.

    Args:
        scale, shift: (O,).
        mean, variance: of z over the samples, (O,); what a norm is to have as its statistics.
    """
    if part.norm is not None:
        bias = 0.0 if part.bias is None else part.bias.detach().float()
        write_norm_(part.norm, scale, shift - scale * bias, mean + bias, variance)
        return
    if part.has_gain:
        write_gain_(part, scale)
    if part.bias is not None:
        part.bias.data[part.rows] = shift.to(part.bias)


def write_gain_(part: Part, scale: Tensor) -> None:
    module = part.module
    assert isinstance(module, AngularLayer) and module.gain is not None
    if isinstance(module, OwnGain):
        module.gain.data.copy_((scale / module.gain_factor).view_as(module.gain))
    else:
        module.gain.data[part.rows] = scale.to(module.gain)


def write_norm_(norm: _BatchNorm, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> None:
    """A BatchNorm that answers ``scale * z + shift``, with the true statistics of z where it has affine weights."""
    eps, running_mean, running_var = norm.eps, norm.running_mean, norm.running_var
    if norm.affine:
        norm.weight.data.copy_(scale * (variance + eps).sqrt())
        norm.bias.data.copy_(shift + scale * mean)
        if running_mean is not None and running_var is not None:
            running_mean.copy_(mean)
            running_var.copy_(variance)
    elif running_mean is not None and running_var is not None:
        factor = scale.abs().clamp_min(1e-6)
        running_mean.copy_(-shift / factor)
        running_var.copy_((1.0 / factor.square() - eps).clamp_min(0.0))
