"""Layers inside an adapter (LoRA and its kin), where an update of low rank is added to a layer's inner product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from spherify.graph.site import Site


def with_adapters(model: nn.Module, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The same sites; those inside an adapter say why they cannot be converted.

    The adapter learns a change of the layer's weight. A response of an angle plus the change's inner product is no
    response to the changed weight, and merging the change would give another network.
    """
    adapters = [name for name, module in model.named_modules() if is_adapter(module)]

    def marked(site: Site) -> Site:
        around = next((path for path in adapters if site.name.startswith(f"{path}." if path else "")), None)
        if around is None or site.obstacle is not None:
            return site
        adapter = type(model.get_submodule(around))
        kind = f"{adapter.__module__.partition('.')[0]} {adapter.__name__}"  # "peft Linear"
        reason = (
            f"it belongs to the adapter {around or 'that the model is'} ({kind}), which adds an inner product to its "
            "result; merge it first (merge_and_unload)"
        )
        return replace(site, obstacle=reason)

    return tuple(marked(site) for site in sites)


def is_adapter(module: nn.Module) -> bool:
    """A wrapper in the way of peft: a layer as ``base_layer``, and methods that merge the update into it."""
    base = module._modules.get("base_layer")
    return base is not None and all(callable(getattr(module, name, None)) for name in ("merge", "unmerge"))
