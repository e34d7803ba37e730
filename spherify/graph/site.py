"""A site: one layer with weights, and what the graph says about it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

KINDS = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d", nn.Linear: "linear"}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One module object that multiplies its input by a weight, under all its names.

    Attributes:
        name: the first qualified name; "" is the model itself.
        aliases: its other names, where one object is registered several times.
        source_type: the exact class.
        kind: conv1d, conv2d, conv3d, linear; "other" for anything else that holds such a weight.
        shape: of the weight, (O, C/G, U, V) or (O, D).
        fan_in: length of a patch, C/G U V or D.
        groups: 1 for linear layers.
        has_bias: whether it adds one.
        calls_eval, calls_train: how often its forward ran in the recorded runs.
        read_by: modules other than itself that read its weight.
        stood_in_by: the same modules, if all of them multiply by the weight in the layer's stead and no more.
        norm: path of the BatchNorm that alone consumes its output, else None.
        activation: path of the activation module that alone consumes its output, or that of the BatchNorm.
        roles: "@stem", "@shortcut", ... (graph/roles.py).
        obstacle: why this object cannot be converted whatever its type, else None.
    """

    name: str
    aliases: tuple[str, ...]
    source_type: type[nn.Module]
    kind: str
    shape: tuple[int, ...]
    fan_in: int
    groups: int
    has_bias: bool
    calls_eval: int
    calls_train: int
    read_by: tuple[str, ...] = ()
    stood_in_by: tuple[str, ...] = ()
    norm: str | None = None
    activation: str | None = None
    roles: frozenset[str] = frozenset()
    obstacle: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def type(self) -> str:
        return self.source_type.__name__
