"""How to train, as data: a table of recipes whose every value can be replaced by the flag of its name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from spherify.errors import FileError, OptionError

AMP_DTYPES = ("bfloat16", "float16")
CROPS = ("rrc", "rkrc", "rkrr", "pad", "none")  # the first three are timm's
ANNEALINGS = ("none", "together", "progressive")
PAD = 4  # pixels on each side, as the authors of the paper pad CIFAR


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a training run computes. Names are those of timm's ``train.py`` where it has them.

    Attributes:
        epochs: passes over the training images.
        steps: optimiser steps, instead of epochs.
        batch_size: images a process and step, before accumulation.
        grad_accum_steps: batches whose gradients are added up for one step.
        seed: of weights, order, augmentation and dropout.
        opt: an optimiser of timm. momentum, weight_decay, clip_grad (length of the gradient; None: not clipped),
            layer_decay: as in timm.
        lr: learning rate at the top of the schedule.
        sched: a schedule of timm; it moves with every step. warmup_epochs, cooldown_epochs, decay_epochs,
            warmup_lr, min_lr, decay_rate: as in timm.
        decay_milestones: where multistep divides; epochs, or below 1 shares of the run.
        img_size: pixels of a side; None is what the model, else the data has.
        no_aug: images as in the test.
        train_crop_mode: rrc (random resized crop), rkrc, rkrr as in timm; pad (4 mirrored pixels around, then a
            crop); none.
        crop_scale, ratio: area and form of rrc; the first is timm's ``scale``, which here belongs to the head.
        hflip, vflip: probabilities; hflip None is 0.5 where a mirror image is of the same class.
        color_jitter, aa, reprob, remode: as in timm.
        mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_mode, mixup_off_epoch, smoothing: as in timm.
        drop, drop_path: dropout and stochastic depth that the model is built with; None is the model's own.
        amp, amp_dtype: autocast in bfloat16 or float16.
        channels_last, torchcompile: as in timm.
        data_on_device: all images on the device, augmented there.
        model_ema, model_ema_decay, model_ema_warmup: a moving average of the weights, which is what is saved.
        sync_bn: BatchNorm statistics over all processes.
        orthogonality, energy: weights of the penalties on filters that are not orthogonal, or lie close.
        margin_schedule: how the margin of a margin head grows.
        anneal: together, progressive: converted layers begin as the plain ones they were made from, and turn into
            angular ones, all at once or one after the other, over the share ``anneal_until`` of the steps; none.
        distill: share of the loss that is the divergence from the donor's class probabilities, from 0 to 1, at
            ``distill_temperature``.

    Raises:
        OptionError: a value is out of range.
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 64
    grad_accum_steps: int = 1
    seed: int = 42
    opt: str = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.05
    clip_grad: float | None = None
    layer_decay: float | None = None
    lr: float = 1e-3
    sched: str = "cosine"
    warmup_epochs: float = 0.0
    cooldown_epochs: float = 0.0
    decay_epochs: float = 30.0
    decay_milestones: tuple[float, ...] = ()
    decay_rate: float = 0.1
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    img_size: int | None = None
    no_aug: bool = False
    train_crop_mode: str = "rrc"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    hflip: float | None = None
    vflip: float = 0.0
    color_jitter: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0
    smoothing: float = 0.0
    drop: float | None = None
    drop_path: float | None = None
    amp: bool = False
    amp_dtype: str = "bfloat16"
    channels_last: bool = False
    torchcompile: bool = False
    data_on_device: bool = False
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = True
    sync_bn: bool = False
    orthogonality: float = 0.0
    energy: float = 0.0
    margin_schedule: str = "none"
    anneal: str = "none"
    anneal_until: float = 0.7
    distill: float = 0.0
    distill_temperature: float = 2.0

    def __post_init__(self) -> None:
        problems = [text for is_wrong, text in self.rules() if is_wrong]
        if problems:
            raise OptionError(f"recipe: {'; '.join(problems)}.")

    def rules(self) -> list[tuple[bool, str]]:
        """What may be wrong, and what to say of it."""
        shares = ("reprob", "mixup_prob", "mixup_switch_prob", "vflip", "smoothing", "model_ema_decay", "distill")
        positive = ("epochs", "steps", "batch_size", "grad_accum_steps", "lr", "img_size", "clip_grad")
        weights = ("weight_decay", "warmup_epochs", "cooldown_epochs", "mixup", "cutmix", "orthogonality", "energy")
        return [
            ((self.epochs is None) == (self.steps is None), "give epochs or steps, and not both"),
            *(
                (getattr(self, name) is not None and not getattr(self, name) > 0, f"{name} must be above 0")
                for name in positive
            ),
            *((not getattr(self, name) >= 0, f"{name} must be 0 or above") for name in weights),
            *((not 0 <= getattr(self, name) <= 1, f"{name} must be from 0 to 1") for name in shares),
            (self.seed < 0, "seed must be 0 or above"),
            (self.hflip is not None and not 0 <= self.hflip <= 1, "hflip must be from 0 to 1"),
            (self.amp_dtype not in AMP_DTYPES, f"amp_dtype must be one of: {', '.join(AMP_DTYPES)}"),
            (self.train_crop_mode not in CROPS, f"train_crop_mode must be one of: {', '.join(CROPS)}"),
            (
                len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1],
                "crop_scale must be two rising shares",
            ),
            (len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1], "ratio must be two rising numbers"),
            (any(place <= 0 for place in self.decay_milestones), "decay_milestones must be above 0"),
            (self.anneal not in ANNEALINGS, f"anneal must be one of: {', '.join(ANNEALINGS)}"),
            (not self.distill_temperature > 0, "distill_temperature must be above 0"),
            (not 0 < self.anneal_until < 1, "anneal_until must be between 0 and 1"),
            (self.anneal != "none" and self.torchcompile, "anneal and torchcompile exclude each other"),
            (self.mixes and self.images_a_step % 2 != 0, "mixup and cutmix need an even batch_size"),
        ]

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def images_a_step(self) -> int:
        """Of one process."""
        return self.batch_size * self.grad_accum_steps

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Raises OptionError for a value that is unknown or out of range."""
        check_names(values)
        lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Raises FileError where the file is no recipe, OptionError where there is none."""
        path = Path(path)
        if not path.is_file():
            raise OptionError(f"recipe {path} is no file.")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise FileError(f"{path} is no recipe ({error}).") from error


RECIPES: dict[str, tuple[str, Recipe]] = {
    "fast": (
        "the default: AdamW, one cosine over 6 epochs with a warm-up, small shifts",
        Recipe(
            epochs=6,
            batch_size=64,
            lr=2e-3,
            warmup_epochs=1,
            crop_scale=(0.7, 1.0),
            ratio=(0.9, 1.1),
            smoothing=0.05,
        ),
    ),
    "finetune": (
        "a converted or pretrained network on new data: AdamW, small steps, 10 epochs",
        Recipe(
            epochs=10,
            lr=2e-4,
            weight_decay=0.02,
            warmup_epochs=1,
            clip_grad=1.0,
            crop_scale=(0.35, 1.0),
            smoothing=0.1,
        ),
    ),
    "paper-cifar": (
        "Liu et al. 2017: Adam 1e-3, a tenth at 34k and 54k of 64k steps, batch 128, mirrored images",
        Recipe(
            steps=64_000,
            batch_size=128,
            opt="adam",
            lr=1e-3,
            weight_decay=5e-4,
            sched="multistep",
            decay_milestones=(34 / 64, 54 / 64),
            train_crop_mode="none",
            hflip=0.5,
            orthogonality=1e-4,
        ),
    ),
    "paper-imagenet": (
        "Liu et al. 2017: SGD 0.9, 0.1, a tenth at 200k and 375k of 550k steps",
        Recipe(
            steps=550_000,
            batch_size=40,
            opt="momentum",
            lr=0.1,
            weight_decay=1e-4,
            sched="multistep",
            decay_milestones=(200 / 550, 375 / 550),
            train_crop_mode="rrc",
            crop_scale=(0.5, 1.0),
            hflip=0.5,
            orthogonality=1e-5,
        ),
    ),
}
DEFAULT_RECIPE = "fast"


def resolved(recipe: str | Path | Recipe = DEFAULT_RECIPE, **changes: Any) -> Recipe:
    """A recipe of the table, or one saved as JSON, with some of its values replaced.

    ``epochs`` takes the place of a recipe's ``steps``, and ``steps`` that of its ``epochs``.

    Args:
        recipe: its name, its file, or itself.
        changes: new values; None leaves a value as it is.

    Raises:
        OptionError: the recipe or a value is unknown, or out of range.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    check_names(given)
    if isinstance(recipe, Recipe):
        base = recipe
    elif str(recipe) in RECIPES:
        base = RECIPES[str(recipe)][1]
    elif str(recipe).endswith(".json"):
        base = Recipe.read(recipe)
    else:
        raise OptionError(f"recipe {str(recipe)!r} is unknown; choose one of: {', '.join(RECIPES)}, or a file.json.")
    if "epochs" in given:
        given.setdefault("steps", None)
    elif "steps" in given:
        given["epochs"] = None
    lists: dict[str, Any] = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return replace(base, **{**given, **lists})


def check_names(values: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(Recipe)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; close are {', '.join(close)}" if close else f"; choose among: {', '.join(known)}"
            raise OptionError(f"recipe has no value {name!r}{hint}.")
