"""The objective of angular heads: cross-entropy with a margin on the angle to the right class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherify.errors import ModelError, OptionError
from spherify.functional.margins import MARGINS, angle_of, psi
from spherify.heads.angular import NORM_FACTOR, AngularHead
from spherify.heads.kinds import HEAD_KINDS, HeadSettings
from spherify.heads.labels import check_hard_labels
from spherify.heads.schedule import MarginSchedule, schedule_named

REDUCTIONS = ("mean", "sum", "none")
HEADS_OF_MODEL = "spherify_heads"  # attribute of a converted model: paths of its angular heads


class AngularLoss(nn.Module):
    """``loss = criterion(model(x), y)``: cross-entropy, with the margin of the model's head while it trains.

    Made by ``criterion(model)``. The margin acts on the output of a head in train mode (for heads with a scale:
    while gradients are recorded), and never after ``criterion.eval()``; else the loss is that of the margin-free
    logits, so that the same object serves for validation. A tuple, list or dict of outputs (distilled double heads,
    auxiliary heads) gives the mean of their losses.

    Args:
        settings: of the head; None for a plain classifier, whose loss is torch's, soft labels included.
        num_classes: how many logits there are; None reads it from each output (plain classifiers only).
        label_smoothing: epsilon in [0, 1): ``1 - epsilon`` of the loss is that of the label, and epsilon the mean
            over all classes, both from the logits with the margin.
        schedule: a name in ``SCHEDULES`` or a ``MarginSchedule``; ``step()`` advances it.
        reduction: mean, sum, none.
        ignore_index: a label that counts nothing.

    Shape:
        output (N, M), (N, M + 1) or (N, M, ...); labels (N) or (N, ...), integers.

    Raises:
        OptionError: an argument, an output or labels that do not fit, in one line.

    Source: Liu et al. 2017, Deep Hyperspherical Learning, arXiv:1711.03189, eq. 9 to 11.
    """

    steps: Tensor

    def __init__(
        self,
        settings: HeadSettings | None,
        num_classes: int | None = None,
        *,
        label_smoothing: float = 0.0,
        schedule: str | MarginSchedule = "none",
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise OptionError(f"label_smoothing={label_smoothing!r} is out of range; choose a number in [0, 1).")
        if reduction not in REDUCTIONS:
            raise OptionError(f"reduction {reduction!r} is unknown; choose one of: {', '.join(REDUCTIONS)}.")
        if settings is not None and num_classes is None:
            raise OptionError("num_classes is missing; give the number of logits of the head.")
        self.settings, self.num_classes = settings, num_classes
        self.label_smoothing, self.reduction, self.ignore_index = label_smoothing, reduction, ignore_index
        self.schedule = schedule_named(schedule)
        # A buffer, so that the training state holds it; a tensor, so that no step compiles anything anew.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def step(self) -> None:
        """One step of training is done: the schedule moves on."""
        self.steps += 1

    @property
    def share(self) -> Tensor:
        """How much of the margin counts at this step, in [0, 1]."""
        return self.schedule.share_at(self.steps)

    def forward(self, output: Any, target: Tensor) -> Tensor:
        losses = [self.loss_of(logits, target) for logits in outputs_in(output)]
        if not losses:
            raise OptionError(f"the output is a {type(output).__name__} without a tensor; give the model's logits.")
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)

    def loss_of(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of one output."""
        dim = 1 if logits.dim() > 1 else 0
        classes, has_norm = self.checked_width(logits, dim)
        is_soft = target.is_floating_point() and target.dim() == logits.dim()
        with_margin = self.acts_on(has_norm)
        if is_soft and (has_norm or with_margin):
            raise OptionError(
                "soft labels (mixup, cutmix, distillation) and a margin exclude each other: the margin needs the one "
                "right class; give class numbers, or convert with head='w-softmax'."
            )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if is_soft:
            return self.cross_entropy(wide, target.to(wide.dtype))
        check_hard_labels(target, logits, classes, self.ignore_index)
        target = target.long()
        plain = wide.narrow(dim, 0, classes)
        if with_margin:
            assert self.settings is not None
            length = wide.narrow(dim, classes, 1) / NORM_FACTOR if has_norm else self.settings.scale
            plain = self.with_margin(plain, length, target, dim)
        return self.cross_entropy(plain, target)

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Torch's, with the options of this criterion."""
        return F.cross_entropy(
            logits,
            target,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )

    def acts_on(self, has_norm: bool) -> bool:
        """Whether the margin counts for this output."""
        if self.settings is None or not self.settings.has_margin or not self.training:
            return False
        return has_norm or (self.settings.scale is not None and torch.is_grad_enabled())

    def checked_width(self, logits: Tensor, dim: int) -> tuple[int, bool]:
        """The number of classes, and whether the channel with the feature's length follows them."""
        if logits.dim() == 0 or not logits.is_floating_point():
            raise OptionError(
                f"an output of type {logits.dtype} and shape {tuple(logits.shape)} holds no logits; "
                "give what the model returns."
            )
        width = logits.shape[dim]
        if self.num_classes is None or width == self.num_classes:
            return width, False
        if width == self.num_classes + 1 and self.settings is not None and self.settings.gives_norm:
            return self.num_classes, True
        raise OptionError(
            f"logits of shape {tuple(logits.shape)} do not have the {self.num_classes} classes of this criterion in "
            f"dimension {dim}; make the criterion from the model that gives them."
        )

    def with_margin(self, plain: Tensor, length: Tensor | float | None, target: Tensor, dim: int) -> Tensor:
        """The logits with psi in the place of g, as far as the schedule says.

        Args:
            plain: (N, M, ...) margin-free logits.
            length: (N, 1, ...) of the features, or the scale.
            target: (N, ...) class numbers.
        """
        settings = self.settings
        assert settings is not None and length is not None
        entry = MARGINS[HEAD_KINDS[settings.kind].margin]
        index = target.clamp(0, plain.shape[dim] - 1).unsqueeze(dim)
        right = plain.gather(dim, index)
        response = (plain if entry.is_on_others else right) / length
        angle = angle_of(response, operator=settings.operator, k=settings.k)
        share = self.share.to(plain.dtype)
        amount = settings.margin * share if entry.is_additive else settings.margin
        changed = psi(angle, entry.name, amount, operator=settings.operator, k=settings.k)
        if not entry.is_additive and not self.schedule.is_constant:
            changed = response + share * (changed - response)
        changed = changed * length
        return changed.scatter(dim, index, right) if entry.is_on_others else plain.scatter(dim, index, changed)

    def extra_repr(self) -> str:
        words = [str(self.settings or "plain"), f"classes={self.num_classes}", f"{self.schedule}"]
        return ", ".join([*words, f"label_smoothing={self.label_smoothing:g}", f"reduction={self.reduction}"])


