"""One model of each family of timm and torchvision: no layer unaccounted for, the conversion holds, gradients flow."""

from pathlib import Path

import pytest
import timm
import torch

from benchmarks.zoo.worker import build_small
from spherify import plan, spherify
from spherify.convert import first_run
from spherify.graph.record import tensors_in
from spherify.layers.angular import AngularLayer

FAMILIES = (Path(__file__).parent / "zoo_families.txt").read_text().split()  # the smallest of each
ON_CPU = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", "ssd")  # they read their data
HARD = [  # what trips converters: dynamic padding, standardised and functional weights, routed weights, shared modules
    *("tf_efficientnet_b0", "tf_mixnet_m", "dm_nfnet_f0", "nfnet_f0", "resnetv2_50x1_bit", "vit_base_r50_s16_224"),
    *("beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256", "coat_tiny", "ghostnet_100"),
    *("dla34", "dpn68", "repvgg_a0", "hiera_tiny_224", "mvitv2_tiny", "deit_tiny_distilled_patch16_224"),
    *("levit_128s", "crossvit_tiny_240", "efficientvim_m1", "tf_efficientnet_cc_b0_4e"),
    *("torchvision:swin_t", "torchvision:swin_v2_t", "torchvision:swin3d_t", "torchvision:vit_b_16"),
    *("torchvision:squeezenet1_0", "torchvision:s3d", "torchvision:googlenet", "torchvision:regnet_y_400mf"),
]


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", sorted({*FAMILIES, *HARD}))
def test_every_layer_is_accounted_for_and_the_conversion_holds(name):
    model = build_small(name)
    inputs, _ = first_run(model, None)
    report = plan(model)
    assert report.decisions
    assert sum(report.summary().values()) == len(report.decisions)
    assert all(decision.rule and decision.reason for decision in report.decisions)
    converted = report.apply(inplace=True)  # verified in eval and in train mode
    layers = [layer for layer in converted.modules() if isinstance(layer, AngularLayer)]
    assert len(layers) == report.summary()["converted"] > 0
    if any(word in name for word in ON_CPU) or any(parameter.device.type != "meta" for parameter in model.parameters()):
        return
    outputs = converted.train()(*inputs.args)
    sum(tensor.float().sum() for tensor in tensors_in(outputs) if tensor.requires_grad).backward()
    reached = [layer for layer in layers if layer.weight.grad is not None]
    assert len(reached) == len(layers)


MICRO = [
    *("test_resnet", "test_vit", "test_vit2", "test_vit3", "test_convnext", "test_convnext2", "test_convnext3"),
    *("test_efficientnet", "test_efficientnet_evos", "test_efficientnet_gn", "test_efficientnet_ln", "test_byobnet"),
    *("test_coatnet", "test_maxvit", "test_mambaout", "test_nfnet", "resnet18", "mobilenetv3_small_050"),
    *("ghostnet_050", "lcnet_035", "tinynet_e", "efficientvit_b0", "repvgg_a0", "shvit_s1", "edgenext_xx_small"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MICRO)
def test_small_networks_compute_on_angles_with_finite_outputs_and_gradients(name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    converted = spherify(model, operator="sigmoid").train()
    side = min(96, model.pretrained_cfg["input_size"][1])
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    side = fixed[0] if fixed else (160 if name.startswith("test_") else side)
    out = converted(torch.rand(2, 3, side, side))
    assert out.isfinite().all()
    out.square().mean().backward()
    gradients = [layer.weight.grad for layer in converted.modules() if isinstance(layer, AngularLayer)]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
