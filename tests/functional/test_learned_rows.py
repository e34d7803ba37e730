"""Responses of rows where each filter has a k of its own: those of float64, with k on both sides of every end."""

import math

import pytest
import torch
from torch.testing import assert_close

from spherify.functional import cpu_binding, cpu_rows
from spherify.functional.families import BEYOND_OF_U, BEYOND_TERMS, EDGE, LEAST_K, OF_U, REACH, TERMS, family
from spherify.functional.responses import RESPONSES

needs_kernels = pytest.mark.skipif(cpu_binding.library() is None, reason="no C compiler")
LEARNABLE = RESPONSES["learnable"]
KS = (LEAST_K, 0.31, 0.4, 0.5, 0.7, 1.0, 3.0, 30.0, 1e3)


def series(terms, x):
    return sum(term * x**power for power, term in enumerate(terms))


def terms_at(name, k, of_u=OF_U):
    """The terms of the polynomials for one k."""
    v = 2 * (0.5 / k) ** 2 / family().most - 1
    numbers = list(getattr(family(), name))
    return [series(numbers[first : first + of_u], v) for first in range(0, len(numbers), of_u)]


@pytest.mark.parametrize("k", KS)
def test_polynomials_are_near_the_response_as_far_as_they_say(k):
    close = dict(rtol=3e-7, atol=1e-12)
    cosine = torch.linspace(1e-3, EDGE, 500, dtype=torch.float64)
    assert_close(cosine * series(terms_at("near", k), cosine**2), LEARNABLE.function(cosine, k), **close)
    beyond = torch.linspace(EDGE, 1.0, 500, dtype=torch.float64)
    half = ((1 - beyond) / 2).sqrt()
    assert_close(1 + half * series(terms_at("far", k, BEYOND_OF_U), half), LEARNABLE.function(beyond, k), **close)
    cosine = torch.linspace(1e-3, REACH, 500, dtype=torch.float64)
    angle, slope = cosine.asin(), LEARNABLE.slope(cosine, k)
    t = LEARNABLE.function(cosine, k) / LEARNABLE.slope_at_equator(k)
    limit = terms_at("limit", k)[0]
    assert math.sqrt(limit) == pytest.approx(float(t[-1]), rel=1e-5)
    assert_close(series(terms_at("slope", k), t**2), slope, **close)
    assert_close(t * series(terms_at("along", k), t**2), slope * cosine, **close)
    assert_close(t * series(terms_at("angle", k), t**2), (1 - (angle / (2 * k)).tanh() ** 2) * angle, rtol=6e-7, atol=0)


def test_as_many_terms_as_in_c():
    assert (TERMS, OF_U) == (7, 9)
    assert (BEYOND_TERMS, BEYOND_OF_U) == (9, 13)
    assert (len(family().along), len(family().far)) == (TERMS * OF_U, BEYOND_TERMS * BEYOND_OF_U)


def sample(rows, filters, deviation=0.25):
    """Cosines, of which some are far from the equator, and k from 0.1 to 30."""
    generator = torch.Generator().manual_seed(rows + filters)
    cosine = (torch.randn(rows, filters, generator=generator).double() * deviation).clamp(-0.99, 0.99)
    k = torch.logspace(-1, 1.5, filters)[torch.randperm(filters, generator=generator)]
    return cosine.float(), k, torch.randn(rows, filters, generator=generator)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("deviation", [0.05, 0.25])
@pytest.mark.parametrize(("rows", "filters"), [(15, 20), (16, 16), (67, 5), (131, 40), (18, 100), (64, 17)])
def test_rows_have_the_numbers_of_float64(rows, filters, deviation, threads, monkeypatch, request):
    monkeypatch.setattr(cpu_binding, "NUMBERS_A_THREAD", 1)
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(threads)
    cosine, k, gradient = sample(rows, filters, deviation)
    product, inverse = cosine * torch.linspace(0.5, 2, rows)[:, None], 1 / torch.linspace(0.5, 2, rows)[:, None]
    terms = (inverse, torch.ones(filters), k, "learnable", 0.0)
    wide = [tensor.double().requires_grad_() for tensor in (product * inverse, k)]
    truth = LEARNABLE.function(*wide)
    response = torch.ops.spherify.respond(product, *terms)
    assert_close(response.double(), truth, rtol=1e-6, atol=1e-12)
    by_product, along, sums = torch.ops.spherify.respond_backward(gradient, response, *terms)
    by_cosine, _ = torch.autograd.grad(truth, wide, gradient.double())
    steps = 2e-6 * by_cosine.abs().max()  # where the response is nearly 1, float32 does not tell slopes apart
    assert_close(by_product.double(), by_cosine * inverse, rtol=1e-4, atol=float(steps * 2))
    assert_close(along.double(), (by_cosine * wide[0]).sum(1, keepdim=True), rtol=1e-4, atol=float(steps * filters))
    assert_close(sums[0].double(), (gradient * truth).sum(0), rtol=1e-5, atol=1e-4)
    end = (math.pi / 4 / wide[1]).tanh()
    t = truth * end
    for_k = (gradient * (1 - t**2) * t.atanh()).sum(0)
    assert_close(sums[1].double(), for_k, rtol=1e-5, atol=2e-6 * rows)


@needs_kernels
@pytest.mark.parametrize("place", [0, 5, 37])
def test_a_nan_and_an_infinite_number_stay_where_they_are(place):
    cosine, k, gradient = sample(21, 40, 0.1)
    terms = (torch.ones(21, 1), torch.ones(40), k, "learnable", 0.0)
    plain, broken = torch.ops.spherify.respond(cosine, *terms), cosine.clone()
    broken[7, place], broken[9, place] = float("nan"), float("inf")
    response = torch.ops.spherify.respond(broken, *terms)
    assert response[7, place].isnan()
    assert 0.99 < response[9, place] <= 1
    others = torch.ones_like(broken, dtype=torch.bool)
    others[[7, 9], place] = False
    assert_close(response[others], plain[others], rtol=5e-7, atol=0)
    plain[7, place] = float("nan")
    by_product, along, _ = torch.ops.spherify.respond_backward(gradient, plain, *terms)
    assert by_product[7, place].isnan()
    assert torch.equal(along.isnan().nonzero(), torch.tensor([[7, 0]]))
    assert by_product.isnan().sum() == 1


@needs_kernels
def test_a_shape_seen_before_is_described_with_the_numbers_of_this_call():
    """Of all descriptions one is kept for a shape; lengths and k are each call's own."""
    cosine, k, gradient = sample(20, 24)
    cpu_rows.HELD.clear()
    for length, own in ((1.0, k), (0.5, k.flip(0))):
        terms = (torch.ones(20, 1), torch.full((24,), length), own, "learnable", 0.0)
        response = torch.ops.spherify.respond(cosine, *terms)
        assert_close(response, LEARNABLE.function(cosine * length, own), rtol=1e-5, atol=1e-6)
        torch.ops.spherify.respond_backward(gradient, response, *terms)
    assert len(cpu_rows.HELD) == 1