def outputs_in(output: Any) -> Iterator[Tensor]:
    """The logits of a model: a tensor, or a tuple, list or dict of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from outputs_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from outputs_in(value)


def heads_of(model: nn.Module) -> dict[str, AngularHead]:
    """The angular heads of a model, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AngularHead)}


def criterion(
    model: nn.Module,
    *,
    label_smoothing: float = 0.0,
    schedule: str | MarginSchedule = "none",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> AngularLoss:
    """The loss that goes with a model: ``loss = criterion(model)(model(x), y)``.

    Args:
        model: converted or not, also inside DDP or ``torch.compile``. Its head's kind, operator, margin and scale
            are read now. Without an angular head the loss is torch's cross-entropy.
        label_smoothing, schedule, reduction, ignore_index: as in ``AngularLoss``.

    Raises:
        ModelError: the angular head of a conversion was replaced since, or the heads differ from each other.
        OptionError: a schedule with a head that has no margin, or an argument out of range.
    """
    heads = heads_of(model)
    check_that_no_head_was_replaced(model)
    first = next(iter(heads.values()), None)
    settings = None if first is None else first.settings
    for name, head in heads.items():
        if head.settings != settings or head.num_classes != heads[next(iter(heads))].num_classes:
            one = next(iter(heads))
            raise ModelError(f"the heads {one} and {name} differ in kind or size; make an AngularLoss for each.")
    if schedule_named(schedule) != MarginSchedule() and (settings is None or not settings.has_margin):
        kind = "a plain classifier" if settings is None else f"a {settings.kind} head"
        raise OptionError(f"schedule={schedule!r}: {type(model).__name__} has {kind}, without a margin to schedule.")
    return AngularLoss(
        settings,
        None if first is None else first.num_classes,
        label_smoothing=label_smoothing,
        schedule=schedule,
        reduction=reduction,
        ignore_index=ignore_index,
    )


def check_that_no_head_was_replaced(model: nn.Module) -> None:
    """Raises ModelError where a conversion made an angular head and a plain layer stands now (reset_classifier)."""
    for part in model.modules():
        for path in part.__dict__.get(HEADS_OF_MODEL, ()):
            owner: Any = part
            for step in path.split(".") if path else ():
                owner = getattr(owner, "_modules", {}).get(step)
            if not isinstance(owner, AngularHead):
                raise ModelError(
                    f"{path or type(part).__name__} was converted to an angular head and is a {type(owner).__name__} "
                    "now, without a margin; convert again with spherify(unspherify(model), head=...), or use "
                    "torch.nn.CrossEntropyLoss."
                )
