"""A run: model, optimiser and all that goes with them, how far it is, and how to take it down and set it up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spherify.errors import FileError, OptionError, SpherifyError
from spherify.train.checkpoint import Checkpoint
from spherify.train.distill import Distilled
from spherify.train.objective import objective_for, penalty_for
from spherify.train.optimizer import optimizer_for, scheduler_for
from spherify.train.random_state import set_again, start_from
from spherify.train.recipe import Recipe

RANDOM_STREAM = 10_000_019  # keeps the generators of the processes apart


@dataclass(kw_only=True)
class Run:
    """Everything that changes while training.

    Attributes:
        model: the network itself; ``wrapped`` is what is called, with DDP and compilation around it.
        updates: optimiser steps an epoch.
        total: optimiser steps of the whole run.
        own_forward: the model's own attributes of that name, before accelerate wraps its forward.
        step: steps done.
        tested: the step after which the model was tested last.
    """

    model: nn.Module
    wrapped: nn.Module
    accelerator: Any
    optimizer: Any
    scheduler: Any
    objective: nn.Module
    penalty: Callable[[], Tensor] | None
    average: ModelEmaV3 | None
    mixup: Mixup | None
    recipe: Recipe
    updates: int
    total: int
    own_forward: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    tested: int = 0

    @property
    def epoch(self) -> int:
        return self.step // self.updates

    @property
    def sees(self) -> Callable[[Tensor], Any] | None:
        """What the objective wants to be told of the inputs before each forward."""
        return getattr(self.objective, "see", None)

    @property
    def moves_on(self) -> Callable[[], Any] | None:
        """What the objective does after each step."""
        return getattr(self.objective, "step", None)

    @property
    def lr(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def taken_down(self, rows: list[dict[str, Any]], random_states: list[dict[str, Any]]) -> Checkpoint:
        """This moment, to be written by one process."""
        scaler = self.accelerator.scaler
        return Checkpoint(
            step=self.step,
            weights=dict(self.model.state_dict()),
            average=None if self.average is None else dict(self.average.module.state_dict()),
            state={
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "objective": self.objective.state_dict(),
                "random": random_states,
                "tested": self.tested,
                "updates": self.updates,
                "recipe": self.recipe.to_dict(),
                "rows": rows,
            },
        )

    def set_up_again(self, checkpoint: Checkpoint, rank: int) -> list[str]:
        """Go on from a checkpoint; what the user should know of it.

        Raises:
            OptionError: it was made by another recipe, or from another number of images.
            FileError: it does not fit the model.
        """
        state = checkpoint.state
        check_same_recipe(self.recipe, state["recipe"])
        if state["updates"] != self.updates:
            raise OptionError(
                f"an epoch has {self.updates} steps now and had {state['updates']} before; "
                "give the same data, and the same batch size over all processes."
            )
        try:
            self.model.load_state_dict(checkpoint.weights)
            if self.average is not None and checkpoint.average is not None:
                self.average.module.load_state_dict(checkpoint.average)
            self.optimizer.load_state_dict(state["optimizer"])
            self.objective.load_state_dict(state["objective"])
        except (RuntimeError, ValueError, KeyError) as error:
            text = " ".join(str(error).split())[:160]
            raise FileError(f"the checkpoint of step {checkpoint.step} does not fit this model ({text}).") from error
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tested = checkpoint.step, state["tested"]
        if rank < len(state["random"]):
            set_again(state["random"][rank])
            return []
        start_from(self.recipe.seed + RANDOM_STREAM * (rank + 1) + self.step)
        return [f"Process {rank} is new since the checkpoint; its dropout goes on from fresh random numbers."]


def check_same_recipe(recipe: Recipe, before: dict[str, Any]) -> None:
    now = recipe.to_dict()
    differing = [name for name in now if now[name] != before.get(name)]
    if differing:
        name = differing[0]
        raise OptionError(
            f"{name} is {now[name]!r} now and was {before.get(name)!r} when the run began; "
            "resume with the recipe it began with, or begin another one in another folder."
        )


def start_run(
    model: nn.Module,
    recipe: Recipe,
    batches_an_epoch: int,
    accelerator: Any,
    objective: nn.Module | None,
    classes: int,
    donor: nn.Module | None = None,
) -> Run:
    """Make optimiser, schedule, average and objective for a model, and wrap it for this machine.

    Raises:
        OptionError: the optimiser or the schedule is unknown, or does not go with this device.
    """
    start_from(recipe.seed + RANDOM_STREAM * accelerator.process_index)
    updates = batches_an_epoch // recipe.grad_accum_steps
    total = recipe.steps if recipe.steps is not None else max(1, round((recipe.epochs or 0) * updates))
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(accelerator.device)
    average = average_of(model, recipe)
    objective = objective_for(model, recipe) if objective is None else objective
    if recipe.distill and donor is not None:
        objective = Distilled(objective, donor, share=recipe.distill, temperature=recipe.distill_temperature)
    objective = objective.to(accelerator.device)
    optimizer = optimizer_for(model, recipe)
    scheduler = scheduler_for(optimizer, recipe, updates, total)
    own_forward = {name: value for name, value in vars(model).items() if "forward" in name}
    wrapped = accelerator.prepare_model(model)
    return Run(
        model=model,
        wrapped=wrapped,
        accelerator=accelerator,
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=scheduler,
        objective=objective,
        penalty=penalty_for(model, recipe),
        average=average,
        mixup=mixup_for(recipe, classes),
        recipe=recipe,
        updates=updates,
        total=total,
        own_forward=own_forward,
    )


def average_of(model: nn.Module, recipe: Recipe) -> ModelEmaV3 | None:
    if not recipe.model_ema:
        return None
    return ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)


def mixup_for(recipe: Recipe, classes: int) -> Mixup | None:
    if not recipe.mixes:
        return None
    if classes == 0:
        raise OptionError("mixup and cutmix need the number of classes; give Loaders(classes=...).")
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        mode=recipe.mixup_mode,
        label_smoothing=recipe.smoothing,
        num_classes=classes,
    )


def make_accelerator(recipe: Recipe) -> Any:
    """accelerate's, for this machine and the processes that torchrun or accelerate started.

    Raises:
        SpherifyError: accelerate is not installed.
        OptionError: the recipe needs what this machine or launcher does not have.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType, GradientAccumulationPlugin, TorchDynamoPlugin
    except ImportError:
        raise SpherifyError("training needs accelerate; install it with: pip install 'spherify[train]'.") from None
    AcceleratorState._reset_state()  # a run before this one in this process may have had another precision
    precision = {"bfloat16": "bf16", "float16": "fp16"}[recipe.amp_dtype] if recipe.amp else None
    if precision == "fp16" and not torch.cuda.is_available():
        raise OptionError("amp_dtype float16 needs a GPU; choose bfloat16.")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.grad_accum_steps, sync_with_dataloader=False
        ),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if recipe.torchcompile else None,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise OptionError(
            f"{accelerator.distributed_type.value} is not supported by this loop; "
            "launch with plain data parallelism, or write a loop of your own around the converted model."
        )
    if recipe.sync_bn and accelerator.device.type != "cuda":
        raise OptionError("sync_bn needs GPUs; PyTorch has no synchronised BatchNorm on the CPU.")
    assert PartialState().initialized
    return accelerator


def released(run: Run) -> None:
    """Take off the model what accelerate put around its forward."""
    for name in ("forward", "_original_forward"):
        if name in run.own_forward:
            run.model.__dict__[name] = run.own_forward[name]
        else:
            run.model.__dict__.pop(name, None)
