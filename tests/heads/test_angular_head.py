"""Angular heads: their logits against the formula, their channel in train mode, types, ranks and kernels."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from angular_samples import normal
from torch.testing import assert_close

from spherify.errors import OptionError
from spherify.functional.margins import psi
from spherify.heads import AngularConv1d, AngularConv2d, AngularConv3d, AngularLinear
from spherify.heads.angular import NORM_FACTOR
from spherify.heads.kinds import settings_for

PLAIN = {  # head, operator, k
    "w cosine": ("w-softmax", "cosine", None),
    "w linear": ("w-softmax", "linear", None),
    "w sigmoid": ("w-softmax", "sigmoid", 0.3),
    "a": ("a-softmax", "cosine", None),
    "ga linear": ("ga-softmax", "linear", None),
    "ga sigmoid": ("ga-softmax", "sigmoid", 0.7),
    "s": ("s-softmax", "cosine", None),
    "arcface": ("arcface", "cosine", None),
}


def logits_by_hand(x: torch.Tensor, weight: torch.Tensor, operator: str, k, scale, eps: float) -> torch.Tensor:
    """|x| g(theta_j) or scale g(theta_j), vector by vector."""
    rows = []
    for vector in x:
        length = math.sqrt(float(vector @ vector) + eps)
        cosines = [float(vector @ w) / length / math.sqrt(float(w @ w) + eps) for w in weight]
        theta = torch.tensor([math.acos(c) for c in cosines], dtype=torch.float64)
        rows.append(psi(theta, "none", 1.0, operator=operator, k=k) * (length if scale is None else scale))
    return torch.stack(rows)


@pytest.mark.parametrize(("head", "operator", "k"), PLAIN.values(), ids=PLAIN)
def test_eval_logits_are_those_of_the_formula(head, operator, k):
    layer = AngularLinear(6, 5, dtype=torch.float64, head=head, operator=operator, k=k).eval()
    x = normal(4, 6)
    expected = logits_by_hand(x, layer.weight.detach(), operator, k, layer.settings.scale, layer.settings.eps)
    assert_close(layer(x).detach(), expected, atol=1e-7, rtol=0)
    assert layer.bias is None


@pytest.mark.parametrize(("head", "operator", "k"), PLAIN.values(), ids=PLAIN)
def test_train_mode_adds_the_length_of_the_feature_where_a_margin_needs_it(head, operator, k):
    layer = AngularLinear(6, 5, head=head, operator=operator, k=k)
    x = normal(4, 6).float()
    trained, plain = layer(x), copy.deepcopy(layer).eval()(x)
    assert torch.equal(trained[:, :5], plain)
    has_norm = head in ("a-softmax", "ga-softmax")
    assert trained.shape[1] == (6 if has_norm else 5)
    if has_norm:
        assert_close(trained[:, 5] / NORM_FACTOR, (x.square().sum(1) + 1e-4).sqrt())
        assert (trained.argmax(1) < 5).all()


def test_a_margin_of_one_adds_nothing():
    assert AngularLinear(6, 5, margin=1.0)(normal(2, 6).float()).shape == (2, 5)


def test_a_plain_cross_entropy_hardly_sees_the_channel():
    layer = AngularLinear(64, 10)
    x = normal(32, 64).float()
    probability = layer(x).softmax(1)[:, 10]
    assert probability.max() < 1e-30


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_pointwise_convolution_is_the_linear_head_at_each_position(dims):
    kind = {1: AngularConv1d, 2: AngularConv2d, 3: AngularConv3d}[dims]
    linear = AngularLinear(6, 5, dtype=torch.float64)
    plain = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims](6, 5, 1, bias=False).double()
    plain.__class__ = kind
    plain.take_settings(settings_for("ga-softmax", 5))
    plain.weight.data = linear.weight.data.view(5, 6, *[1] * dims)
    x = normal(2, 6, *[3] * dims)
    expected = linear(x.movedim(1, -1)).movedim(-1, 1)
    assert_close(plain(x), expected)
    assert_close(plain(x[0]), expected[0])  # unbatched


@pytest.mark.parametrize("window", [dict(padding=1), dict(stride=2), dict(padding="same")], ids=str)
def test_a_larger_kernel_takes_the_angle_to_the_patch(window):
    layer = AngularConv2d(3, 4, 3, dtype=torch.float64, operator="cosine", **window).eval()
    x = normal(2, 3, 6, 6)
    padding = 1 if window.get("padding") in (1, "same") else 0
    patches = F.unfold(x, 3, padding=padding, stride=window.get("stride", 1)).movedim(1, -1)
    flat = AngularLinear(27, 4, dtype=torch.float64, operator="cosine").eval()
    flat.weight.data = layer.weight.data.flatten(1)
    assert_close(layer(x).flatten(2), flat(patches).movedim(-1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_give_float32_logits(dtype):
    layer = AngularLinear(6, 5, dtype=dtype)
    x = (normal(4, 6) * 300).to(dtype).requires_grad_()  # their squares overflow float16
    out = layer(x)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_autocast_changes_no_bit():
    layer, x = AngularLinear(6, 5), normal(4, 6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = layer(x)
    assert torch.equal(under, layer(x))


@pytest.mark.parametrize("x", [torch.zeros(2, 6), torch.ones(2, 6) * 1e-6], ids=["zero", "tiny"])
@pytest.mark.parametrize(("head", "operator", "k"), PLAIN.values(), ids=PLAIN)
def test_a_feature_of_zeros_and_a_parallel_one_have_finite_gradients(head, operator, k, x):
    layer = AngularLinear(6, 5, head=head, operator=operator, k=k)
    parallel = layer.weight.detach()[:2] * 3
    for feature in (x.clone(), parallel, -parallel):
        feature.requires_grad_()
        layer(feature).square().sum().backward()
        assert feature.grad is not None and feature.grad.isfinite().all()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


def test_gradients_are_right():
    layer = AngularLinear(5, 4, dtype=torch.float64, operator="sigmoid", k=0.5)
    x = normal(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)), (x, layer.weight.detach().requires_grad_())
    )


def test_a_head_prints_what_it_is():
    text = repr(AngularLinear(6, 5, operator="sigmoid", k=0.5, margin=3))
    assert "head=ga-softmax, operator=sigmoid, k=0.5, margin=3" in text
    assert "head=s-softmax, operator=cosine, scale=5" in repr(AngularConv2d(6, 4, head="s-softmax"))


def test_a_grouped_convolution_is_refused():
    layer = torch.nn.Conv2d(4, 4, 1, groups=2, bias=False)
    layer.__class__ = AngularConv2d
    with pytest.raises(OptionError, match=r"^a convolution with 2 groups cannot be an angular head; give one group\.$"):
        layer.take_settings(settings_for("ga-softmax", 4))  # type: ignore[operator]
