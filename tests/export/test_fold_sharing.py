"""Patch norms that layers share: computed once, eagerly and in exported programs, and anew after a change in place."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spherify import fold, spherify
from spherify.functional import cpu_binding
from spherify.functional.folded import SharedNorms

OPERATORS = ["cosine", "linear"]
IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Convs(nn.Module):
    """Two branches with the same window and a shortcut of one pixel: two norms, one channel sum.

    The shortcut has fewer channels than filters: for the cosine its normalised input is kept beside its norms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.short = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.one(x) + self.two(x).sigmoid() * self.short(x)


class Projections(nn.Module):
    """q, k and v: one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.q(x) + self.k(x).sigmoid() * self.v(x)


CASES = {"convs": (Convs, IMAGES), "projections": (Projections, TOKENS)}
WANTED = {"convs": Counter(sums=1, roots=2), "projections": Counter(sums=1, roots=1)}


def folded_pair(case: str, operator: str = "cosine") -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    kind, x = CASES[case]
    model = spherify(kind(), operator=operator, head="convert", example_input=x).eval()
    return model, fold(model, example_input=x), x


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES)
def test_a_norm_is_computed_once_in_eager_mode(case, operator, monkeypatch):
    model, folded, x = folded_pair(case, operator)
    get, computed = SharedNorms.get, []

    def counting(self, x, key, compute):
        return get(self, x, key, lambda: computed.append(key) or compute())

    monkeypatch.setattr(SharedNorms, "get", counting)
    with torch.no_grad():
        assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    in_one_pass = cpu_binding.library() is not None  # else the channel sum is a third, which 3x3 and 1x1 share
    assert len(computed) == {"convs": 2 if in_one_pass and operator != "cosine" else 3, "projections": 1}[case]


@pytest.mark.skipif(cpu_binding.library() is None, reason=f"CPU kernels: {cpu_binding.state()}")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_shape_met_before_has_its_norms_once_and_anew_for_other_numbers(case, operator, monkeypatch):
    model, folded, x = folded_pair(case, operator)
    for _ in range(3):
        folded(x)
    get, computed = SharedNorms.get, []

    def counting(self, x, key, compute):
        return get(self, x, key, lambda: computed.append(key) or compute())

    monkeypatch.setattr(SharedNorms, "get", counting)
    for images in (x.clone(), 2 * x.flip(0)):
        computed.clear()
        assert_close(folded(images), model(images), rtol=1e-5, atol=1e-5)
        assert len(computed) == {"convs": 3 if operator == "cosine" else 2, "projections": 1}[case]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES)
def test_a_norm_is_computed_once_in_an_exported_program(case, operator):
    model, folded, x = folded_pair(case, operator)
    program = torch.export.export(folded, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    calls = [str(node.target) for node in program.graph.nodes]
    assert sum("aten.sum" in call for call in calls) == WANTED[case]["sums"]
    assert sum("aten.rsqrt" in call for call in calls) == WANTED[case]["roots"]
    more = torch.cat([x, x + 1.0])
    assert_close(program.module()(more), model(more), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("case", CASES)
def test_a_norm_is_computed_once_in_an_onnx_file(case):
    pytest.importorskip("onnxscript")
    _, folded, x = folded_pair(case)
    graph = torch.onnx.export(folded, (x,), dynamo=True, opset_version=18, verbose=False).model_proto.graph
    calls = Counter(node.op_type for node in graph.node)
    assert calls["ReduceSum"] == WANTED[case]["sums"]
    assert calls["Sqrt"] == WANTED[case]["roots"]


class ChangedBetween(nn.Module):
    """The model's recorder sees two tensors; with the stores tied by hand, only the version tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = x * 2.0
        y = self.one(x)
        x += 1.0
        return y + self.two(x)


@pytest.mark.parametrize("form", ["eager", "exported"])
def test_a_change_in_place_between_two_layers_is_seen(form):
    torch.manual_seed(0)
    model = spherify(ChangedBetween(), example_input=IMAGES).eval()
    folded = fold(model, example_input=IMAGES)
    assert folded.one.shared is folded.two.shared is None
    folded.one.shared = folded.two.shared = SharedNorms()
    with torch.no_grad():
        run = folded if form == "eager" else torch.export.export(folded, (IMAGES,)).module()
        assert_close(run(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_compiler_is_not_given_norms_of_another_run():
    _, folded, x = folded_pair("convs")
    with torch.no_grad():
        expected = folded(x)
        compiled = torch.compile(folded, backend="eager", fullgraph=True)
        assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        assert_close(compiled(2.0 * x + 1.0), folded(2.0 * x + 1.0), rtol=1e-5, atol=1e-5)
