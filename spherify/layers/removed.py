"""What stands where a norm or an activation was taken away."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import Self


class Removed(nn.Module):
    """The identity, but for the dropout and activation that timm keeps inside its norms.

    Made by changing the class of the module it replaces, so that every name and every hook of it stays.
    """

    source_type: type[nn.Module]
    source_words: str  # its extra_repr
    stored_state: tuple[dict, dict]  # Parameters and buffers of what was removed, out of the state dict

    def forward(self, x: Tensor) -> Tensor:
        for name in ("drop", "act"):
            part = self._modules.get(name)
            if part is not None:
                x = part(x)
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """``to``, ``half`` and the like reach what is kept for the way back, too."""
        super()._apply(fn, recurse)
        for tensors in self.stored_state:
            for name, tensor in tensors.items():
                if tensor is None or tensor.is_meta:
                    continue
                moved = fn(tensor.data)
                if not moved.is_meta:
                    tensor.data = moved
                else:
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
        return self

    def extra_repr(self) -> str:
        return f"was {self.source_type.__name__}"
