"""Detection models do little in a trial run, and other models what they do."""

import pytest
from networks import hollow

from spherify.models.effort import BOXES, DETECTORS, IMAGE_SIDES, MODEST, modest_settings

DETECTION = ("fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16")


@pytest.mark.parametrize("name", DETECTION)
def test_a_detector_has_what_is_set(name):
    model = hollow(f"torchvision:{name}")
    settings = modest_settings(model)
    assert isinstance(model, DETECTORS)
    for path, attribute, value in settings:
        assert type(getattr(model.get_submodule(path), attribute)) is type(value), attribute
    assert ("transform", "max_size", IMAGE_SIDES[1]) in settings


def test_each_entry_of_the_table_is_met():
    models = [hollow(f"torchvision:{name}") for name in DETECTION]
    met = {(path, name) for model in models for path, name, _ in modest_settings(model)}
    assert {name for _, name in met} == {name for values in MODEST.values() for name in values}
    assert {("roi_heads", "detections_per_img"), ("rpn", "_post_nms_top_n"), ("", "topk_candidates")} <= met


def test_boxes_are_few():
    settings = modest_settings(hollow("torchvision:retinanet_resnet50_fpn"))
    assert ("", "detections_per_img", BOXES) in settings


def test_other_models_are_left_alone():
    assert modest_settings(hollow("resnet18")) == ()
