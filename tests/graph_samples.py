"""What of ours stands in the graphs that ``torch.compile`` makes of a function and of its gradient."""

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd


def calls_of_ours(function, *leaves):
    """(name, arguments) of each call of an operator of ours, forward and then backward, of a function made anew."""
    found = []

    def look(graph, _):
        for node in graph.graph.nodes:
            package, _, name = str(node.target).removesuffix(".default").partition(".")
            if package == "spherify":
                found.append((name, node.args))
        return make_boxed_func(graph)

    torch.compiler.reset()
    run = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    out = run(*leaves)
    if out.requires_grad:
        out.sum().backward()
    return found
