"""Heads are found in every form: linear, convolutional, several, composite, per level, none."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import FromFunction, Residual, conv_bn, decisions_of, hollow, image, names_with, small_net
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from spherify.convert import plan

SLOW = pytest.mark.slow

HEADS = [
    ("resnet18", {"fc"}),
    ("test_vit", {"head"}),
    ("resnetv2_50", {"head.fc"}),  # a Conv2d
    ("deit_tiny_distilled_patch16_224", {"head", "head_dist"}),  # a tuple
    ("crossvit_tiny_240", {"head.0", "head.1"}),  # a ModuleList
    ("repvit_m0_9", {"head.head.l", "head.head_dist.l"}),  # a composite
    ("levit_128s", {"head.linear", "head_dist.linear"}),  # a tuple of NormLinear
    ("vit_small_patch16_dinov3", set()),  # Identity
    ("torchvision:squeezenet1_0", {"classifier.1"}),  # a Conv2d, with a ReLU and a pool behind
    ("torchvision:mobilenet_v3_small", {"classifier.3"}),
    ("torchvision:vit_b_16", {"heads.head"}),
    ("torchvision:swin_t", {"head"}),
    ("torchvision:vgg11", {"classifier.6"}),
    ("torchvision:densenet121", {"classifier"}),
    ("torchvision:googlenet", {"aux1.fc2", "aux2.fc2", "fc"}),
    ("torchvision:s3d", {"classifier.1"}),  # a Conv3d, averaged over time
    ("torchvision:r3d_18", {"fc"}),
    ("torchvision:mvit_v1_b", {"head.1"}),
    ("torchvision:swin3d_t", {"head"}),
    ("torchvision:lraspp_mobilenet_v3_large", {"classifier.low_classifier", "classifier.high_classifier"}),  # added
    ("gemma4_vit_167m_enc", set()),  # no get_classifier: an encoder
    ("qwen3_vit_88m_enc", set()),
    pytest.param("mobilenetv5_300m_enc", set(), marks=SLOW),
]


@pytest.mark.parametrize(("name", "expected"), HEADS)
def test_heads_of_known_networks(name, expected):
    assert names_with("@head", hollow(name)) == expected


def test_a_head_taken_away_is_no_head():
    model = hollow("resnet18")
    model.reset_classifier(0)
    assert names_with("@head", model) == set()


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_the_heads_of_a_segmentation_are_its_last_convolutions(name):
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, aux_loss=True)
    assert names_with("@head", model, image(2, 3, 64, 64)) == {"classifier.4", "aux_classifier.4"}


def test_the_auxiliary_head_of_inception_counts():
    model = torchvision.models.inception_v3(init_weights=False)
    assert names_with("@head", model, torch.empty(2, 3, 299, 299, device="meta")) == {"AuxLogits.fc", "fc"}


@SLOW
@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_a_flow_that_is_refined_step_by_step_has_no_head(name):
    model = torchvision.models.get_model(name, weights=None)
    frame = torch.empty(1, 3, 128, 128, device="meta")
    assert names_with("@head", model, (frame, frame)) == set()  # each step's flow is read by the next one's layers


BOX = {f"roi_heads.box_predictor.{name}" for name in ("cls_score", "bbox_pred")}
PROPOSALS = {f"rpn.head.{name}" for name in ("cls_logits", "bbox_pred")}
LEVELS = [f"head.{task}_head.module_list" for task in ("classification", "regression")]
DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": BOX | PROPOSALS,
    "maskrcnn_resnet50_fpn": BOX | PROPOSALS | {"roi_heads.mask_predictor.mask_fcn_logits"},
    "keypointrcnn_resnet50_fpn": BOX | PROPOSALS | {"roi_heads.keypoint_predictor.kps_score_lowres"},
    "retinanet_resnet50_fpn": {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"},
    "fcos_resnet50_fpn": {
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",  # a ReLU follows, for distances are positive
        "head.regression_head.bbox_ctrness",
    },
    "ssd300_vgg16": {f"{path}.{level}" for path in LEVELS for level in range(6)},
    "ssdlite320_mobilenet_v3_large": {f"{path}.{level}.1" for path in LEVELS for level in range(6)},
}


def detector(name):
    """On meta, so with weights of zero when run on the CPU: every score is the same and boxes are found at once."""
    sizes = {} if name.startswith("ssd") else dict(min_size=96, max_size=128)
    sizes |= dict(rpn_post_nms_top_n_test=20, box_detections_per_img=5) if "rcnn" in name else {}
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, **sizes)


@SLOW
@pytest.mark.parametrize(("name", "expected"), DETECTORS.items(), ids=DETECTORS)
def test_the_heads_of_a_detector_are_its_predictors_at_every_level(name, expected):
    assert names_with("@head", detector(name)) == expected


def test_the_head_of_a_model_of_ones_own_is_its_last_layer():
    assert names_with("@head", small_net(), image()) == {"7"}


def test_a_head_behind_a_softmax_is_a_head():
    assert names_with("@head", nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.Softmax(-1))) == {"2"}


def test_heads_whose_outputs_are_several_are_all_heads():
    model = FromFunction(
        lambda self, x: {"age": self.a(self.body(x)), "name": self.b(self.body(x))},
        body=nn.Linear(6, 6),
        a=nn.Linear(6, 4),
        b=nn.Linear(6, 3),
    )
    assert names_with("@head", model, torch.rand(2, 6)) == {"a", "b"}


def test_a_composite_head_without_layers_of_the_right_width_ends_with_its_last_layer():
    model = FromFunction(lambda self, x: self.head(self.body(x)), body=nn.Linear(6, 6), head=nn.Sequential())
    model.head.extend([nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)])
    type(model).get_classifier = lambda self: self.head
    try:
        assert names_with("@head", model, torch.rand(2, 6)) == {"head.2"}
    finally:
        del type(model).get_classifier


def trunk(*last):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *last)


POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
HEADLESS = {
    "conv, BatchNorm, ReLU": trunk(conv_bn(8, 8), nn.ReLU()),
    "conv, BatchNorm": trunk(conv_bn(8, 4)),
    "a map of features": trunk(nn.Conv2d(8, 8, 3)),
    "a residual block": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(8, 8)),
    "features averaged": trunk(nn.Conv2d(8, 8, 3), nn.ReLU(), *POOLED),
    "features flattened": trunk(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()),
    "a linear layer and ReLU": nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()),
    "an embedding of length 1": FromFunction(
        lambda self, x: F.normalize(self.fc(self.body(x).mean((2, 3)))), body=trunk(), fc=nn.Linear(8, 4)
    ),
    "identity shortcut": FromFunction(
        lambda self, x: (y := self.body(x)) + self.conv(y), body=trunk(), conv=nn.Conv2d(8, 8, 1)
    ),
    "projection shortcut": FromFunction(
        lambda self, x: self.main(y := self.body(x)) + self.skip(y),
        body=trunk(),
        main=nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 9, 1)),
        skip=nn.Conv2d(8, 9, 1),
    ),
    "dense connection": FromFunction(
        lambda self, x: torch.cat([y := self.body(x), self.conv(y)], 1), body=trunk(), conv=nn.Conv2d(8, 4, 1)
    ),
    "a gate": FromFunction(
        lambda self, x: (y := self.body(x)) * self.gate(y).sigmoid(), body=trunk(), gate=nn.Conv2d(8, 8, 1)
    ),
    "attention": FromFunction(
        lambda self, x: F.scaled_dot_product_attention(*(self.qkv(self.body(x).flatten(2).mT),) * 3),
        body=trunk(),
        qkv=nn.Linear(8, 8),
    ),
    "one layer twice": FromFunction(lambda self, x: self.conv(self.conv(x)), conv=nn.Conv2d(3, 3, 1)),
    "one convolution": nn.Conv2d(3, 4, 3),
    "one linear layer": nn.Sequential(nn.Flatten(), nn.Linear(768, 4)),
    "layers side by side": FromFunction(
        lambda self, x: self.a(x) + self.b(x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1)
    ),
}


@pytest.mark.parametrize("model", HEADLESS.values(), ids=HEADLESS)
def test_a_network_without_a_classifier_has_no_head(model):
    assert names_with("@head", model, image()) == set()
    assert any("No classifier was found" in note for note in plan(model, example_input=image()).notes)


HEADED = {
    "a map of classes": (trunk(nn.Conv2d(8, 5, 1)), {"2"}),
    "a picture of fewer channels": (trunk(nn.Conv2d(8, 3, 3, padding=1), nn.Sigmoid()), {"2"}),
    "a map made larger": (trunk(nn.Conv2d(8, 9, 1), nn.Upsample(scale_factor=2)), {"2"}),
    "a transposed convolution": (trunk(nn.ConvTranspose2d(8, 2, 2, stride=2)), {"2"}),
    "classes averaged over positions": (trunk(nn.Conv2d(8, 9, 1), nn.ReLU(), *POOLED), {"2"}),
    "tokens": (
        FromFunction(lambda self, x: self.fc(self.body(x).flatten(2).mT), body=trunk(), fc=nn.Linear(8, 9)),
        {"fc"},
    ),
    "levels listed": (
        FromFunction(
            lambda self, x: torch.cat([self.conv(y).flatten(2) for y in (self.body(x), self.body(x[..., ::2]))], 2),
            body=trunk(),
            conv=nn.Conv2d(8, 16, 3, padding=1),
        ),
        {"conv"},
    ),
    "logits and the features they were made from": (
        FromFunction(
            lambda self, x: (self.fc(y := self.embed(self.body(x).mean((2, 3)))), y),
            body=trunk(),
            embed=nn.Linear(8, 6),
            fc=nn.Linear(6, 4),
        ),
        {"fc"},
    ),
    "two heads averaged": (
        FromFunction(
            lambda self, x: (self.a(y := self.body(x).mean((2, 3))) + self.b(y)) / 2,
            body=trunk(),
            a=nn.Linear(8, 4),
            b=nn.Linear(8, 4),
        ),
        {"a", "b"},
    ),
    "in train mode alone": (
        FromFunction(
            lambda self, x: (self.fc(y := self.body(x).mean((2, 3))), self.aux(y) if self.training else y),
            body=trunk(),
            fc=nn.Linear(8, 4),
            aux=nn.Linear(8, 4),
        ),
        {"fc", "aux"},
    ),
}


@pytest.mark.parametrize(("model", "expected"), HEADED.values(), ids=HEADED)
def test_the_layers_whose_results_are_predicted_are_heads(model, expected):
    assert names_with("@head", model, image()) == expected


def test_a_head_is_kept_whatever_its_type():
    decision = decisions_of(trunk(nn.ConvTranspose2d(8, 2, 2, stride=2)), image())["2"]
    assert (decision.action, decision.rule) == ("keep", "head")


def test_a_feature_pyramid_has_no_head():
    model = FromFunction(
        lambda self, x: self.pyramid({"a": (y := self.one(x)), "b": self.two(y)}),
        one=conv_bn(3, 4),
        two=conv_bn(4, 8, stride=2),
        pyramid=FeaturePyramidNetwork([4, 8], 6),
    )
    assert names_with("@head", model, image()) == set()
