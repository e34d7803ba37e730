"""What the tests of functional and layers share: seeded tensors, the operators, and the convolutions by dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spherify.functional import sphere_conv1d, sphere_conv2d, sphere_conv3d

SPHERE_CONVS = {1: sphere_conv1d, 2: sphere_conv2d, 3: sphere_conv3d}
PLAIN_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# The name of each operator, and its k: a number, or the shape of a tensor ("O" stands for the number of filters).
OPERATORS = {
    "cosine": ("cosine", None),
    "linear": ("linear", None),
    "sigmoid-0.1": ("sigmoid", 0.1),  # the paper's three values of k
    "sigmoid-0.3": ("sigmoid", 0.3),
    "sigmoid-0.7": ("sigmoid", 0.7),
    "learnable-filter": ("learnable", ("O",)),
    "learnable-layer": ("learnable", (1,)),
    "learnable-shared": ("learnable", ()),
}


def options_of(name: str, filters: int, dtype: torch.dtype = torch.float64) -> dict:
    """``operator=`` and ``k=`` of an entry of ``OPERATORS``."""
    operator, k = OPERATORS[name]
    if isinstance(k, tuple):
        values = torch.linspace(0.3, 1.5, filters) if k == ("O",) else torch.full(k, 0.5)
        k = values.to(dtype)
    return dict(operator=operator) if k is None else dict(operator=operator, k=k)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def uniform(low: float, high: float, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)
