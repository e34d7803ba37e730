"""Conversion as a homotopy: from the donor's inner product to the angle, while the network is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Self

from spherify.errors import OptionError
from spherify.functional.cosine import box_sum, flat, padding_at_both_ends, patch_energy, per_axis
from spherify.functional.plain import per_filter
from spherify.functional.responses import RESPONSES
from spherify.functional.sphere import plain_conv
from spherify.layers.angular import AngularLayer
from spherify.layers.attention import SphereMultiheadAttention
from spherify.layers.conv import SphereConv

MOMENTUM_ON_THE_WAY = 0.5  # of BatchNorms while powers rise

SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    # share of the training done, number of the layer, number of layers -> power
    "together": lambda done, layer, layers: min(1.0, max(0.0, done)),
    "progressive": lambda done, layer, layers: min(1.0, max(0.0, done * layers - layer)),
}


class Annealing:
    """While it is on, every converted layer answers ``g_p(c) (|w| |x|)^(1 - p)``, with p rising from 0 to 1.

    At p = 0 that is the inner product: the network is its donor. At p = 1 it is the SphereConv. Between them
    ``g_p = (1 - p) c + p g(c)``, and a learned gain enters as ``gain ^ p``. It works in any training loop::

        with Annealing(model, until=0.7) as annealing:
            for step in range(total):
                annealing.on_step(step, total)
                ...

    The sizes of answers change by orders of magnitude on the way, and running statistics of BatchNorms must follow. In
    train mode their momentum is a half while powers rise; at p = 1 everywhere they begin anew with the average of the
    batches since, until that is as long as their own momentum says.

    Args:
        model: what ``spherify`` returned, its weights untouched.
        schedule: ``together``: all layers at once; ``progressive``: layer by layer, in the order of the modules.
        until: share of the steps after which p is 1.

    Raises:
        OptionError: an unknown schedule, ``until`` out of range, or nothing to anneal.
    """

    def __init__(self, model: nn.Module, *, schedule: str = "together", until: float = 0.7) -> None:
        if schedule not in SCHEDULES:
            raise OptionError(f"annealing schedule {schedule!r} is unknown; choose one of: {', '.join(SCHEDULES)}.")
        if not 0 < until <= 1:
            raise OptionError(f"until={until!r} is out of range; choose a share of the steps in (0, 1].")
        modules = [part for part in model.modules() if isinstance(part, AngularLayer)]
        self.layers = [part for part in modules if isinstance(part, (SphereConv, nn.Linear, SphereMultiheadAttention))]
        if not self.layers:
            raise OptionError(f"{type(model).__name__} has no converted layer to anneal.")
        self.schedule, self.until = SCHEDULES[schedule], until
        self.powers = [0.0] * len(self.layers)
        self.hooks: list[Any] = []
        norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
        self.momenta = {norm: norm.momentum for norm in norms if norm.momentum is not None}

    def on_step(self, step: int, total: int) -> None:
        """Set the powers for a step, counted from 0, of a training of so many steps."""
        done = step / max(1, total * self.until)
        self.powers = [self.schedule(done, number, len(self.layers)) for number in range(len(self.layers))]
        whole = step - math.ceil(total * self.until) + 1  # batches at p = 1 everywhere, with this one
        for norm, own in self.momenta.items() if step > 0 else ():
            norm.momentum = max(own, MOMENTUM_ON_THE_WAY if whole < 1 else 1.0 / whole)

    def __enter__(self) -> Self:
        for number, layer in enumerate(self.layers):
            self.hooks.append(layer.register_forward_hook(self.hook(number), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        for norm, own in self.momenta.items():
            norm.momentum = own

    def hook(self, number: int) -> Callable[..., Any]:
        def answer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            power = self.powers[number]
            if power >= 1.0:
                return None
            if isinstance(layer, SphereMultiheadAttention):
                return annealed_attention(layer, power)(*args, **kwargs)
            return annealed(layer, args[0], power, kwargs.get("bias")).to(output.dtype)

        return answer


def annealed_attention(layer: SphereMultiheadAttention, power: float) -> Callable[..., Any]:
    """The forward of an attention whose packed weight answers at this power; it has the layer's own Parameters."""
    stand_in = copy.copy(layer)

    def project(x: Tensor, rows: slice) -> Tensor:
        bias = layer.in_proj_bias
        return annealed(layer, x, power, None if bias is None else bias[rows], rows)

    stand_in.__dict__["project"] = project
    return stand_in.forward


