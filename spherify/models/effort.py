"""How to have a detection model do less in a trial run, which needs its data: its layers are the same for few boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

BOXES = 16  # of a stage; by themselves they take up to 1000 for each image
FEW = {"training": BOXES, "testing": BOXES}
IMAGE_SIDES = (160, 192)  # pixels, the shorter at least and the longer at most

MODEST: Mapping[type[nn.Module], Mapping[str, Any]] = {
    GeneralizedRCNNTransform: {"min_size": IMAGE_SIDES[:1], "max_size": IMAGE_SIDES[1]},
    RegionProposalNetwork: {"_pre_nms_top_n": FEW, "_post_nms_top_n": FEW},
    RoIHeads: {"detections_per_img": BOXES},
    RetinaNet: {"topk_candidates": BOXES, "detections_per_img": BOXES},
    FCOS: {"topk_candidates": BOXES, "detections_per_img": BOXES},
    SSD: {"topk_candidates": BOXES, "detections_per_img": BOXES},
}
DETECTORS = (GeneralizedRCNN, RetinaNet, FCOS, SSD)


def modest_settings(model: nn.Module) -> tuple[tuple[str, str, Any], ...]:
    """Path of a module, name of an attribute, and its value for a trial run; empty for all but torchvision's detectors.

    Raises: nothing; an attribute that a module does not have, as in a subclass of one's own, is left out.
    """
    if not any(isinstance(module, DETECTORS) for module in model.modules()):
        return ()
    return tuple(
        (path, name, value)
        for path, module in model.named_modules()
        for kind, values in MODEST.items()
        if isinstance(module, kind)
        for name, value in values.items()
        if hasattr(module, name)
    )
