"""What stands where a norm or an activation was taken away."""

from __future__ import annotations

from torch import Tensor, nn


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

    def extra_repr(self) -> str:
        return f"was {self.source_type.__name__}"
