"""Polynomials for the responses of folded layers: near to float32 over the whole range, or not taken at all."""

import copy
import ctypes
import gc
import math

import pytest
import torch
from angular_samples import normal
from torch import nn
from torch.testing import assert_close

from spherify import fold, spherify
from spherify.functional import cpu_binding, cpu_kernels
from spherify.functional import folded as folded_functions
from spherify.functional.curves import EDGE, LEARNED, curve_of, prepare

pytestmark = pytest.mark.skipif(cpu_binding.library() is None, reason=f"CPU kernels: {cpu_binding.state()}")
# planes, small planes, depthwise planes and small ones, rows, depthwise rows; most longer than one run of 128
LAYOUTS = [
    ((2, 5, 12, 13), 1, torch.contiguous_format),
    ((3, 40, 3, 3), 1, torch.contiguous_format),
    ((2, 6, 12, 13), 6, torch.contiguous_format),
    ((3, 40, 3, 3), 40, torch.contiguous_format),
    ((2, 8, 9, 9), 4, torch.contiguous_format),
    ((70, 300), 1, torch.contiguous_format),
    ((2, 150, 3, 5), 1, torch.channels_last),
    ((2, 150, 3, 5), 150, torch.channels_last),
    # maps of one to four vectors and of fewer numbers than a fifth of one; rows of less than a vector, and few of them
    ((3, 37, 2, 2), 1, torch.contiguous_format),
    ((2, 61, 5, 1), 61, torch.contiguous_format),
    ((3, 37, 4, 4), 1, torch.contiguous_format),
    ((3, 37, 4, 6), 37, torch.contiguous_format),
    ((2, 45, 6, 6), 3, torch.contiguous_format),
    ((2, 45, 7, 9), 1, torch.contiguous_format),
    ((7, 3), 1, torch.contiguous_format),
    ((4, 33), 1, torch.contiguous_format),
    ((2, 3, 5, 7), 3, torch.channels_last),
]
STEEPNESS = [None, 0.4, 1.0, 1.0 / 0.6, "each"]  # 1 / 2k


def truth_of(cosine, steepness):
    angle = torch.asin(cosine.double().clamp(-1, 1))
    if steepness is None:
        return angle
    shaped = steepness if isinstance(steepness, float) else steepness.double().view(-1, *[1] * (cosine.dim() - 2))
    return torch.tanh(angle * shaped)


def responded(cosine, inverse, steepness, gain, bias, **options):
    operator = "linear" if steepness is None else "sigmoid"
    if isinstance(steepness, torch.Tensor):
        prepare(steepness)
    curve = curve_of(operator, steepness)
    assert curve is not None
    values = dict(gain=gain, bias=bias, steep=steepness)
    found = cosine.clone()
    cpu_kernels.normalise_and_respond_(found, inverse, operator, values, curve=curve, **options)
    return found


def is_small_map(shape, layout):
    """Whether a k of each filter's own is answered without a curve; with AVX-512 few maps are so small."""
    window, _ = cpu_kernels.described_window(torch.ones(1, 2, 4, 4), (3, 3), (1, 1), (1, 1), (1, 1), 2)
    has_avx_512 = cpu_binding.library().can_convolve(ctypes.byref(window), 2)
    return len(shape) == 4 and layout == torch.contiguous_format and math.prod(shape[2:]) < (5 if has_avx_512 else 64)


