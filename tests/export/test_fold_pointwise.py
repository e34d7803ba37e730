"""1x1 convolutions of folded models: the smaller tensor is normalised; norms of single pixels serve every stride."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from spherify import fold, spherify
from spherify.functional import cpu_binding, cpu_kernels

pytestmark = pytest.mark.skipif(cpu_binding.library() is None, reason=f"CPU kernels: {cpu_binding.state()}")
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
X = torch.randn(2, 4, 18, 18, generator=torch.Generator().manual_seed(0))


def folded_pair(plain: nn.Module, operator: str = "cosine") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = spherify(plain, operator=operator, example_input=X).eval()
    return model, fold(model, example_input=X)


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often the kernels of the long way were called."""
    calls = Counter()

    def counted(name, kernel):
        def run(*args, **kwargs):
            calls[name] += 1
            return kernel(*args, **kwargs)

        return run

    for name in ("normalised", "patch_inverse_norm", "normalise_and_respond_"):
        monkeypatch.setattr(cpu_kernels, name, counted(name, getattr(cpu_kernels, name)))
    return calls


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 9, 1), nn.Conv2d(4, 9, 1, bias=False)], ids=["bias", "no bias"])
@LAYOUTS
@torch.no_grad()
def test_a_wide_layer_normalises_its_input_and_keeps_zeros_and_nan(layer, layout, kernel_calls):
    model, folded = folded_pair(nn.Sequential(layer))
    x = X.clone(memory_format=torch.preserve_format).contiguous(memory_format=layout)
    x[0, :, 2:4], x[1, 2, 5, 5] = 0.0, float("nan")
    expected = model(x)
    assert int(expected.isnan().any(1).sum()) == 1
    for way in ("long", "long", "short"):
        kernel_calls.clear()
        found = folded(x)
        assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(found[0, :, 2:4], expected[0, :, 2:4])
        assert way == "short" or not kernel_calls["normalise_and_respond_"]
    assert not kernel_calls


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (nn.Conv2d(4, 3, 1), "cosine"),
        (nn.Conv2d(4, 9, 1), "sigmoid"),
        (nn.Conv2d(4, 8, 1, groups=2), "cosine"),
        (nn.Conv2d(4, 9, 1, stride=2), "cosine"),
        (nn.Conv2d(4, 9, 1, padding=1), "cosine"),
        (nn.Conv2d(4, 9, (1, 2)), "cosine"),
    ],
    ids=["narrow", "sigmoid", "groups", "strided", "padded", "two pixels"],
)
@torch.no_grad()
def test_other_layers_normalise_their_output(layer, operator, kernel_calls):
    model, folded = folded_pair(nn.Sequential(layer), operator)
    expected = model(X)
    kernel_calls.clear()
    assert_close(folded(X), expected, rtol=1e-5, atol=1e-5)
    assert not kernel_calls["normalised"]
    assert kernel_calls["normalise_and_respond_"] == 1


class Bottleneck(nn.Module):
    """A branch and a strided shortcut that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.short = nn.Conv2d(4, 3, 1), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1, stride=2)

    def forward(self, x):
        return self.pool(self.conv(x)) + self.short(x)


@LAYOUTS
@torch.no_grad()
def test_a_strided_shortcut_takes_its_norms_from_those_of_every_pixel(layout, kernel_calls):
    model, folded = folded_pair(Bottleneck())
    for number, numbers in enumerate(
        (X, X.flip(0), 2 * X.flip(2))
    ):  # the second tries the short way, the third takes it
        images = numbers.contiguous(memory_format=layout)
        expected = model(images)
        kernel_calls.clear()
        found = folded(images)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert kernel_calls["patch_inverse_norm"] == (1, 3, 1)[number]


@LAYOUTS
@torch.no_grad()
def test_two_threads_give_the_answer_of_one(layout):
    plain = nn.Sequential(nn.Conv2d(4, 40, 1), nn.Conv2d(40, 30, 3), nn.GELU(), nn.Conv2d(30, 30, 3, groups=30))
    _, folded = folded_pair(plain)
    x = torch.randn(8, 4, 40, 40).contiguous(memory_format=layout)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers += [folded(x) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        assert_close(answer, answers[0], rtol=1e-5, atol=1e-6)
