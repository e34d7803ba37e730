"""The CPU's kernels on planes: gradients through norms and responses, for every size and stride, against float64."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from angular_samples import OPERATORS, normal, options_of, uniform
from torch.testing import assert_close

from spherify.functional import cpu_binding, cpu_kernels

pytestmark = pytest.mark.skipif(cpu_binding.library() is None, reason=f"CPU kernels: {cpu_binding.state()}")
WINDOW = ((3, 3), (1, 1), (1, 1))  # size, padding, dilation
HEIGHTS = (1, 2, 3, 6, 7, 12, 33)
WIDTHS = (1, 2, 3, 5, 6, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 49)


def spread_of(numbers, size, stride):
    """The sum, at each pixel, over the 3x3 patches that hold it; in float64."""
    rest = [whole - ((out - 1) * stride + 1) for whole, out in zip(size, numbers.shape[2:], strict=True)]
    ones = torch.ones(numbers.shape[1], 1, 3, 3, dtype=torch.float64)
    return F.conv_transpose2d(numbers, ones, stride=stride, padding=1, output_padding=rest, groups=numbers.shape[1])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height", HEIGHTS)
def test_what_is_along_the_patches_is_taken_off_as_in_double(height, stride):
    size, padding, dilation = WINDOW
    for width in WIDTHS:
        x = normal(2, 19, height, width, seed=width, dtype=torch.float32)  # 38 maps: tiles that are not full
        by = normal(*x.shape, seed=1, dtype=torch.float32)
        inverse = cpu_kernels.patch_inverse_norm(x, size, (stride,) * 2, padding, dilation, 19, 1e-4)
        along = normal(*inverse.shape, seed=2, dtype=torch.float32)
        share = along.double() * inverse.double() ** 2
        truth = by - x * spread_of(share, (height, width), stride)
        found = cpu_kernels.subtract_along_(by.clone(), x, along, inverse, size, (stride,) * 2, padding, dilation)
        allowed = 4e-7 * (by.abs() + x.abs() * spread_of(share.abs(), (height, width), stride))
        assert ((found - truth).abs() <= allowed).all(), width


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(3, 3), (6, 6), (40, 50)], ids=str)
def test_a_nan_among_the_gradients_stays_within_its_patch(size, stride):
    window, padding, dilation = WINDOW
    x = normal(2, 30, *size, dtype=torch.float32)
    inverse = cpu_kernels.patch_inverse_norm(x, window, (stride,) * 2, padding, dilation, 30, 1e-4)
    along = torch.ones_like(inverse)
    along[1, 7, 1, 1] = float("nan")
    found = cpu_kernels.subtract_along_(x.clone(), x, along, inverse, window, (stride,) * 2, padding, dilation)
    expected = torch.zeros_like(found, dtype=torch.bool)
    expected[1, 7, stride - 1 : stride + 2, stride - 1 : stride + 2] = True
    assert torch.equal(found.isnan(), expected)


def slope_of(answer, operator, k):
    """The cosine that has this response, and the slope there; in float64."""
    if operator == "cosine":
        return answer, torch.ones_like(answer)
    if operator == "linear":
        cosine = torch.sin(answer * torch.pi / 2)
        return cosine, 2 / torch.pi / torch.sqrt(1 - cosine**2)
    k = torch.as_tensor(k, dtype=torch.float64).view(-1, 1, 1)
    end = torch.tanh(torch.pi / (4 * k))
    cosine = torch.sin(2 * k * torch.atanh(answer * end))
    return cosine, (1 - (answer * end) ** 2) / (2 * k * end) / torch.sqrt(1 - cosine**2)


@pytest.mark.parametrize("with_gain_and_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 24], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("size", [(1, 2), (3, 3), (4, 4), (6, 6), (5, 7), (12, 12), (50, 51)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_gradient_of_responses_is_that_in_double(name, size, groups, with_gain_and_bias):
    options = options_of(name, 24, torch.float32)
    operator, k = options["operator"], options.get("k")
    answer = 0.9 * torch.tanh(normal(3, 24, *size, dtype=torch.float32))
    gradient, inverse = normal(*answer.shape, seed=1, dtype=torch.float32), uniform(0.5, 1.5, 3, groups, *size).float()
    length, gain, bias = uniform(0.5, 1.5, 24, seed=2).float(), None, None
    saved, values = answer, dict(length=length, **cpu_kernels.constants(operator, k))
    if with_gain_and_bias:
        gain, bias = uniform(0.5, 1.5, 24, seed=3).float(), normal(24, seed=4, dtype=torch.float32)
        saved = answer * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)
        values |= dict(gain=gain, offset=bias, unscale=None if operator == "cosine" else 1 / gain)
    product, along, sums = cpu_kernels.respond_backward(gradient, saved, inverse, operator, values)

    factor = torch.ones(24, 1, 1, dtype=torch.float64) if gain is None else gain.double().view(-1, 1, 1)
    cosine, slope = slope_of(answer.double(), operator, k)
    slope = slope * gradient * factor
    norms = inverse.double().repeat_interleave(24 // groups, 1)
    assert_close(product.double(), slope * norms * length.view(-1, 1, 1), rtol=3e-5, atol=1e-5)
    assert_close(along.double(), (slope * cosine).unflatten(1, (groups, -1)).sum(2), rtol=3e-5, atol=5e-5)
    places = (0, 2, 3)
    count = gradient[:, 0].numel()
    assert_close(sums[0].double(), gradient.double().sum(places), rtol=0, atol=1e-6 * count)
    assert_close(sums[3].double(), (slope * cosine).sum(places), rtol=3e-5, atol=3e-6 * count)
    if operator != "cosine":
        assert_close(sums[1].double(), (gradient.double() * answer).sum(places), rtol=0, atol=1e-6 * count)


@pytest.mark.parametrize("shape", [(3, 40, 6, 6), (2, 8, 30, 30), (7, 33)], ids=str)
@pytest.mark.parametrize("k", [0.02, 0.3, 20.0])
def test_steep_and_flat_sigmoids_of_large_cosines_are_those_in_double(shape, k):
    cosine = torch.tanh(2 * normal(*shape, dtype=torch.float32))
    cosine.view(-1)[11], cosine.view(-1)[12], cosine.view(-1)[13] = float("nan"), 0.0, 0.999
    found = cosine.clone()
    values = dict(gain=torch.ones(shape[1]), bias=torch.zeros(shape[1]), **cpu_kernels.constants("sigmoid", k))
    cpu_kernels.normalise_and_respond_(found, torch.ones(shape[0], 1, *shape[2:]), "sigmoid", values)
    end = torch.tanh(torch.tensor(torch.pi / (4 * k), dtype=torch.float64))
    truth = torch.tanh(torch.asin(cosine.double()) / (2 * k)) / end
    assert_close(found.double(), truth, rtol=2e-6, atol=2e-7, equal_nan=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is of x86")
@pytest.mark.skipif("SPHERIFY_WITHOUT_AVX_512" in os.environ, reason="this is that run")
def test_all_of_this_holds_without_avx_512(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nexec cc "$@" -mno-avx512f\n')
    compiler.chmod(0o755)
    cache = dict(CC=str(compiler), XDG_CACHE_HOME=str(tmp_path), SPHERIFY_WITHOUT_AVX_512="1")
    some = "taken_off or nan or steep or cosine or linear or learnable-filter or every_layout"
    files = [__file__, str(Path(__file__).with_name("test_curves.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some, *files]
    done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert len(list((tmp_path / "spherify").iterdir())) == 1  # compiled for this run
