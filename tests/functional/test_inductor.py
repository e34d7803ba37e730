"""What Inductor is told: its graphs call our functions without torch's dispatcher, where it makes them as we know."""

import contextlib

import pytest
import torch
import torch._functorch.config
from torch import nn
from torch._inductor import config
from torch.testing import assert_close

import spherify
from spherify.functional import cpu_binding, inductor
from spherify.functional.graph_operators import OPERATORS, direct_name, ours

pytestmark = pytest.mark.skipif(
    cpu_binding.library() is None or not hasattr(torch.compiler, "is_exporting"),
    reason="no C compiler, or torch cannot tell that it exports",
)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16 * 16, 10))
    x = torch.randn(2, 4, 8, 8)
    return spherify.plan(model, operator="sigmoid", example_input=x).apply(), x


def without_cache():
    """Graphs are made anew: the cache's key does not know what Inductor was told."""
    stack = contextlib.ExitStack()
    stack.enter_context(config.patch(fx_graph_cache=False))
    stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
    return stack


def gradients(model, run, x):
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), *(weight.grad.clone() for weight in model.parameters())]


def test_the_code_of_graphs_calls_functions_and_not_operators():
    from torch._inductor.utils import run_fw_bw_and_get_code

    model, x = network()
    truth = gradients(model, model, x)
    torch.compiler.reset()
    with without_cache():
        found, codes = run_fw_bw_and_get_code(lambda: torch.compile(model)(x))
    code = "\n".join(codes)
    for name in OPERATORS:
        assert f"torch.ops.spherify.{direct_name(name)}(" in code
        assert f"torch.ops.spherify.{name}.default(" not in code
    assert_close(found.detach(), truth[0], rtol=1e-4, atol=1e-5)


def test_functions_are_found_under_the_names_that_graphs_use():
    for name, (_, function, _) in OPERATORS.items():
        assert getattr(ours, direct_name(name)).__name__ == function.__name__


def test_what_is_not_known_of_a_graph_is_left_as_it_is():
    assert inductor.call_of(object()) is None
    assert inductor.call_of((object(), object())) is None


@pytest.mark.slow
def test_graphs_in_cpp_call_the_operators():
    model, x = network()
    truth = gradients(model, model, x)
    torch.compiler.reset()
    with without_cache(), config.patch(cpp_wrapper=True):
        found = gradients(model, torch.compile(model), x)
    assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_without_the_compilers_way_torch_makes_what_is_empty(monkeypatch):
    monkeypatch.setattr(cpu_binding, "QUICKLY", cpu_binding.by_dispatcher)
    made = cpu_binding.empty_at_once(torch.Size((2, 3, 4, 5)), (60, 1, 15, 3))
    assert (made.shape, made.stride(), made.dtype) == ((2, 3, 4, 5), (60, 1, 15, 3), torch.float32)
    monkeypatch.undo()
    again = cpu_binding.empty_at_once(made.shape, made.stride())
    assert (again.shape, again.stride(), again.dtype) == (made.shape, made.stride(), made.dtype)
