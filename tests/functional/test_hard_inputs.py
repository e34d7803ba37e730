"""Hard numbers: zeros, parallel patches, the ends of each float's range, NaN, empty and unbatched inputs."""

import math

import pytest
import reference
import torch
from angular_samples import OPERATORS, PLAIN_CONVS, SPHERE_CONVS, normal, options_of
from torch.testing import assert_close

from spherify.functional import RESPONSES, conv_cosine, sphere_conv2d, sphere_linear
from spherify.functional.responses import K_MAX, K_MIN

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [*HALVES, torch.float32, torch.float64]
# The rounding of the filters and of the product, a few times over.
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-6, torch.float64: 1e-12}


def gradients_of(out, *leaves):
    return torch.autograd.grad(out.float().sum(), leaves)


def slope_at_equator(options: dict) -> float:
    k = options.get("k")
    return RESPONSES[options["operator"]].slope_at_equator(float(k.min()) if isinstance(k, torch.Tensor) else k)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_zero_patch_responds_with_zero(name, dtype):
    x, weight = torch.zeros(2, 4, 5, 5, dtype=dtype), normal(4, 4, 3, 3, dtype=dtype)
    assert not sphere_conv2d(x, weight, **options_of(name, 4, dtype), padding=1).any()


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("length", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_gradient_at_a_zero_patch_is_bounded_by_the_slope_over_the_root_of_eps(name, length, eps):
    weight = normal(4, 2, 3, 3)
    weight = length * weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    options = options_of(name, 4)
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for response in sphere_conv2d(x, weight, **options, eps=eps).flatten():  # one patch, one response a filter
        (gradient,) = torch.autograd.grad(response, x, retain_graph=True)
        assert 0 < gradient.norm() <= slope_at_equator(options) / math.sqrt(eps) * (1 + 1e-9)


@pytest.mark.parametrize("k", [None, K_MIN, 0.3, K_MAX])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_gradient_is_finite_among_zero_patches(dtype, k):
    x = torch.zeros(1, 4, 5, 5, dtype=dtype)
    x[..., 3:] = normal(1, 4, 5, 2).to(dtype)  # zeros, and a border between zeros and numbers
    weight = normal(4, 4, 3, 3, dtype=dtype).requires_grad_()
    x.requires_grad_()
    operator = "linear" if k is None else "sigmoid"
    out = sphere_conv2d(x, weight, operator=operator, k=k)
    assert all(gradient.isfinite().all() for gradient in gradients_of(out, x, weight))


@pytest.mark.parametrize("channels", [4, 64, 512])
@pytest.mark.parametrize("k", [K_MIN, 1e-2, 0.3])
def test_float16_gradients_are_finite_at_zero_patches_of_any_fan_in(k, channels):
    """The gradient by the product is up to slope * sqrt(fan_in / eps), and 65504 is the largest float16."""
    x = torch.zeros(1, channels, 5, 5, dtype=torch.float16, requires_grad=True)
    weight = normal(1, channels, 3, 3, dtype=torch.float16).requires_grad_()
    gradients = gradients_of(sphere_conv2d(x, weight, operator="sigmoid", k=k), x, weight)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("name", OPERATORS)
def test_filters_of_zeros_respond_with_zero_and_have_finite_gradients(name):
    x, weight = normal(1, 2, 4, 4).requires_grad_(), torch.zeros(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    out = sphere_conv2d(x, weight, **options_of(name, 4))
    assert not out.any()
    assert all(gradient.isfinite().all() for gradient in gradients_of(out, x, weight))


@pytest.mark.parametrize("sign", [1, -1], ids=["parallel", "antiparallel"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("length", [1e-2, 1.0, 1e2])
def test_a_parallel_patch_responds_with_one_and_has_finite_gradients(name, dtype, sign, length):
    weight = normal(4, 64, 3, 3, dtype=dtype).requires_grad_()
    x = (sign * length * weight.detach()).requires_grad_()  # patch i is filter i
    out = sphere_conv2d(x, weight, **options_of(name, 4, dtype)).flatten(1)
    # Near the pole an error of d in the cosine is an angle of sqrt(2 d), here with eps 1e-4 or the rounding as d.
    assert_close(out.diagonal().double(), torch.full((4,), sign).double(), rtol=0, atol=0.16)
    assert out.abs().max() <= 1
    assert all(gradient.isfinite().all() for gradient in gradients_of(out, x, weight))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_of_1e4_in_half_precision_are_the_slow_ones(name, groups, dtype):
    x, weight = (1e4 * normal(2, 4, 6, 6)).to(dtype), normal(4, 4 // groups, 3, 3, seed=1).to(dtype)
    options = options_of(name, 4, dtype)
    truth = reference.sphere_conv(x, weight, **options, groups=groups)
    steepness = max(1.0, slope_at_equator(options))
    out = sphere_conv2d(x, weight, **options, groups=groups)
    assert out.dtype == dtype
    assert reference.relative_error(out, truth) < ROUNDING[dtype] * steepness


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_of_1e4_in_half_precision_have_finite_gradients(name, groups):
    x = (1e4 * normal(2, 4, 6, 6)).half().requires_grad_()
    weight = (1e2 * normal(4, 4 // groups, 3, 3, seed=1)).half().requires_grad_()
    out = sphere_conv2d(x, weight, **options_of(name, 4, torch.float16), groups=groups)
    assert all(gradient.isfinite().all() for gradient in gradients_of(out, x, weight))


@pytest.mark.parametrize("of", ["x", "weight"])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_of_1e_30_in_float32_respond_along_the_slope_at_the_equator(name, of):
    x, weight = normal(2, 4, 5, 5, dtype=torch.float32), normal(4, 4, 3, 3, seed=1, dtype=torch.float32)
    x, weight = (x * 1e-30, weight) if of == "x" else (x, weight * 1e-30)
    options = options_of(name, 4, torch.float32)
    # pi/2 - acos cannot see a cosine of 1e-28, so here the slow twin is the first order of the printed formula.
    k = options["k"].reshape(-1, 1, 1).double() if name.startswith("learnable") else options.get("k")
    slope = RESPONSES[options["operator"]].slope(torch.zeros(1, 1, 1, dtype=torch.float64), k)
    truth = reference.conv_cosine(x, weight) * slope
    assert reference.relative_error(sphere_conv2d(x, weight, **options), truth) < 1e-6


@pytest.mark.parametrize("of", ["x", "weight", "both"])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_of_1e_30_in_float32_have_finite_gradients(name, of):
    x, weight = normal(2, 4, 5, 5, dtype=torch.float32), normal(4, 4, 3, 3, seed=1, dtype=torch.float32)
    x = (x * (1e-30 if of != "weight" else 1)).requires_grad_()
    weight = (weight * (1e-30 if of != "x" else 1)).requires_grad_()
    out = sphere_conv2d(x, weight, **options_of(name, 4, torch.float32))
    assert all(gradient.isfinite().all() for gradient in gradients_of(out, x, weight))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dims", SPHERE_CONVS)
def test_nan_in_gives_nan_out_only_where_the_patch_of_its_group_holds_it(dims, name, groups):
    window = dict(stride=2, padding=1, dilation=1, groups=groups)
    x, weight = normal(2, 4, *(7, 7, 7)[:dims]), normal(4, 4 // groups, *(3, 3, 3)[:dims], seed=1)
    x[(1, 2, *(3, 4, 2)[:dims])] = math.nan
    out = SPHERE_CONVS[dims](x, weight, **options_of(name, 4), **window)
    is_hit = PLAIN_CONVS[dims](x.isnan().double(), torch.ones_like(weight), **window) > 0
    assert is_hit.any()
    assert not is_hit.all()
    assert torch.equal(out.isnan(), is_hit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_nan_stays_in_its_patches_in_every_float(dtype):
    x, weight = normal(1, 16, 12, 12, dtype=dtype), normal(8, 16, 3, 3, seed=1, dtype=dtype)
    x[0, 3, 5, 6] = math.nan
    is_nan = sphere_conv2d(x, weight, padding=1, operator="linear").isnan()
    assert is_nan[..., 4:7, 5:8].all()
    assert is_nan.sum() == 8 * 9


def test_a_nan_spoils_no_gradient_beyond_the_patches_that_hold_it():
    x, weight = normal(1, 2, 9, 9), normal(3, 2, 3, 3, seed=1)
    x[0, 1, 4, 4] = math.nan
    x.requires_grad_()
    out = sphere_conv2d(x, weight, operator="linear", padding=1)
    (gradient,) = torch.autograd.grad(out[out.isfinite()].sum(), x)
    beyond = torch.ones(9, 9, dtype=torch.bool)
    beyond[2:7, 2:7] = False  # the 3x3 patches around (4, 4) reach two pixels far
    assert gradient[..., beyond].isfinite().all()


def test_a_nan_in_one_filter_stays_in_its_channel():
    weight = normal(4, 3, 3, 3)
    weight[2, 1, 0, 0] = math.nan
    out = sphere_conv2d(normal(2, 3, 5, 5), weight, operator="sigmoid", k=0.3)
    assert out[:, 2].isnan().all()
    assert out[:, [0, 1, 3]].isfinite().all()


def test_a_nan_in_one_vector_stays_in_its_row():
    x = normal(4, 5)
    x[1, 2] = math.nan
    is_nan = sphere_linear(x, normal(3, 5, seed=1), operator="linear").isnan()
    assert is_nan.all(1).tolist() == [False, True, False, False]
    assert is_nan.sum() == 3


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dims", SPHERE_CONVS)
def test_an_empty_batch_gives_an_empty_batch_and_zero_gradients(dims, name, groups):
    x = torch.zeros(0, 4, *(6, 6, 6)[:dims], dtype=torch.float64, requires_grad=True)
    weight = normal(4, 4 // groups, *(3, 3, 3)[:dims]).requires_grad_()
    out = SPHERE_CONVS[dims](x, weight, **options_of(name, 4), groups=groups, stride=2, padding=1)
    assert out.shape == (0, 4, *(3, 3, 3)[:dims])
    assert not gradients_of(out, x, weight)[1].any()


@pytest.mark.parametrize("name", OPERATORS)
def test_an_empty_batch_of_vectors_gives_an_empty_batch(name):
    out = sphere_linear(torch.zeros(0, 5, dtype=torch.float64), normal(4, 5), **options_of(name, 4))
    assert out.shape == (0, 4)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dims", SPHERE_CONVS)
def test_one_of_a_batch_alone_or_unbatched_is_what_it_is_in_the_batch(dims, name, groups):
    x, weight = normal(3, 4, *(6, 5, 6)[:dims]), normal(4, 4 // groups, *(3, 2, 3)[:dims], seed=1)
    options = dict(options_of(name, 4), groups=groups, padding=1, bias=normal(4), gain=normal(4, seed=2))
    batch = SPHERE_CONVS[dims](x, weight, **options)
    assert_close(SPHERE_CONVS[dims](x[1:2], weight, **options), batch[1:2], rtol=1e-12, atol=1e-14)
    assert_close(SPHERE_CONVS[dims](x[1], weight, **options), batch[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_unbatched_vector_is_what_it_is_in_the_batch(name):
    x, weight, options = normal(3, 5), normal(4, 5, seed=1), options_of(name, 4)
    assert_close(sphere_linear(x[1], weight, **options), sphere_linear(x, weight, **options)[1])


def test_the_arguments_are_left_alone():
    x, weight = normal(2, 4, 5, 5), normal(4, 2, 3, 3, seed=1)
    before = x.clone(), weight.clone()
    sphere_conv2d(x, weight, groups=2, padding=1, operator="linear")
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_fan_in_one_is_plus_or_minus_one():
    x, weight = normal(1, 3, 4, 4), normal(3, 1, 1, 1, seed=1)
    signs = (x * weight.view(1, 3, 1, 1)).sign()
    assert_close(conv_cosine(x, weight, groups=3, eps=1e-20), signs)
