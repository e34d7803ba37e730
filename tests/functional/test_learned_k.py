"""A learned k by one call each way against the operations it stands for."""

import pytest
import torch
from torch.testing import assert_close

from spherify.functional import cpu_binding, learned_k
from spherify.functional.learned_k import k_by_operations, k_from_logit, k_to_logit
from spherify.functional.responses import K_MAX, K_MIN

NUMBERS = torch.tensor([-200.0, -30.0, -3.0, -1e-3, 0.0, 0.7, 9.0, 200.0])


def slopes(function, logit, dtype=torch.float32):
    """The first and the second derivative of sum(k^2)."""
    logit = logit.to(dtype, copy=True).requires_grad_()
    (first,) = torch.autograd.grad(function(logit).square().sum(), logit, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logit)
    return first.detach(), second


def test_it_is_what_the_operations_compute_in_float64():
    found = k_from_logit(NUMBERS.clone().requires_grad_())
    assert_close(found.double(), k_by_operations(NUMBERS.double()), rtol=1e-6, atol=0.0)
    assert found.min() >= K_MIN - 1e-10 and found.max() <= K_MAX
    assert_close(k_from_logit(NUMBERS), found, rtol=0.0, atol=0.0)


def test_its_gradient_and_the_gradient_of_that():
    truth = slopes(k_by_operations, NUMBERS, torch.float64)
    for found, exact in zip(slopes(k_from_logit, NUMBERS), truth, strict=True):
        assert_close(found.double(), exact, rtol=2e-3, atol=1e-8)  # 1 - share has few digits
    logit = NUMBERS.clone().requires_grad_()
    k_from_logit(logit).square().sum().backward()
    assert_close(logit.grad.double(), truth[0], rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(cpu_binding.library() is None, reason="there is no C compiler")
def test_one_call_serves_training_in_float32_alone(monkeypatch):
    calls = []
    real = learned_k.by_kernel
    monkeypatch.setattr(learned_k, "by_kernel", lambda *given: calls.append(given) or real(*given))
    k_from_logit(torch.zeros(3, requires_grad=True)).sum().backward()
    assert len(calls) == 2
    k_from_logit(torch.zeros(3, requires_grad=True, dtype=torch.float64)).sum().backward()
    k_from_logit(torch.zeros(6, requires_grad=True)[::2]).sum().backward()
    assert len(calls) == 2


def test_nan_stays_nan_and_the_inverse_is_one():
    assert k_from_logit(torch.tensor([float("nan")])).isnan().all()
    for k in (0.01, 0.3, 1.0, 700.0):
        assert_close(k_from_logit(torch.tensor([k_to_logit(k)])).item(), k, rtol=1e-5, atol=0.0)
