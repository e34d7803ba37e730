"""A learned k and the parameter behind it, which any number keeps within its range."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spherify.functional import cpu_binding
from spherify.functional.fused import takes
from spherify.functional.responses import K_MAX, K_MIN

LOG_K_MIN, LOG_K_MAX = math.log(K_MIN), math.log(K_MAX)


def k_to_logit(k: float) -> float:
    """The parameter whose ``k_from_logit`` is k."""
    share = (math.log(k) - LOG_K_MIN) / (LOG_K_MAX - LOG_K_MIN)
    share = min(max(share, 1e-6), 1 - 1e-6)  # the ends of the range lie at infinity
    return math.log(share / (1 - share))


def k_from_logit(logit: Tensor) -> Tensor:
    """k in [1e-3, 1e3] for every finite logit, so that no optimiser step can take it out of its range."""
    is_plain = logit.dtype == torch.float32 and logit.is_contiguous() and takes(logit) and logit.is_cpu
    if not is_plain or cpu_binding.library() is None:
        return k_by_operations(logit)
    return LearnedK.apply(logit) if logit.requires_grad and torch.is_grad_enabled() else by_kernel(logit, None)


def k_by_operations(logit: Tensor) -> Tensor:
    share = torch.sigmoid(logit.to(torch.promote_types(logit.dtype, torch.float32)))
    k = torch.exp(LOG_K_MIN + (LOG_K_MAX - LOG_K_MIN) * share)
    return k.clamp(K_MIN, K_MAX)  # takes off what rounding adds: in float32, exp(log 1e3) is 1000.0001


class LearnedK(torch.autograd.Function):
    """The same on the CPU, in a call each way: its ten operations would cost a small layer more than its arithmetic."""

    @staticmethod
    def forward(ctx: Any, logit: Tensor) -> Tensor:
        ctx.save_for_backward(logit)
        return by_kernel(logit, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (logit,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.autograd.grad(k_by_operations(logit), logit, gradient, create_graph=True)[0]
        return by_kernel(logit, gradient.contiguous())


def by_kernel(logit: Tensor, gradient: Tensor | None) -> Tensor:
    """k, or the gradient by the logit from that by k."""
    kernels, out = cpu_binding.library(), torch.empty_like(logit)
    assert kernels is not None
    given = None if gradient is None else gradient.data_ptr()
    kernels.learned_k(logit.data_ptr(), given, out.data_ptr(), logit.numel(), K_MIN, K_MAX)
    return out
