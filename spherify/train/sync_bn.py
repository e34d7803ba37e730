"""BatchNorm over all processes, for as long as a run lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def with_synchronised_norms(model: nn.Module) -> Iterator[None]:
    """Every plain BatchNorm is a ``SyncBatchNorm`` within the block, and afterwards what it was.

    The class alone changes, so that Parameters, hooks and references hold, and a converted model can be saved.
    """
    changed = {module: type(module) for module in model.modules() if type(module) in KINDS}
    for module in changed:
        module.__dict__["process_group"] = None
        module.__class__ = nn.SyncBatchNorm
    try:
        yield
    finally:
        for module, kind in changed.items():
            module.__class__ = kind
            module.__dict__.pop("process_group", None)
