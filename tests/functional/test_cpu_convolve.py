"""Folded depthwise layers by a convolution of our own: each size and stride against float64; what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from angular_samples import normal, uniform
from torch.testing import assert_close

from spherify.functional import cpu_binding, cpu_convolve, folded
from spherify.functional.curves import prepare

pytestmark = pytest.mark.skipif(cpu_binding.library() is None, reason=f"CPU kernels: {cpu_binding.state()}")
HEIGHTS = (1, 2, 3, 6, 7, 33)
WIDTHS = (1, 2, 3, 5, 6, 8, 15, 16, 17, 24, 31, 32, 33, 34, 49, 65)


@pytest.fixture
def answers(monkeypatch):
    """What the convolution gave back, None where it did not serve."""
    given = []
    real = cpu_convolve.convolved

    def kept(*inputs, **options):
        given.append(real(*inputs, **options))
        return given[-1]

    monkeypatch.setattr(folded, "convolved", kept)
    return given


def layer(x, weight, bias, scale, operator, stride, activation=None, **changed):
    steepness = None if operator in ("cosine", "linear") else 1.2
    if operator == "learnable":
        steepness = torch.linspace(0.6, 1.4, len(weight)).to(weight.dtype)
        prepare(steepness)
    options = dict(stride=stride, padding=1, dilation=1, groups=x.shape[1], padding_mode="zeros", power=1.0) | changed
    return folded.folded_conv(
        x, weight, bias, scale, **options, operator=operator, steepness=steepness, eps=1e-4,
        shared=None, activation=activation,
    )  # fmt: skip


def is_served():
    """Whether this processor has AVX-512, as far as the kernels' compiler used it."""
    return cpu_convolve.convolved(
        torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3), ((1, 1), (1, 1), (1, 1), 2), "cosine", {},
        guard=1.0, low=-1.0, high=1.0, curve=None, is_gelu=False, eps=1e-4, power=1.0,
    ) is not None  # fmt: skip


@pytest.mark.parametrize("operator", ["cosine", "linear", "sigmoid"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height", HEIGHTS)
@torch.no_grad()
def test_sizes_and_strides_are_those_in_double(height, stride, operator, answers):
    weight, bias = F.normalize(normal(5, 1, 3, 3).flatten(1)).view(5, 1, 3, 3), normal(5, seed=1)
    scale = uniform(0.5, 2.0, 5, seed=2)
    for width in WIDTHS:
        x = normal(3, 5, height, width, seed=width)
        x[1, 2] = 0.0
        truth = layer(x, weight, bias, scale, operator, stride, "relu6")
        found = layer(*(t.float() for t in (x, weight, bias, scale)), operator, stride, "relu6")
        assert_close(found.double(), truth, rtol=2e-6, atol=3e-6)
    assert [one is not None for one in answers].count(True) == (len(WIDTHS) if is_served() else 0)


@pytest.mark.parametrize("operator", ["cosine", "linear", "sigmoid", "learnable"])
@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)])
@torch.no_grad()
def test_channels_last_maps_have_the_answer_in_double(size, stride, operator, answers):
    # maps of fewer rows than the window; channels of less than a vector, of several and some; padding of all sorts
    half = size // 2
    for channels, height, width, padding in ((2, 7, 9, 0), (5, 1, 3, half), (17, 4, 11, 1), (48, 13, 8, half)):
        if min(height, width) + 2 * padding < size:
            continue
        x = normal(3, channels, height, width, seed=width).to(memory_format=torch.channels_last)
        x[1, 1] = 0.0
        x[:, 0] *= 1e-3  # below eps
        weight = F.normalize(normal(channels, 1, size, size).flatten(1)).view(-1, 1, size, size) / 4
        bias, scale = normal(channels, seed=1), uniform(0.5, 2.0, channels, seed=2)
        options = dict(padding=padding, power=4.0, activation="relu6")
        truth = layer(x, weight, bias, scale, operator, stride, **options)
        x, weight, bias, scale = (tensor.float() for tensor in (x, weight, bias, scale))
        found = layer(x, weight, bias, scale, operator, stride, **options)
        assert_close(found.double(), truth, rtol=2e-6, atol=3e-6)
        assert found.stride() == F.conv2d(x, weight, None, stride, padding, 1, channels).stride()
        assert (answers[-1] is not None) == is_served()


