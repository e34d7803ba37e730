"""Responses of rows and their gradients by fitted polynomials: those of float64 on both sides of each end."""

import math

import pytest
import torch
from torch.testing import assert_close

from spherify.functional import cpu_binding
from spherify.functional.cpu_kernels import constants
from spherify.functional.fits import TERMS, fit_of
from spherify.functional.responses import RESPONSES

needs_kernels = pytest.mark.skipif(cpu_binding.library() is None, reason="no C compiler")
OPERATORS = [("linear", None), *(("sigmoid", k) for k in (1e-3, 0.1, 0.29, 0.3, 0.5, 0.7, 3.0, 1e3))]
each_operator = pytest.mark.parametrize(("operator", "k"), OPERATORS)


def fit_for(operator, k):
    terms = constants(operator, k)
    return fit_of(terms.get("steep"), terms["rise"])


def cosines(rows, filters):
    """Of all sizes, those of one sign side by side; float64 numbers that float32 holds, within the kernels' guard."""
    largest = 1 - 2**-23
    return torch.linspace(-largest, largest, rows * filters).double().clamp(-largest, largest).view(rows, filters)


def polynomial(terms, x):
    return sum(term * x**power for power, term in enumerate(terms))


@each_operator
def test_polynomials_are_near_the_response_as_far_as_they_say(operator, k):
    if (fit := fit_for(operator, k)) is None:
        assert k < 0.3
        return
    entry, close = RESPONSES[operator], dict(rtol=2e-7, atol=1e-12)
    edge = math.sqrt(fit.edge)
    cosine = torch.linspace(1e-3, edge, 500, dtype=torch.float64)
    assert_close(cosine * polynomial(fit.near, cosine**2), entry.function(cosine, k), **close)
    cosine = torch.linspace(edge, 1, 500, dtype=torch.float64)
    assert_close(polynomial(fit.far, (0.5 - 0.5 * cosine).sqrt()), entry.function(cosine, k), **close)
    cosine = torch.linspace(1e-3, 0.9, 500, dtype=torch.float64)
    answer, slope = entry.function(cosine, k), entry.slope(cosine, k)
    near, wide = answer**2 <= fit.limit, answer**2 <= fit.reach
    assert near.sum() > 240
    assert wide.sum() > 350
    close["rtol"] = 1e-6  # the truth is of the cosine, the polynomial of the rounded number `limit`
    assert_close(polynomial(fit.slope, answer**2)[near], slope[near], **close)
    assert_close((answer * polynomial(fit.along, answer**2))[near], (slope * cosine)[near], **close)
    assert_close((answer * polynomial(fit.cosine, answer**2))[wide], cosine[wide], **close)


def test_as_many_terms_as_in_c():
    fit = fit_for("sigmoid", 0.5)
    assert {name: len(getattr(fit, name)) for name in TERMS} == dict(near=7, far=9, slope=7, along=7, cosine=11)


@needs_kernels
@pytest.mark.parametrize("is_learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("filters", [5, 16, 23, 40, 144])
@each_operator
def test_rows_are_those_of_float64_at_every_cosine(operator, k, filters, is_learned):
    if is_learned and k is None:
        return
    cosine, entry = cosines(1 + 6000 // filters, filters), RESPONSES[operator]
    terms = (torch.full((filters,), k), operator, 0.0) if is_learned else (None, operator, k or 0.0)
    inverse, length = torch.full((len(cosine), 1), 0.5), torch.full((filters,), 2.0)
    response = torch.ops.spherify.respond(cosine.float(), inverse, length, *terms)
    truth, slope = entry.function(cosine, k), entry.slope(cosine, k)
    assert_close(response.double(), truth, rtol=5e-7, atol=1e-12)
    gradient = torch.full_like(response, 3.0)
    found, along, _ = torch.ops.spherify.respond_backward(gradient, truth.float(), inverse, length, *terms)
    step = 3e-5 * entry.slope_at_equator(k)
    inside = (cosine.abs() < 0.9) & (truth.abs() < 0.99)  # where float32 still tells responses apart
    assert_close(found.double()[inside], 3 * slope[inside], rtol=1e-5, atol=step)
    rows = inside.all(1)
    assert rows.any() or k == 1e-3
    assert_close(along.double()[rows], 3 * (slope * cosine).sum(1, keepdim=True)[rows], rtol=1e-5, atol=filters * step)


@needs_kernels
@each_operator
def test_infinite_products_and_those_beyond_one_count_as_poles(operator, k):
    product = torch.tensor([[float("inf"), -float("inf"), 1.5, -7.0, 0.0]])
    terms = (torch.ones(1, 1), torch.ones(5), None, operator, k or 0.0)
    response = torch.ops.spherify.respond(product, *terms)
    pole = torch.ops.spherify.respond(torch.ones(1, 5), *terms)[0, 0]
    assert_close(response, torch.tensor([[1.0, -1, 1, -1, 0]]) * pole, rtol=0, atol=0)
    assert 0.99 < pole <= 1
