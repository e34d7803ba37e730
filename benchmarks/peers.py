"""Other ways to the same or a like operator, in our own words: what SphereConv is compared with."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-4


def unit(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    return (rows * torch.rsqrt((rows * rows).sum(1, keepdim=True) + EPS)).view_as(weight)


class AuthorsConv2d(nn.Conv2d):
    """The cosine as the authors' code has it: the patch norm by a convolution of the squares with ones."""

    def forward(self, x: Tensor) -> Tensor:
        window = dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        ones = self.weight.new_ones(self.groups, *self.weight.shape[1:])
        norm = (F.conv2d(x * x, ones, **window) + EPS).sqrt()
        product = F.conv2d(x, unit(self.weight), **window)
        return product / norm.repeat_interleave(self.out_channels // self.groups, 1)


class Im2colConv2d(nn.Conv2d):
    """The cosine by cutting out every patch; for one group."""

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)  # (N, C U V, P Q)
        columns = columns * torch.rsqrt((columns * columns).sum(1, keepdim=True) + EPS)
        out = unit(self.weight).flatten(1) @ columns
        sizes = [
            (x.shape[2 + axis] + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in range(2)
        ]
        return out.view(len(x), -1, *sizes)


class BcosConv2d(nn.Conv2d):
    """B-cos with B = 2: the product with the unit filter times the size of its cosine.

    Source: Boehle, Fritz, Schiele 2022, B-cos Networks: Alignment is All We Need for Interpretability, eq. 3;
    the patch norm by an average pooling of the channel sum.
    """

    def forward(self, x: Tensor) -> Tensor:
        product = F.conv2d(x, unit(self.weight), None, self.stride, self.padding, self.dilation, self.groups)
        squares = (x * x).sum(1, keepdim=True)
        area = self.kernel_size[0] * self.kernel_size[1]
        norm = (F.avg_pool2d(squares, self.kernel_size, self.stride, self.padding) * area + 1e-6).sqrt()
        return product * (product / norm).abs()


PEERS: dict[str, type[nn.Conv2d]] = {"authors": AuthorsConv2d, "im2col": Im2colConv2d, "b-cos": BcosConv2d}


def as_peer(model: nn.Module, name: str) -> nn.Module:
    """A copy whose convolutions are those of a peer; linear layers stay."""
    rival = copy.deepcopy(model)
    for part in rival.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = PEERS[name]
    return rival
