"""A flag for every value of a recipe, named as in timm's train.py; one that is not given leaves the recipe as it is."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

KINDS: dict[str, tuple[Any, str]] = {  # name: type, help; the names are the fields of spherify.train.Recipe
    "epochs": (float, "Passes over the training images."),
    "steps": (int, "Optimiser steps, instead of epochs."),
    "batch_size": (int, "Images a process and step."),
    "grad_accum_steps": (int, "Batches whose gradients are added up for one step."),
    "seed": (int, "Of weights, order, augmentation and dropout."),
    "opt": (str, "An optimiser of timm."),
    "momentum": (float, "Of the optimiser."),
    "weight_decay": (float, "Of filters and matrices; angular filters and vectors have none."),
    "clip_grad": (float, "Longest gradient."),
    "layer_decay": (float, "Learning rate of a layer as a share of that of the layer behind it."),
    "lr": (float, "Learning rate at the top of the schedule."),
    "sched": (str, "A schedule of timm: cosine, multistep, step, poly, tanh, constant, none."),
    "warmup_epochs": (float, "Epochs of rising learning rate."),
    "cooldown_epochs": (float, "Epochs at the lowest learning rate, at the end."),
    "decay_epochs": (float, "Epochs between the falls of step."),
    "decay_milestones": (list[float], "Where multistep falls: epochs, or below 1 shares of the run (repeatable)."),
    "decay_rate": (float, "By what it falls."),
    "warmup_lr": (float, "Learning rate at the beginning of the warm-up."),
    "min_lr": (float, "Learning rate at the end."),
    "img_size": (int, "Pixels of a side."),
    "no_aug": (bool, "No augmentation."),
    "train_crop_mode": (str, "rrc, rkrc, rkrr, pad, none."),
    "crop_scale": (
        tuple[float, float],
        "Area of a random resized crop (timm: --scale, which here is the radius of a head).",
    ),
    "ratio": (tuple[float, float], "Form of a random resized crop."),
    "hflip": (float, "Share of images mirrored left to right."),
    "vflip": (float, "Share of images mirrored top to bottom."),
    "color_jitter": (float, "Strength of colour changes."),
    "aa": (str, "AutoAugment policy of timm, such as rand-m9-mstd0.5."),
    "reprob": (float, "Share of images with a part erased."),
    "remode": (str, "What erased parts are filled with: const, rand, pixel."),
    "mixup": (float, "Alpha of mixup."),
    "cutmix": (float, "Alpha of cutmix."),
    "mixup_prob": (float, "Share of batches mixed."),
    "mixup_switch_prob": (float, "Share of cutmix, where both are on."),
    "mixup_mode": (str, "batch, pair, elem."),
    "mixup_off_epoch": (int, "Epoch from which nothing is mixed."),
    "smoothing": (float, "Label smoothing."),
    "drop": (float, "Dropout the model is built with."),
    "drop_path": (float, "Stochastic depth the model is built with."),
    "amp": (bool, "Mixed precision."),
    "amp_dtype": (str, "bfloat16, float16."),
    "channels_last": (bool, "Memory layout."),
    "torchcompile": (bool, "torch.compile."),
    "data_on_device": (bool, "All images on the device, augmented there."),
    "model_ema": (bool, "Save a moving average of the weights."),
    "model_ema_decay": (float, "Of the average."),
    "model_ema_warmup": (bool, "Shorter average at the beginning."),
    "sync_bn": (bool, "BatchNorm statistics over all processes."),
    "orthogonality": (float, "Weight of the penalty on filters that are not orthogonal."),
    "energy": (float, "Weight of the penalty on filters that lie close (hyperspherical energy)."),
    "margin_schedule": (str, "How the margin of a margin head grows."),
    "anneal": (str, "From plain to angular layers during training: together, progressive, none."),
    "anneal_until": (float, "Share of the steps after which every layer is angular."),
    "distill": (float, "Share of the loss that draws to the donor's class probabilities."),
    "distill_temperature": (float, "Of those probabilities."),
}


def recipe_flags() -> dict[str, inspect.Parameter]:
    return {
        name: inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, typer.Option(help=text, show_default=False)],
        )
        for name, (kind, text) in KINDS.items()
    }
