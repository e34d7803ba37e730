"""Heads: classifiers on angles, the loss that trains them with a margin, and its schedule."""

from spherify.heads.angular import AngularConv1d, AngularConv2d, AngularConv3d, AngularHead, AngularLinear
from spherify.heads.kinds import HEAD_KINDS, HeadKind, HeadSettings, scale_for, settings_for
from spherify.heads.loss import AngularLoss, criterion
from spherify.heads.schedule import SCHEDULES, MarginSchedule

__all__ = [
    "HEAD_KINDS",
    "SCHEDULES",
    "AngularConv1d",
    "AngularConv2d",
    "AngularConv3d",
    "AngularHead",
    "AngularLinear",
    "AngularLoss",
    "HeadKind",
    "HeadSettings",
    "MarginSchedule",
    "criterion",
    "scale_for",
    "settings_for",
]