@pytest.mark.parametrize("steepness", STEEPNESS)
@pytest.mark.parametrize("size", [0.1, 0.4, 3.0], ids=["near", "mixed", "beyond the poles"])
@pytest.mark.parametrize("shape, groups, layout", LAYOUTS, ids=str)
def test_every_layout_has_the_answer_in_double(shape, groups, layout, size, steepness):
    filters = shape[1]
    if steepness == "each":
        steepness = torch.linspace(0.4, 1.6, filters)
    product = size * normal(*shape, dtype=torch.float32)
    inverse = 0.5 + normal(shape[0], groups, *shape[2:], seed=1, dtype=torch.float32).abs()
    gain, bias = normal(filters, seed=2, dtype=torch.float32), normal(filters, seed=3, dtype=torch.float32)
    if len(shape) == 4:
        product, inverse = (tensor.contiguous(memory_format=layout) for tensor in (product, inverse))
    spread = inverse.repeat_interleave(filters // groups, dim=1)
    places = (1, -1, *[1] * (len(shape) - 2))
    truth = truth_of(product * spread, steepness) * gain.double().view(places) + bias.double().view(places)
    found = responded(product, inverse, steepness, gain, bias, low=0.0, high=2.0)
    # asin is steep at the poles: a rounding of the cosine shows, and small maps with many k may stop short of 1
    is_long_way = isinstance(steepness, torch.Tensor) and is_small_map(shape, layout)
    slope = 2e-3 if size > 1 or (size > 0.1 and is_long_way) else 1e-6
    assert_close(found.double(), truth.clamp(0, 2), rtol=1e-6, atol=slope)


@pytest.mark.parametrize("steepness", STEEPNESS[:-1])
def test_one_number_is_right_over_the_whole_range(steepness):
    cosine = torch.cat([torch.linspace(0, 1, 10001), torch.tensor([EDGE, EDGE + 1e-7, 1e-20, 1e-30])])
    cosine = torch.stack([cosine, -cosine], dim=1)
    found = responded(cosine, torch.ones(len(cosine), 1), steepness, None, None).double()
    truth = truth_of(cosine, steepness)
    assert ((found - truth).abs() <= 5e-7 * truth.abs()).all()
    assert torch.equal(found[:, 0], -found[:, 1])


@pytest.mark.parametrize("shape, groups, layout", LAYOUTS, ids=str)
def test_nan_stays_alone_and_infinity_is_a_pole(shape, groups, layout):
    product = torch.zeros(shape).contiguous(memory_format=layout) if len(shape) == 4 else torch.zeros(shape)
    product[1, 1].view(-1)[0] = float("nan")
    product[0, 2] = float("inf")
    inverse = torch.ones(shape[0], groups, *shape[2:])
    inverse = inverse.contiguous(memory_format=layout) if len(shape) == 4 else inverse
    found = responded(product, inverse, 1.0, None, None)
    assert found.isnan().sum() == 1
    assert found[1, 1].view(-1)[0].isnan()
    assert_close(found[0, 2], torch.full_like(found[0, 2], math.tanh(math.pi / 2)), rtol=1e-6, atol=0)


def test_where_few_terms_do_not_do_there_is_no_curve():
    assert curve_of("cosine", None) is None
    assert curve_of("sigmoid", 0.5 / 0.1) is None
    one_is_steep = torch.tensor([1.0, 5.0, 1.0])
    prepare(one_is_steep)
    assert curve_of("learnable", one_is_steep) is None
    assert curve_of("learnable", torch.ones(3)) is None  # not prepared


def test_curves_go_with_their_steepness():
    gc.collect()
    before = len(LEARNED)
    steepness = torch.linspace(0.5, 1.0, 7)
    prepare(steepness)
    assert curve_of("learnable", steepness).near.shape == (7, 7)
    del steepness
    gc.collect()
    assert len(LEARNED) == before


@pytest.mark.parametrize("operator", ["linear", "sigmoid", "learnable"])
@torch.no_grad()
def test_folded_layers_use_them_and_see_a_change_of_k(operator, monkeypatch):
    curves = []

    def noticed(*args, **options):
        curves.append(options.get("curve"))
        return elementwise(*args, **options)

    elementwise = cpu_kernels.elementwise
    monkeypatch.setattr(cpu_kernels, "elementwise", noticed)
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12, 12)
    model = spherify(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()), operator=operator, example_input=x).eval()
    folded = fold(model, example_input=x)
    curves.clear()
    for _ in range(3):
        assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert [curve for curve in curves if curve is not None]
    if operator == "learnable":
        folded[0].k_logit.add_(1.0)
        found = [folded(x) for _ in range(3)]
        monkeypatch.setattr(folded_functions, "curve_of", lambda *_: None)
        for one in found:
            assert_close(one, copy.deepcopy(folded)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_first_call_under_autocast_spoils_nothing(mode):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12, 12)
    model = spherify(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(10, 7)), operator="learnable", example_input=x).eval()
    folded = fold(model, example_input=x)
    with mode():
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                assert_close(folded(x).float(), model(x).float(), rtol=0.05, atol=0.05)
            assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(folded(x).float(), model(x).float(), rtol=0.05, atol=0.05)
