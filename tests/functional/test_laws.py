"""Laws of the sphere operators, for drawn shapes, scales and softness."""

import math

import pytest
import reference
import torch
from angular_samples import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from spherify.functional import conv_cosine, linear_cosine, sphere_conv2d, sphere_linear
from spherify.functional.responses import K_MAX, K_MIN

FAST = settings(max_examples=40, derandomize=True, deadline=None, database=None)
NO_EPS = 1e-200  # far below every squared norm that is drawn here

SEEDS = st.integers(0, 10_000)
SCALES = st.floats(-30, 30).map(lambda exponent: 10.0**exponent)
SOFTNESS = st.floats(math.log(K_MIN), math.log(K_MAX)).map(lambda log: min(max(math.exp(log), K_MIN), K_MAX))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
WINDOWS = st.fixed_dictionaries(
    dict(
        stride=st.integers(1, 3),
        padding=st.integers(0, 2),
        dilation=st.integers(1, 2),
        groups=st.sampled_from([1, 2, 4]),
    )
)
OPERATORS_AND_K = st.one_of(
    st.sampled_from([("cosine", None), ("linear", None)]),
    st.tuples(st.sampled_from(["sigmoid", "learnable"]), SOFTNESS),
)


def patch_and_filters(seed: int, window: dict, dtype=torch.float64):
    """An image and four filters; the first filter is parallel, the second antiparallel, to patches of the image."""
    x = normal(2, 4, 7, 8, seed=seed)
    weight = normal(4, 4 // window["groups"], 2, 3, seed=seed + 1)
    gap = window["dilation"]
    patch = x[0, : weight.shape[1], : gap + 1 : gap, : 2 * gap + 1 : gap]
    weight[0], weight[1] = 3 * patch, -0.1 * patch
    return x.to(dtype), weight.to(dtype)


@FAST
@given(seed=SEEDS, window=WINDOWS, scale=SCALES)
def test_the_length_of_a_patch_does_not_matter(seed, window, scale):
    x, weight = patch_and_filters(seed, window)
    scaled = conv_cosine(scale * x, weight, **window, eps=NO_EPS)
    assert_close(scaled, conv_cosine(x, weight, **window, eps=NO_EPS), rtol=0, atol=1e-13)


@FAST
@given(seed=SEEDS, window=WINDOWS, scale=SCALES)
def test_the_length_of_a_filter_does_not_matter(seed, window, scale):
    x, weight = patch_and_filters(seed, window)
    scaled = conv_cosine(x, scale * weight, **window, eps=NO_EPS)
    assert_close(scaled, conv_cosine(x, weight, **window, eps=NO_EPS), rtol=0, atol=1e-13)


@FAST
@given(seed=SEEDS, scale_of_x=SCALES, scale_of_weight=SCALES)
def test_no_length_matters_to_a_vector(seed, scale_of_x, scale_of_weight):
    x, weight = normal(3, 6, seed=seed), normal(4, 6, seed=seed + 1)
    scaled = linear_cosine(scale_of_x * x, scale_of_weight * weight, eps=NO_EPS)
    assert_close(scaled, linear_cosine(x, weight, eps=NO_EPS), rtol=0, atol=1e-13)


@FAST
@given(seed=SEEDS, window=WINDOWS, entry=OPERATORS_AND_K, power=st.integers(0, 10))
def test_a_power_of_two_on_the_filters_changes_no_bit_where_eps_is_nothing(seed, window, entry, power):
    x, weight = patch_and_filters(seed, window, torch.float32)
    options = dict(window, operator=entry[0], k=entry[1], eps=1e-30)
    assert torch.equal(sphere_conv2d(x, 4.0**power * weight, **options), sphere_conv2d(x, weight, **options))


@FAST
@given(seed=SEEDS, window=WINDOWS, entry=OPERATORS_AND_K, dtype=st.one_of(FLOATS, st.just(torch.float64)))
def test_no_response_leaves_the_range(seed, window, entry, dtype):
    x, weight = patch_and_filters(seed, window, dtype)
    out = sphere_conv2d(x, weight, **window, operator=entry[0], k=entry[1], eps=1e-12)
    assert out.abs().max() <= 1


@FAST
@given(seed=SEEDS, entry=OPERATORS_AND_K, dtype=st.one_of(FLOATS, st.just(torch.float64)))
def test_no_response_to_a_vector_leaves_the_range(seed, entry, dtype):
    weight = normal(4, 6, seed=seed).to(dtype)
    x = torch.cat([weight * 2, -weight])  # parallel and antiparallel
    assert sphere_linear(x, weight, operator=entry[0], k=entry[1], eps=1e-12).abs().max() <= 1


@FAST
@given(seed=SEEDS, window=WINDOWS, entry=OPERATORS_AND_K, dtype=FLOATS)
def test_the_operator_is_odd_in_x_bit_for_bit(seed, window, entry, dtype):
    x, weight = patch_and_filters(seed, window, dtype)
    options = dict(window, operator=entry[0], k=entry[1])
    assert torch.equal(sphere_conv2d(-x, weight, **options), -sphere_conv2d(x, weight, **options))


@FAST
@given(seed=SEEDS, window=WINDOWS, entry=OPERATORS_AND_K, dtype=FLOATS)
def test_the_operator_is_odd_in_the_weight_bit_for_bit(seed, window, entry, dtype):
    x, weight = patch_and_filters(seed, window, dtype)
    options = dict(window, operator=entry[0], k=entry[1])
    assert torch.equal(sphere_conv2d(x, -weight, **options), -sphere_conv2d(x, weight, **options))


@FAST
@given(seed=SEEDS, entry=OPERATORS_AND_K)
def test_a_larger_cosine_never_answers_less(seed, entry):
    x, weight = normal(50, 3, seed=seed), normal(1, 3, seed=seed + 1)
    order = linear_cosine(x, weight).flatten().argsort()
    response = sphere_linear(x, weight, operator=entry[0], k=entry[1]).flatten()[order]
    assert (response.diff() >= -1e-15).all()


@FAST
@given(seed=SEEDS, window=WINDOWS, k=st.floats(10, K_MAX))
def test_the_sigmoid_of_a_large_k_is_linear(seed, window, k):
    x, weight = patch_and_filters(seed, window)
    difference = sphere_conv2d(x, weight, **window, operator="sigmoid", k=k) - sphere_conv2d(
        x, weight, **window, operator="linear"
    )
    assert difference.abs().max() < 0.1 / k**2  # tanh z = z - z^3/3, with z = pi/4k


@FAST
@given(seed=SEEDS, window=WINDOWS)
def test_the_sigmoid_of_a_small_k_is_a_step(seed, window):
    x, weight = patch_and_filters(seed, window)
    response = sphere_conv2d(x, weight, **window, operator="sigmoid", k=K_MIN)
    cosine = conv_cosine(x, weight, **window)
    off_the_step = cosine.abs() > 0.03  # 1 - tanh(0.03 / 2k) = 2e-13
    assert off_the_step.any()
    assert_close(response[off_the_step], cosine[off_the_step].sign(), rtol=0, atol=1e-12)


@FAST
@given(seed=SEEDS, window=WINDOWS, entry=OPERATORS_AND_K, dtype=FLOATS)
def test_no_value_and_no_gradient_is_ever_nan_or_infinite(seed, window, entry, dtype):
    x, weight = (tensor.requires_grad_() for tensor in patch_and_filters(seed, window, dtype))
    leaves = [x, weight]
    operator, k = entry
    if operator == "learnable":
        k = torch.full((4,), k, dtype=torch.float32, requires_grad=True)
        leaves.append(k)
    out = sphere_conv2d(x, weight, **window, operator=operator, k=k)
    gradients = torch.autograd.grad(out.float().square().mean(), leaves)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@FAST
@given(
    seed=SEEDS,
    window=WINDOWS,
    channels=st.sampled_from([4, 8]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    entry=OPERATORS_AND_K.filter(lambda entry: entry[1] is None or entry[1] >= 0.05),
)
def test_the_fast_operator_is_the_slow_one(seed, window, channels, kernel, entry):
    x = normal(2, channels, 7, 8, seed=seed)
    weight = normal(4, channels // window["groups"], *kernel, seed=seed + 1)
    options = dict(window, operator=entry[0], k=entry[1])
    truth = reference.sphere_conv(x, weight, **options)
    # eps keeps |cosine| a little below 1 (fan-in 1 is drawn too); what acos then loses is far below 1e-9.
    assert reference.relative_error(sphere_conv2d(x, weight, **options), truth) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_by_x_is_at_right_angles_to_x(dtype):
    # A length that does not matter cannot have a slope.
    x, weight = normal(5, 6, dtype=dtype).requires_grad_(), normal(3, 6, seed=1, dtype=dtype)
    (gradient,) = torch.autograd.grad(linear_cosine(x, weight, eps=1e-20).sum(), x)
    assert_close((gradient * x).sum(-1), torch.zeros(5, dtype=dtype), rtol=0, atol=1e-6)
