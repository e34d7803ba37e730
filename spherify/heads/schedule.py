"""How strong a margin is at a step of training: annealing by lambda, and a warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spherify.errors import OptionError


@dataclass(frozen=True)
class MarginSchedule:
    """``lambda(t) = max(lambda_min, base (1 + gamma t) ** -power)``; the margin counts ``1 / (1 + lambda)``.

    The target's logit is ``(lambda g(theta) + psi(theta)) / (1 + lambda)``, in units of the feature's length or of
    the scale. For an additive margin the amount itself is multiplied by that share. The warm-up multiplies the
    share by ``t / warmup_steps`` until it is over.

    Attributes:
        base: lambda at the start; 0 is the whole margin from the first step.
        gamma: how fast it falls, a step.
        power: how fast it falls later.
        lambda_min: where it ends.
        warmup_steps: steps until the share is what lambda says.

    Raises:
        OptionError: a number is negative or not finite.

    Source: Liu et al. 2016, Large-Margin Softmax, section 5, and the authors' training files of SphereFace.
    """

    base: float = 0.0
    gamma: float = 0.0
    power: float = 1.0
    lambda_min: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("base", "gamma", "power", "lambda_min", "warmup_steps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise OptionError(f"margin schedule: {name}={value!r} is out of range; give a number of 0 or more.")

    def lambda_at(self, step: Tensor | float) -> Tensor:
        """lambda at a step, in float32."""
        time = torch.as_tensor(step).to(torch.float32)
        return (self.base * (1.0 + self.gamma * time) ** -self.power).clamp_min(self.lambda_min)

    def share_at(self, step: Tensor | float) -> Tensor:
        """How much of the margin counts, in [0, 1]."""
        share = 1.0 / (1.0 + self.lambda_at(step))
        if not self.warmup_steps:
            return share
        return share * (torch.as_tensor(step).to(torch.float32) / self.warmup_steps).clamp_max(1.0)

    @property
    def is_constant(self) -> bool:
        """The whole margin at every step."""
        return self == MarginSchedule(gamma=self.gamma, power=self.power)


SCHEDULES: dict[str, MarginSchedule] = {
    "none": MarginSchedule(),
    "sphereface": MarginSchedule(base=1000.0, gamma=0.12, power=1.0, lambda_min=5.0),  # the authors' sphereface_train
    "l-softmax": MarginSchedule(base=1000.0, gamma=2.5e-5, power=35.0, lambda_min=0.0),  # their CIFAR-10 example
    "sphereface-pytorch": MarginSchedule(base=1500.0, gamma=0.1, power=1.0, lambda_min=5.0),  # clcarwin's port
    "warmup": MarginSchedule(warmup_steps=1000),
}


def schedule_named(schedule: str | MarginSchedule) -> MarginSchedule:
    """A preset by its name, or the schedule given. Raises OptionError with the known names."""
    if isinstance(schedule, MarginSchedule):
        return schedule
    if schedule not in SCHEDULES:
        raise OptionError(
            f"margin schedule {schedule!r} is unknown; choose one of: {', '.join(SCHEDULES)}, or a MarginSchedule."
        )
    return SCHEDULES[schedule]
