"""What responses and their gradients cost in compiled graphs, where filters lie innermost: ns a number, on one core.

``python -m benchmarks.row_responses`` prints a line for each operator and width of cosines: forward, backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from spherify.functional import graph_operators as operators

NUMBERS = 2_000_000  # float32, too many for a second-level cache
OPERATORS = (("linear", 0.0), ("sigmoid", 0.3), ("sigmoid", 0.5), ("sigmoid", 0.7), ("learnable", 0.5))


def least_time(run: Callable[[], object], repeats: int = 15) -> float:
    """Seconds of CPU time."""
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        taken.append(time.process_time() - begin)
    return min(taken)


def nanoseconds(operator: str, k: float, filters: int, deviation: float) -> tuple[float, float]:
    """Forward and backward, of cosines with that standard deviation."""
    torch.manual_seed(0)
    rows = NUMBERS // filters
    product, gradient = (torch.randn(rows, filters) * deviation).clamp(-1, 1), torch.randn(rows, filters)
    inverse, length = torch.ones(rows, 1), torch.ones(filters)
    own = torch.full((filters,), k) if operator == "learnable" else None
    terms = (inverse, length, own, operator, 0.0 if own is not None else k)
    response = operators.respond(product, *terms)
    forward = least_time(lambda: operators.respond(product, *terms))
    backward = least_time(lambda: operators.respond_backward(gradient, response, *terms))
    return forward / product.numel() * 1e9, backward / product.numel() * 1e9


def main() -> None:
    torch.set_num_threads(1)
    for deviation in (0.1, 0.25, 0.4):
        for operator, k in OPERATORS:
            found = (nanoseconds(operator, k, filters, deviation) for filters in (96, 144, 384, 960))
            line = "  ".join(f"{forward:.2f}/{backward:.2f}" for forward, backward in found)
            print(f"{deviation:4.2f}  {operator:9} {k or '':3}  {line}", flush=True)


if __name__ == "__main__":
    main()
