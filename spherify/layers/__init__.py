"""Layers: the ``torch.nn`` twins whose inner product is replaced by the response of an angle."""

from spherify.layers.conv import SphereConv1d, SphereConv2d, SphereConv3d
from spherify.layers.linear import SphereLinear

__all__ = ["SphereConv1d", "SphereConv2d", "SphereConv3d", "SphereLinear"]
