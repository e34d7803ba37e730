"""SphereLinear: the subclass of ``nn.Linear`` that answers with the response of an angle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from spherify.errors import ModelError
from spherify.functional.cosine import DEFAULT_EPS
from spherify.functional.responses import KShared
from spherify.functional.sphere import sphere_linear
from spherify.layers.angular import AngularLayer, sharing_parameters


class SphereLinear(AngularLayer, nn.Linear):
    """Response of the angle between the input and each row of the weight, times a gain if it has one.

    Args:
        operator, k, k_shared, eps, gain: as in ``SphereConv2d``.
        The others are those of ``nn.Linear``.

    Shape: (..., D) -> (..., O).

    Raises:
        OptionError: unknown operator, k out of range, unknown k_shared, eps not positive.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, eq. 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        operator: str = "cosine",
        k: float | None = None,
        k_shared: KShared = "filter",
        eps: float = DEFAULT_EPS,
        gain: bool = False,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.set_operator(operator, k=k, k_shared=k_shared, eps=eps, gain=gain)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **operator: Any) -> Self:
        """Take over ``linear``'s very Parameters and hooks: no copy is made, and a tied weight stays tied.

        Args:
            linear: an ``nn.Linear``, or a subclass of it that computes the same.
            operator: operator, k, k_shared, eps, gain, as in the constructor.

        Raises:
            ModelError: ``linear`` is another kind of layer, or computes something else.
            OptionError: as in the constructor.
        """
        kind = type(linear)
        if not isinstance(linear, nn.Linear) or isinstance(linear, AngularLayer):
            raise ModelError(f"{cls.__name__}.from_linear: got a {kind.__name__}; give a Linear.")
        if kind.forward is not nn.Linear.forward or "forward" in vars(linear):
            raise ModelError(
                f"{cls.__name__}.from_linear: {kind.__name__} has a forward of its own, which would be lost; "
                "give a plain Linear."
            )
        module = sharing_parameters(linear, cls)
        assert isinstance(module, cls)
        module.set_operator(**operator)
        return module

    def forward(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """``bias`` stands in for the layer's own, for a caller that computes one."""
        return sphere_linear(
            x,
            self.filters(),
            self.bias if bias is None else bias,
            operator=self.operator,
            k=self.k,
            eps=self.eps,
            gain=self.output_gain(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operator_repr()}"
