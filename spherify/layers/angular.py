"""What every angular layer holds beside its torch twin's parameters: operator, k, eps, gain."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import parameter
from torch.nn.utils import parametrize

from spherify.errors import ModelError, OptionError
from spherify.functional.cosine import DEFAULT_EPS
from spherify.functional.learned_k import k_from_logit, k_to_logit
from spherify.functional.responses import K_SHARED, KShared, checked_k, response_named


def sharing_parameters(source: nn.Module, target: type[nn.Module]) -> nn.Module:
    """A module of class ``target`` with the state of ``source``: the very same Parameters, buffers and hooks.

    Raises:
        ModelError: ``source`` has no weight to share, because it is computed at each call or not yet made.
    """
    if parametrize.is_parametrized(source, "weight"):
        raise ModelError(
            f"{target.__name__}: the weight given is parametrized, and would be lost; "
            "call torch.nn.utils.parametrize.remove_parametrizations first."
        )
    if any(parameter.is_lazy(weight) for weight in source.parameters(recurse=False)):
        raise ModelError(
            f"{target.__name__}: the weight given has no shape yet; call the {type(source).__name__} once."
        )
    module = target.__new__(target)
    module.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value for name, value in source.__dict__.items()
    }
    return module


class AngularLayer(nn.Module):
    """Mixed into a torch layer: turns its inner product into the response of an angle.

    Attributes:
        operator: cosine, linear, sigmoid, learnable.
        eps: added to squared norms, inside the root.
        gain: (O,) parameter that scales the response of each filter, or None.
        k_logit: parameter behind a learned k, (O,) for ``k_shared="filter"`` and (1,) else, or None.
        k_shared: filter, layer, network; means something for the operator learnable alone.
    """

    weight: Tensor
    operator: str
    eps: float
    k_shared: KShared
    gain: nn.Parameter | None
    k_logit: nn.Parameter | None
    fixed_k: float | None

    def set_operator(
        self,
        operator: str = "cosine",
        *,
        k: float | None = None,
        k_shared: KShared = "filter",
        eps: float = DEFAULT_EPS,
        gain: bool = False,
    ) -> None:
        """Give the layer its operator; new parameters (k_logit, gain) stand where the weight stands.

        Raises:
            OptionError: unknown operator, k out of range, unknown k_shared, eps not positive.
        """
        k = checked_k(operator, k)
        if k_shared not in K_SHARED:
            raise OptionError(f"k_shared {k_shared!r} is unknown; choose one of: {', '.join(K_SHARED)}.")
        if not 0 < eps < math.inf:
            raise OptionError(f"eps={eps!r} is no positive number; without it a patch of zeros has no cosine.")
        self.operator, self.eps, self.k_shared = operator, float(eps), k_shared
        filters = self.weight.shape[0]
        self.gain = nn.Parameter(self.matching_gain(operator, k)) if gain else None
        if response_named(operator).learns_k:
            assert k is not None
            count = filters if k_shared == "filter" else 1
            self.k_logit = nn.Parameter(self.weight.detach().new_full((count,), k_to_logit(k)))
            self.fixed_k = None
        else:
            self.k_logit, self.fixed_k = None, k

    def clear_operator(self) -> None:
        """Take off what ``set_operator`` gave: the layer can be what it was again."""
        for name in ("gain", "k_logit"):
            self._parameters.pop(name, None)
            self.__dict__.pop(name, None)
        for name in ("operator", "eps", "k_shared", "fixed_k"):
            del self.__dict__[name]

    def filters(self) -> Tensor:
        """(O, ...): the filters whose angles are taken; subclasses that compute theirs do it here."""
        return self.weight

    def output_gain(self) -> Tensor | None:
        """(O,): what the response is multiplied by, or None."""
        return self.gain

    @torch.no_grad()
    def matching_gain(self, operator: str, k: float | None) -> Tensor:
        """(O,): the gain with which the output has the scale of the inner product it replaces.

        For an input of unit variance the inner product has the standard deviation ``|w|``; the response to a
        patch of random direction has the one that ``Response.spread`` computes. The gain is their ratio.
        """
        if self.weight.is_meta:  # without data there is nothing to match
            return torch.empty(self.weight.shape[0], dtype=self.weight.dtype, device="meta")
        weight = self.filters().flatten(1).to(torch.promote_types(self.weight.dtype, torch.float32))
        gain = weight.norm(dim=1) / response_named(operator).spread(k, weight.shape[1])
        return gain.to(self.weight.dtype)

    @property
    def k(self) -> Tensor | float | None:
        """Softness of the response: a tensor where it is learned, a number where it is fixed, else None."""
        return self.fixed_k if self.k_logit is None else k_from_logit(self.k_logit)

    def operator_repr(self) -> str:
        """What distinguishes this layer from its torch twin, for ``extra_repr``."""
        parts = [f"operator={self.operator}"]
        if self.k_logit is not None:
            k = k_from_logit(self.k_logit.detach())
            spread = "" if k.device.type == "meta" else f", k={k.min():.3g}..{k.max():.3g}"
            parts.append(f"k_shared={self.k_shared}{spread}")
        elif self.fixed_k is not None:
            parts.append(f"k={self.fixed_k:g}")
        if self.eps != DEFAULT_EPS:
            parts.append(f"eps={self.eps:g}")
        if self.gain is not None:
            parts.append("gain=True")
        return ", ".join(parts)
