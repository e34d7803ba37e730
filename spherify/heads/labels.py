"""Labels checked before the loss: what is wrong with them, in one line."""

from __future__ import annotations

import torch
from torch import Tensor

from spherify.errors import OptionError


def check_hard_labels(target: Tensor, logits: Tensor, classes: int, ignore_index: int) -> None:
    """Integers of the right shape, each a class or ``ignore_index``.

    The range is read at once on the CPU. On an accelerator reading it would wait for the device at every step, so
    an assertion is queued there instead: it stops the run, a little later, with the same words.

    Raises:
        OptionError: soft labels, wrong type, wrong shape, a label out of range.
    """
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise OptionError(f"labels of type {target.dtype} are no class numbers; give integers (torch.long).")
    expected = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else logits.shape[:0]
    if target.shape != expected:
        raise OptionError(
            f"labels of shape {tuple(target.shape)} do not fit logits of shape {tuple(logits.shape)}; "
            f"give shape {tuple(expected)}."
        )
    is_valid = ((target >= 0) & (target < classes)) | (target == ignore_index)
    words = f"a label is out of range for {classes} classes"
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(is_valid.all()):
            wrong = int(target[~is_valid][0])
            raise OptionError(f"{words}: {wrong}; give 0 to {classes - 1}, or {ignore_index} to leave one out.")
    elif target.device.type != "meta":
        torch._assert_async(is_valid.all(), f"{words}; give 0 to {classes - 1}, or {ignore_index} to leave one out.")
