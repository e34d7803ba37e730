"""Agreement with pytorch-metric-learning where it defines the same thing (a dev dependency)."""

import math

import pytest
import torch
from angular_samples import normal
from torch.testing import assert_close

from spherify.heads import AngularLinear, criterion

losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # its own, with numpy 2
TINY = 1e-12  # PML adds next to nothing to squared norms
SIZE, CLASSES = 8, 5


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    return normal(12, SIZE), torch.arange(12) % CLASSES


def head_like(theirs: torch.nn.Module, **options) -> AngularLinear:
    """PML keeps class weights as columns."""
    head = AngularLinear(SIZE, CLASSES, dtype=torch.float64, eps=TINY, **options)
    head.weight.data = theirs.W.data.double().t().clone()
    theirs.W.data = theirs.W.data.double()
    return head


def both(
    theirs: torch.nn.Module, head: AngularLinear, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and gradients by the features."""
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, given = criterion(head)(head(one), y), theirs(other, y)
    assert_close(torch.autograd.grad(mine, one)[0], torch.autograd.grad(given, other)[0], atol=1e-5, rtol=1e-4)
    return mine.detach(), given.detach()


def test_cosface():
    x, y = samples()
    theirs = losses.CosFaceLoss(CLASSES, SIZE, margin=0.35, scale=64)
    assert_close(*both(theirs, head_like(theirs, head="cosface"), x, y), atol=1e-5, rtol=1e-5)


def test_arcface_up_to_pi_minus_m():
    x, y = samples()
    theirs = losses.ArcFaceLoss(CLASSES, SIZE, margin=math.degrees(0.5), scale=64)  # theirs is in degrees
    head = head_like(theirs, head="arcface")
    cosine = head.eval()(x).gather(1, y[:, None])[:, 0] / 64
    near = torch.acos(cosine) < math.pi - 0.5  # beyond, theirs jumps to cos(theta) - m sin(m), ours goes on
    assert near.sum() > 8
    assert_close(*both(theirs, head.train(), x[near], y[near]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_sphereface_and_l_softmax_with_normalised_weights(m):
    x, y = samples()
    theirs = losses.SphereFaceLoss(CLASSES, SIZE, margin=m, scale=1)
    head = head_like(theirs, head="a-softmax", margin=m)
    assert_close(*both(theirs, head, x, y), atol=1e-6, rtol=1e-6)


def test_l_softmax_where_the_class_weights_have_length_one():
    x, y = samples()
    theirs = losses.LargeMarginSoftmaxLoss(CLASSES, SIZE, margin=4, scale=1)
    theirs.W.data = torch.nn.functional.normalize(theirs.W.data.double(), dim=0)  # its logits have |w| as a factor
    head = head_like(theirs, head="a-softmax", margin=4)
    assert_close(*both(theirs, head, x, y), atol=1e-6, rtol=1e-6)


def test_normalised_softmax_is_s_softmax():
    x, y = samples()
    theirs = losses.NormalizedSoftmaxLoss(CLASSES, SIZE, temperature=1 / 7)
    assert_close(*both(theirs, head_like(theirs, head="s-softmax", scale=7), x, y), atol=1e-6, rtol=1e-6)
