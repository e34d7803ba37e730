"""Reconstruction: a short optimisation towards the donor's block outputs and answers, on unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spherify.calibrate.distil import BATCH, Schedule, batch_size, distil_
from spherify.calibrate.pair import Pair, Runs
from spherify.calibrate.patches import output_rows
from spherify.calibrate.statistics import Moments, norms_of


def reconstruct_(
    model: nn.Module,
    donor: nn.Module,
    parts: Sequence[Tensor],
    schedule: Schedule,
    progress: Callable[[str], None] = lambda name: None,
    runs: Runs | None = None,
) -> None:
    """Train the model on what the donor makes of fresh images; its norms then get the statistics of their inputs."""
    images = torch.cat(list(parts))
    runs = runs or Runs(model, donor)
    pair = Pair(model, donor, [images[: min(BATCH, len(images) // 4)]], half=False, runs=runs)
    size = batch_size(pair.student.recorded, len(images))
    if size != len(pair.student.batches[0]):
        pair = Pair(model, donor, [images[:size]], half=False, runs=runs)
    distil_(pair, images, schedule, progress)
    settle_norms_(model, images.split(size))


@torch.no_grad()
def settle_norms_(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Give BatchNorms the statistics of their inputs; weight and bias take up the difference, so answers stay."""
    model.eval()
    moments = {norm: Moments() for norm in norms_of(model) if norm.affine}

    def see(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        moments[norm].add(output_rows(inputs[0], inputs[0].dim() > 2))

    hooks = [norm.register_forward_pre_hook(see) for norm in moments]
    try:
        for batch in batches:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for norm, found in moments.items():
        if not found.count or norm.running_mean is None or norm.running_var is None:
            continue
        old = (norm.running_var + norm.eps).sqrt()
        norm.bias.add_(norm.weight * (found.mean - norm.running_mean) / old)
        norm.weight.mul_((found.variance + norm.eps).sqrt() / old)
        norm.running_mean.copy_(found.mean)
        norm.running_var.copy_(found.variance)
