"""What Inductor is told of our operators: how their tensors are to lie, and that its graphs call them without torch.

None of this has a public name in torch. Where a name is missing, graphs are as right, and slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from spherify.functional.graph_operators import direct_name, ours

Given = tuple[tuple[Any, ...], dict[str, Any]]


@functools.cache
def tell_inductor() -> None:
    """Once in a process, before it compiles a graph that holds our operators."""
    try:
        from torch._inductor.lowering import lowerings, make_fallback
    except ImportError:
        return
    constraints = dict(
        respond=None,
        respond_backward=as_the_response,
        depthwise=with_rows_first,
        depthwise_backward=as_the_response,
        pointwise=in_rows,
        pointwise_backward=in_rows,
    )
    for name, constraint in constraints.items():
        # As a fallback of our own: the one that Inductor makes of an operator it meets first has its own constraint,
        # which would take the place of one that is only added.
        operator = getattr(ours, name).default
        make_fallback(operator, layout_constraint=constraint, warn=False)
        lowerings[operator] = called_directly(lowerings[operator], name)


def as_the_response(_: Any, gradient: Any, response: Any, *others: Any) -> Given:
    """Gradients by responses as the responses lie; it would write channels-last ones as planes."""
    if len(response.get_size()) == 4 and response.get_stride()[1] == 1:
        gradient = rows_of(gradient)
    return (gradient, response, *others), {}


def in_rows(_: Any, *arguments: Any) -> Given:
    """Activations with what belongs to a position side by side, and 1x1 weights row by row."""
    return tuple(rows_of(one) for one in arguments), {}


def with_rows_first(_: Any, x: Any, *others: Any) -> Given:
    """The same for the input alone: filters of depthwise layers lie as they do."""
    return (rows_of(x), *others), {}


def rows_of(one: Any) -> Any:
    from torch._inductor import ir

    if not isinstance(one, ir.TensorBox) or len(one.get_size()) != 4:
        return one
    return ir.ExternKernel.require_stride_order(one, [3, 0, 2, 1])


def called_directly(lowering: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same, with the operator's function called in the place of the operator where the graph's code is Python.

    torch's dispatcher, which finds that function, takes longer than a small layer's arithmetic.
    """

    @functools.wraps(lowering)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        from torch._inductor.virtualized import V

        found = lowering(*args, **kwargs)
        node = None if V.graph.cpp_wrapper else call_of(found)
        if node is not None:
            node.python_kernel_name = f"torch.ops.spherify.{direct_name(name)}"
        return found

    return lowered


def call_of(found: Any) -> Any:
    """The node of a graph that calls what gave this; None where graphs are made in another way than we know."""
    from torch._inductor import ir

    one = found[0] if isinstance(found, (tuple, list)) else found
    while not isinstance(one, ir.FallbackKernel):
        inputs = getattr(one, "inputs", None)
        one = inputs[0] if isinstance(one, ir.MultiOutput) and inputs else getattr(one, "data", None)
        if one is None:
            return None
    return one if hasattr(one, "python_kernel_name") else None