@pytest.mark.skipif(not is_served(), reason="the convolution needs AVX-512")
@pytest.mark.parametrize("operator", ["cosine", "learnable"])
@torch.no_grad()
def test_channels_last_nan_gelu_and_threads_are_right(operator, answers):
    x = normal(2, 30, 9, 9, dtype=torch.float32).to(memory_format=torch.channels_last)
    weight = F.normalize(normal(30, 49, seed=1)).view(30, 1, 7, 7).float()
    x[1, 7, 3, 0] = float("nan")
    found = layer(x, weight, None, None, operator, 1, "gelu", padding=3)
    truth = layer(x.double(), weight.double(), None, None, operator, 1, "gelu", padding=3)
    assert_close(found.double(), truth, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert found.isnan().sum() == 7 * 4
    before = torch.get_num_threads()
    many = normal(8, 64, 20, 20, dtype=torch.float32).to(memory_format=torch.channels_last)
    filters = normal(64, 1, 7, 7, dtype=torch.float32) / 7
    try:
        one = layer(many, filters, None, None, operator, 1, padding=3)
        torch.set_num_threads(3)
        assert torch.equal(layer(many, filters, None, None, operator, 1, padding=3), one)
    finally:
        torch.set_num_threads(before)
    assert all(answer is not None for answer in (answers[0], *answers[2:]))


@pytest.mark.skipif(not is_served(), reason="the convolution needs AVX-512")
@torch.no_grad()
def test_a_nan_stays_in_its_patches_and_gelu_and_threads_are_right(answers):
    x, weight = normal(2, 30, 9, 9, dtype=torch.float32), normal(30, 1, 3, 3, seed=1, dtype=torch.float32) / 3
    x[1, 7, 3, 0] = float("nan")
    before = torch.get_num_threads()
    for stride in (1, 2):
        found = layer(x, weight, None, None, "cosine", stride, "gelu")
        truth = layer(x.double(), weight.double(), None, None, "cosine", stride, "gelu")
        assert_close(found.double(), truth, rtol=2e-6, atol=2e-6, equal_nan=True)
        assert found.isnan().sum() == (6 if stride == 1 else 2)
        assert not found[0].isnan().any()
    many = normal(8, 64, 20, 20, dtype=torch.float32)
    filters = normal(64, 1, 3, 3, dtype=torch.float32) / 3
    try:
        one = layer(many, filters, None, None, "linear", 1)
        torch.set_num_threads(3)
        assert torch.equal(layer(many, filters, None, None, "linear", 1), one)
    finally:
        torch.set_num_threads(before)
    assert answers[0] is not None


@pytest.mark.parametrize("changed", [dict(dilation=2), dict(padding=0), dict(stride=(1, 2)), dict(groups=1)], ids=str)
@torch.no_grad()
def test_other_windows_are_not_taken(changed, answers):
    groups = changed.get("groups", 6)
    x, weight = normal(2, 6, 9, 9, dtype=torch.float32), normal(6, 6 // groups, 3, 3, seed=1, dtype=torch.float32)
    stride = changed.pop("stride", 1)
    found = layer(x, weight, None, None, "cosine", stride, **changed)
    assert answers == [None]
    truth = layer(x.double(), weight.double(), None, None, "cosine", stride, **changed)
    assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_filters_that_want_a_gradient_get_it(answers):
    x, weight = normal(2, 6, 9, 9, dtype=torch.float32), normal(6, 1, 3, 3, dtype=torch.float32).requires_grad_()
    layer(x, weight, None, None, "cosine", 1).square().sum().backward()
    assert answers == [None]
    assert weight.grad.abs().sum() > 0


@torch.no_grad()
def test_autocast_gets_the_type_of_the_plain_convolution(answers):
    x, weight = normal(2, 6, 9, 9, dtype=torch.float32), normal(6, 1, 3, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, weight, None, None, "cosine", 1).dtype == torch.bfloat16