def annealed(layer: Any, x: Tensor, power: float, bias: Tensor | None = None, rows: slice | None = None) -> Tensor:
    """What a converted layer answers at this power; of packed weights, some rows and their bias."""
    weight = layer.filters()
    if rows is not None:
        weight = weight[rows]
    trailing = weight.dim() - 2
    if isinstance(layer, SphereConv):
        x, padding = layer.padded(x)
        window = (layer.stride, padding, layer.dilation, layer.groups, layer.padding_mode)
        product = plain_conv(x, weight, None, *window)
        norm = patch_lengths(layer, x, padding)
    else:
        product = F.linear(x, weight)
        norm = (x.float().square().sum(-1, keepdim=True) + layer.eps).sqrt()
    length = per_filter((weight.flatten(1).square().sum(1) + layer.eps).sqrt(), len(weight), trailing, "length")
    size = norm * length
    cosine = (product / size).clamp(-1.0, 1.0)
    k, gain = layer.k, layer.output_gain()
    if rows is not None:
        k, gain = (of_rows(value, rows) for value in (k, gain))
    if isinstance(k, Tensor):
        k = per_filter(k, len(weight), trailing, "k")
    response = (1.0 - power) * cosine + power * RESPONSES[layer.operator].function(cosine, k)
    out = response * size ** (1.0 - power)
    if gain is not None:
        out = out * per_filter(gain.abs().clamp_min(1e-6) ** power * gain.sign(), len(weight), trailing, "gain")
    if bias is None and rows is None:
        bias = layer.bias
    return out if bias is None else out + per_filter(bias, len(weight), trailing, "bias")


def of_rows(value: Any, rows: slice) -> Any:
    """The part of a number for each filter; one number, or none, serves all of them."""
    return value[rows] if isinstance(value, Tensor) and value.numel() > 1 else value


def patch_lengths(layer: SphereConv, x: Tensor, padding: Any) -> Tensor:
    """(N, 1 or O, P, Q): the length of each patch, for each filter of its group."""
    dims = layer.weight.dim() - 2
    window = layer.weight.shape[2:]
    stride, dilation = per_axis(layer.stride, dims, "stride"), per_axis(layer.dilation, dims, "dilation")
    pads = flat(padding_at_both_ends(padding, window, stride, dilation))
    if any(pads):
        x = F.pad(x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    energy = box_sum(patch_energy(x, layer.groups), window, stride, dilation)
    lengths = (energy + layer.eps).sqrt()
    return lengths if layer.groups == 1 else lengths.repeat_interleave(len(layer.weight) // layer.groups, 1)


def distillation(donor: nn.Module, *, temperature: float = 2.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss ``(outputs, inputs)``: the divergence of a student's class probabilities from the donor's.

    Args:
        temperature: divides both logits, above 0.

    Source: Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
    """
    if not temperature > 0:
        raise OptionError(f"temperature={temperature!r} is not positive.")
    donor = donor.eval()

    def loss(outputs: Tensor, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = donor(inputs)
        return divergence_at(temperature, outputs, wanted)

    return loss


def divergence_at(temperature: float, outputs: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence of class probabilities (N, M) from those wanted, times the squared temperature.

    So that its gradient keeps its size; in float32 or wider.
    """
    wide = torch.promote_types(outputs.dtype, torch.float32)
    mine, theirs = ((logits.to(wide) / temperature).log_softmax(-1) for logits in (outputs, wanted))
    return temperature**2 * F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
