"""The kernels in C: against float64, in every layout, with threads, and what happens without a compiler."""

import contextlib
import itertools
import math
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from angular_samples import OPERATORS, normal, options_of
from torch.testing import assert_close

from spherify.functional import c_library, cpu_binding, cpu_kernels, eager, sphere_conv1d, sphere_conv2d, sphere_linear
from spherify.functional.plain import plain_sphere

pytestmark = pytest.mark.skipif(cpu_binding.library() is None, reason=f"CPU kernels: {cpu_binding.state()}")
each_operator = pytest.mark.parametrize("name", OPERATORS)
SHAPES = {  # x, weight, window
    "3x3": ((2, 3, 9, 11), (8, 3, 3, 3), dict(padding=1)),
    "1x1": ((2, 16, 8, 8), (8, 16, 1, 1), {}),
    "1x1 of every other pixel": ((2, 8, 9, 8), (16, 8, 1, 1), dict(stride=2)),
    "depthwise": ((2, 12, 11, 10), (12, 1, 3, 3), dict(padding=1, stride=2, groups=12)),
    "depthwise 7x7": ((2, 6, 15, 14), (6, 1, 7, 7), dict(padding=3, groups=6)),
    "groups, dilated, uneven": (
        (2, 16, 10, 12),
        (32, 4, 3, 5),
        dict(padding=2, stride=(2, 1), dilation=(2, 1), groups=4),
    ),
    "5x5": ((1, 9, 13, 13), (4, 9, 5, 5), dict(padding=2)),
    "4x4 in patches": ((2, 3, 16, 16), (20, 3, 4, 4), dict(stride=4)),
    "one pixel": ((3, 40, 1, 1), (24, 40, 1, 1), {}),
    "padding beyond the window": ((2, 4, 5, 5), (3, 4, 1, 1), dict(padding=2)),
    "many positions": ((1, 8, 60, 60), (5, 8, 3, 3), dict(padding=1)),
    "depthwise 3x3": ((1, 2, 40, 41), (2, 1, 3, 3), dict(padding=1, groups=2)),
    "depthwise 3x3, small maps": ((2, 130, 5, 4), (130, 1, 3, 3), dict(padding=1, groups=130)),
    "depthwise 3x3, one row": ((3, 5, 1, 6), (5, 1, 3, 3), dict(padding=1, groups=5)),
    "small maps in chunks": ((3, 40, 6, 6), (64, 40, 3, 3), dict(padding=1)),
    "small maps in groups": ((2, 16, 5, 5), (32, 4, 3, 3), dict(padding=1, groups=4)),
    "many images": ((9, 16, 16, 16), (64, 16, 3, 3), dict(padding=1)),
}


@pytest.fixture
def kernel_calls(monkeypatch):
    """How often a layer was computed by the kernels."""
    made = []
    real = eager.by_cpu_kernels

    def counted(*inputs, **options):
        found = real(*inputs, **options)
        made.extend([] if found is None else [found])
        return found

    monkeypatch.setattr(eager, "by_cpu_kernels", counted)
    return made


def in_both_types(function, tensors, k):
    """(output, *gradients) in float32, and in float64 by plain operations."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        soft = k.detach().to(dtype).requires_grad_() if isinstance(k, torch.Tensor) else k
        out = function(*leaves, soft)
        wanted = [leaf for leaf in (*leaves, soft) if isinstance(leaf, torch.Tensor)]
        results.append([out, *torch.autograd.grad(out, wanted, normal(*out.shape, seed=9).to(dtype))])
    return results


def assert_near(found, truth, limit=2e-6):
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == torch.float32
        error = (one.double() - other).norm() / other.norm()
        cancels = 10.0 if one.numel() < 6 and other is truth[-1] else 1.0  # by one k for all: terms of both signs
        assert error <= limit * cancels, (float(error), one.shape)


@pytest.mark.parametrize("with_gain, with_bias", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("shape", SHAPES)
@each_operator
def test_convolutions_and_all_gradients_are_those_in_double(name, shape, with_gain, with_bias, kernel_calls):
    sizes, filters, window = SHAPES[shape]
    x, weight = normal(*sizes, dtype=torch.float32), normal(*filters, seed=1, dtype=torch.float32)
    bias = normal(filters[0], seed=2, dtype=torch.float32) if with_bias else None
    gain = normal(filters[0], seed=3, dtype=torch.float32).abs() + 0.5 if with_gain else None
    options = options_of(name, filters[0], torch.float32)
    operator, k = options["operator"], options.get("k")

    def run(x, weight, bias, gain, k):
        return sphere_conv2d(x, weight, bias, gain=gain, k=k, operator=operator, **window)

    assert_near(*in_both_types(run, (x, weight, bias, gain), k))
    assert len(kernel_calls) == 1  # the float32 half


@each_operator
@pytest.mark.parametrize("bias_size", [0.1, 10.0], ids=["response from the output", "response kept"])
def test_linear_layers_and_one_dimension(name, bias_size, kernel_calls):
    options = options_of(name, 12, torch.float32)
    operator, k = options["operator"], options.get("k")
    bias, gain = (
        bias_size * normal(12, seed=2, dtype=torch.float32),
        normal(12, seed=3, dtype=torch.float32).abs() + 0.5,
    )
    weight = normal(12, 40, seed=1, dtype=torch.float32)

    def linear(x, weight, bias, gain, k):
        return sphere_linear(x, weight, bias, gain=gain, k=k, operator=operator)

    assert_near(*in_both_types(linear, (normal(4, 7, 40, dtype=torch.float32), weight, bias, gain), k), limit=5e-6)

    def conv(x, weight, bias, gain, k):
        return sphere_conv1d(x, weight, bias, gain=gain, k=k, operator=operator, padding=2, stride=2)

    line = normal(12, 8, 5, seed=1, dtype=torch.float32)
    assert_near(*in_both_types(conv, (normal(3, 8, 21, dtype=torch.float32), line, bias, gain), k), limit=5e-6)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize(
    "window", [dict(padding=3), dict(padding=1, stride=2), dict(dilation=2, padding=(4, 0))], ids=str
)
@each_operator
def test_depthwise_layers_on_channels_last_maps(name, window, kernel_calls):
    options = options_of(name, 10, torch.float32)
    operator, k = options["operator"], options.get("k")
    weight = normal(10, 1, 7, 3, seed=1, dtype=torch.float32)
    x = normal(2, 10, 16, 13, dtype=torch.float32).contiguous(memory_format=torch.channels_last)

    def run(x, weight, k):
        x = x.contiguous(memory_format=torch.channels_last)
        return sphere_conv2d(x, weight, groups=10, k=k, operator=operator, **window)

    found, truth = in_both_types(run, (x, weight), k)
    assert_near(found, truth)
    assert len(kernel_calls) == 1
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_a_depthwise_layer_whose_input_is_one_pixel_and_whose_output_is_not():
    x, weight = normal(2, 6, 1, 1, dtype=torch.float32), normal(6, 1, 3, 3, seed=1, dtype=torch.float32)
    found = sphere_conv2d(x, weight, padding=3, groups=6)
    assert_close(found.double(), sphere_conv2d(x.double(), weight.double(), padding=3, groups=6), rtol=1e-5, atol=1e-6)


@each_operator
def test_channels_last_and_strange_layouts(name):
    options = options_of(name, 12, torch.float32)
    weight = normal(12, 8, 3, 3, seed=1, dtype=torch.float32)
    x = normal(2, 8, 9, 7, dtype=torch.float32)
    cotangent = normal(2, 12, 9, 7, seed=4, dtype=torch.float32)
    strewn = torch.stack([x, x], -1)[..., 0]
    assert not strewn.is_contiguous()
    expected = None
    for form in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        strewn,
    ):
        leaf = form.detach().requires_grad_()
        out = sphere_conv2d(leaf, weight, padding=1, **options)
        found = (out, *torch.autograd.grad(out, leaf, cotangent))
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rtol=1e-5, atol=1e-6)


@each_operator
def test_a_default_type_or_device_of_the_users_changes_nothing(name):
    options = options_of(
        name, 37, torch.float32
    )  # a number of filters that no other test has, so that nothing is cached
    x, weight = normal(2, 3, 6, 6, dtype=torch.float32), normal(37, 3, 3, 3, seed=1, dtype=torch.float32)
    rows = x.contiguous(memory_format=torch.channels_last)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = [sphere_conv2d(images, weight, bias=weight[:, 0, 0, 0], **options) for images in (x, rows)]
    finally:
        torch.set_default_dtype(torch.float32)
    cpu_kernels.filler.cache_clear()
    for one in found:
        assert one.device.type == "cpu"
        assert_close(one, sphere_conv2d(x, weight, bias=weight[:, 0, 0, 0], **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["weight", "bias", "gain"])
def test_a_tensor_that_lies_elsewhere_never_reaches_the_kernels(place, kernel_calls):
    tensors = dict(weight=torch.ones(4, 3, 3, 3), bias=torch.ones(4), gain=torch.ones(4))
    tensors[place] = tensors[place].to("meta")
    with contextlib.suppress(RuntimeError):  # torch's own word on it
        sphere_conv2d(torch.ones(1, 3, 5, 5), **tensors)
    assert not kernel_calls


def test_gradients_that_come_expanded_or_transposed():
    x, weight = normal(2, 4, 6, 6, dtype=torch.float32), normal(5, 4, 3, 3, seed=1, dtype=torch.float32)
    weight.requires_grad_()
    (found,) = torch.autograd.grad(sphere_conv2d(x, weight, operator="linear").sum(), weight)
    (again,) = torch.autograd.grad((sphere_conv2d(x, weight, operator="linear") * torch.ones(2, 5, 4, 4)).sum(), weight)
    assert_close(found, again)
    cotangent = normal(2, 4, 4, 5, seed=3, dtype=torch.float32)
    (found,) = torch.autograd.grad((sphere_conv2d(x, weight).permute(0, 2, 3, 1) * cotangent).sum(), weight)
    straight = cotangent.permute(0, 3, 1, 2).contiguous()
    assert_close(found, torch.autograd.grad(sphere_conv2d(x, weight), weight, straight)[0])


@each_operator
def test_threads_change_nothing_beyond_rounding_and_a_repeat_nothing_at_all(name):
    options = options_of(name, 24, torch.float32)
    weight = normal(24, 16, 3, 3, seed=1, dtype=torch.float32).requires_grad_()
    x = normal(8, 16, 24, 24, dtype=torch.float32).requires_grad_()

    def run():
        out = sphere_conv2d(x, weight, padding=1, **options)
        return out, *torch.autograd.grad(out.square().sum(), (x, weight))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run()
        torch.set_num_threads(3)
        several, again = run(), run()
    finally:
        torch.set_num_threads(before)
    for one, two, three in zip(single, several, again, strict=True):
        assert_close(one, two, rtol=1e-4, atol=1e-4)
        assert torch.equal(two, three)


@each_operator
def test_the_gradient_is_right_after_a_change_in_place_and_the_second_time(name):
    options = options_of(name, 6, torch.float32)
    x, weight = (
        normal(2, 3, 6, 6, dtype=torch.float32),
        normal(6, 3, 3, 3, seed=1, dtype=torch.float32).requires_grad_(),
    )
    (expected,) = torch.autograd.grad(F.relu(sphere_conv2d(x, weight, **options)).square().sum(), weight)
    loss = F.relu_(sphere_conv2d(x, weight, **options)).square().sum()
    assert_close(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected)
    assert_close(torch.autograd.grad(loss, weight)[0], expected)
    loss = F.relu(sphere_conv2d(x, weight, **options)).square().sum()
    torch.autograd.grad(loss, weight, retain_graph=True)
    assert_close(torch.autograd.grad(loss, weight)[0], expected)


@each_operator
def test_nothing_of_the_outputs_size_is_held_after_the_backward_pass(name):
    options = options_of(name, 6, torch.float32)
    weight = normal(6, 3, 3, 3, seed=1, dtype=torch.float32).requires_grad_()
    out = sphere_conv2d(normal(2, 3, 6, 6, dtype=torch.float32), weight, **options)
    context = out.grad_fn
    assert context.answer is not None
    out.sum().backward()
    assert context.answer is None


@each_operator
def test_a_nan_pixel_reaches_its_patches_and_no_others(name):
    options = options_of(name, 4, torch.float32)
    x, weight = normal(1, 2, 9, 9, dtype=torch.float32), normal(4, 2, 3, 3, seed=1, dtype=torch.float32)
    x[0, 1, 4, 4] = float("nan")
    out = sphere_conv2d(x, weight, padding=1, **options)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 3:6] = True
    assert torch.equal(out.isnan()[0].any(0), expected)
    assert torch.equal(out.isnan()[0].all(0), expected)


@pytest.mark.parametrize("size", [7, 40])
def test_a_nan_pixel_of_a_depthwise_layer_stays_in_its_map(size):
    x, weight = normal(2, 30, size, size, dtype=torch.float32), normal(30, 1, 3, 3, seed=1, dtype=torch.float32)
    x[1, 7, 3, 0] = float("nan")
    out = sphere_conv2d(x, weight, padding=1, groups=30)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[1, 7, 2:5, 0:2] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (48, 34), (7, 8), (8, 7)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_norms_of_3x3_depthwise_layers_are_those_in_double(size, stride):
    x = normal(3, 5, *size, dtype=torch.float32)
    x[1, 2, 0, 0], x[2, 4] = float("nan"), 0.0
    found = cpu_kernels.patch_inverse_norm(x, (3, 3), (stride, stride), (1, 1), (1, 1), 5, 1e-4, 2.0)
    ones = torch.ones(5, 1, 3, 3, dtype=torch.float64)
    energy = torch.nn.functional.conv2d(x.double().square(), ones, stride=stride, padding=1, groups=5)
    assert_close(found.double(), 2 * torch.rsqrt(energy + 1e-4), rtol=1e-6, atol=0, equal_nan=True)


def test_gelu_is_that_in_double():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-20, -1e-6, 1e4, -1e4])])
    truth = F.gelu(x.double())
    assert ((cpu_kernels.gelu_(x.clone()) - truth).abs() <= 4e-7 * x.abs()).all()
    assert cpu_kernels.gelu_(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(2, 6, 24, 24), (3, 20, 3, 3), (2, 5, 17, 1), (2, 7, 19), (5, 30)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_normalised_input_is_that_in_double(shape, layout):
    x = normal(*shape, dtype=torch.float32)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    x[0], x[1, 1] = 0.0, float("nan")
    norm = (x.double().square().sum(1, keepdim=True) + 1e-4).sqrt()
    found = cpu_kernels.normalised(x, 1e-4, 2.0)
    assert_close(found.double(), 2 * x.double() / norm, rtol=1e-6, atol=0, equal_nan=True)
    given = cpu_kernels.normalised(x, 1e-4, 2.0, (2 / norm).float().contiguous())
    assert_close(given, found, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("groups", [1, 6])
def test_norms_of_every_size_of_number_are_those_in_double(groups):
    for size in (1e-30, 1e-4, 1.0, 1e4, 1e18):
        x = size * normal(2, 6, 9, 9, dtype=torch.float32)
        found = cpu_kernels.patch_inverse_norm(x, (3, 3), (1, 1), (1, 1), (1, 1), groups, 1e-4)
        grouped = x.double().unflatten(1, (groups, -1)).square().sum(2)
        truth = (9 * F.avg_pool2d(grouped, 3, 1, 1) + 1e-4).rsqrt()
        assert ((found.double() - truth).abs() / truth).max() < 5e-7
    beyond = cpu_kernels.patch_inverse_norm(torch.full_like(x, 1e30), (3, 3), (1, 1), (1, 1), (1, 1), groups, 1e-4)
    assert torch.equal(beyond, torch.zeros_like(beyond))


@pytest.mark.parametrize("layout", [(3, 40, 9, 9), (3, 40, 3, 3), (200, 300)], ids=str)
@pytest.mark.parametrize("size", [0.02, 0.2, 3.0], ids=["near the equator", "mixed", "beyond the poles"])
@pytest.mark.parametrize("k", [None, 0.02, 0.3, 20.0])
def test_runs_of_small_and_of_large_cosines_get_the_same_response(k, size, layout):
    cosine = size * normal(*layout, dtype=torch.float32)
    cosine.view(-1)[17] = float("nan")
    operator = "linear" if k is None else "sigmoid"
    inverse = torch.ones(layout[0], 1, *layout[2:])
    values = dict(gain=torch.full(layout[1:2], 2.0), bias=torch.ones(layout[1]), **cpu_kernels.constants(operator, k))
    found = cosine.clone()
    cpu_kernels.normalise_and_respond_(found, inverse, operator, values)
    angle = torch.asin(cosine.double().clamp(-1, 1))
    truth = angle * 2 / torch.pi if k is None else torch.tanh(angle / (2 * k)) / math.tanh(math.pi / (4 * k))
    error = (found.double() - (2 * truth + 1)).abs()
    assert found.isnan().sum() == 1
    # 1 - eps stands for a pole, where asin has an infinite slope
    assert error[~error.isnan()].max() < (3e-6 if size < 1 else 1.5e-3 * (1 if k is None else 1 / min(2 * k, 1)))


def test_the_functions_of_one_number_are_right_over_their_whole_range():
    """asin and tanh forward, and their inverses backward, to a few units in the last place."""
    cosine = torch.linspace(-1, 1, 4001)[1:-1]  # at the ends, where asin has no slope, the kernels stop short of 1
    inverse = torch.ones(3999, 1)
    for k in (None, 0.05, 0.3, 5.0, 100.0):
        operator = "linear" if k is None else "sigmoid"
        out = cosine[:, None].clone()
        cpu_kernels.normalise_and_respond_(out, inverse, operator, cpu_kernels.constants(operator, k))
        truth = torch.asin(cosine.double()) * (2 / torch.pi)
        if k is not None:
            truth = torch.tanh(torch.asin(cosine.double()) / (2 * k)) / torch.tanh(
                torch.tensor(torch.pi / (4 * k)).double()
            )
        assert (out[:, 0].double() - truth).abs().max() < 4e-7
        inner = cosine.abs() < 0.95
        values = cpu_kernels.constants(operator, k)
        product, _, _ = cpu_kernels.respond_backward(torch.ones(3999, 1), out, inverse, operator, values)
        leaf = cosine.double().requires_grad_()
        answer = torch.asin(leaf) * (2 / torch.pi)
        if k is not None:
            answer = torch.tanh(torch.asin(leaf) / (2 * k)) / torch.tanh(torch.tensor(torch.pi / (4 * k)).double())
        (slope,) = torch.autograd.grad(answer.sum(), leaf)
        seen = inner & (slope > 1e-3 * slope.max())  # where the step has rounded to +-1 no slope is left
        assert ((product[:, 0].double() - slope).abs()[seen] / slope[seen]).max() < 2e-4


def without_kernels(**environment: str) -> str:
    """The state and a result in a process of its own."""
    code = (
        "import torch; from spherify.functional import cpu_binding, cpu_kernels, sphere_conv2d; torch.manual_seed(0);"
        "x = torch.randn(1, 2, 4, 4); w = torch.randn(3, 2, 3, 3);"
        "print(cpu_binding.state(), '|', round(float(sphere_conv2d(x, w).sum()), 4))"
    )
    merged = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=merged, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_without_a_compiler_or_with_the_switch_plain_operations_stand_in(tmp_path):
    state, value = without_kernels().split(" | ")
    assert state.startswith("compiled (")
    off = without_kernels(SPHERIFY_CPU_KERNELS="0")
    assert off == f"not in use (SPHERIFY_CPU_KERNELS is 0): plain operations stand in | {value}"
    none = without_kernels(PATH="", CC="", XDG_CACHE_HOME=str(tmp_path))
    reason = "no C compiler (cc, gcc, clang) is on the path"
    assert none == f"not in use ({reason}): plain operations stand in | {value}"
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    failed = without_kernels(CC=str(broken), XDG_CACHE_HOME=str(tmp_path))
    assert failed == f"not in use ({broken} failed: no such flag): plain operations stand in | {value}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is of x86")
def test_a_processor_without_avx_512_has_the_same_answer(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nexec cc "$@" -mno-avx512f\n')
    compiler.chmod(0o755)
    here, there = without_kernels(), without_kernels(CC=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert there == here
    assert there.startswith("compiled")


def test_the_library_is_compiled_once_under_its_final_name_and_for_its_owner_alone(tmp_path):
    assert without_kernels(XDG_CACHE_HOME=str(tmp_path)).startswith("compiled")
    folder = tmp_path / "spherify"
    (made,) = folder.iterdir()
    assert made.name.startswith("cpu_kernels-")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    time = made.stat().st_mtime_ns
    assert without_kernels(XDG_CACHE_HOME=str(tmp_path)).startswith("compiled")
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [time]


@pytest.mark.parametrize(
    ("refused", "named"),
    [
        ("nothing", ("-march=native -fopenmp", "-march=native", "-mcpu=native")),
        ("-fopenmp", ("-march=native", "-mcpu=native")),
        ("-fopenmp|-m*=native", ("no options for this processor",)),
    ],
)
def test_a_library_knows_the_options_that_the_compiler_took(refused, named, tmp_path, monkeypatch):
    compiler, source = tmp_path / "cc", tmp_path / "small.c"
    compiler.write_text(f'#!/bin/sh\nfor given; do case "$given" in {refused}) exit 1;; esac; done\nexec cc "$@"\n')
    compiler.chmod(0o755)
    source.write_text("const char *const built_with = BUILT_WITH;\n")
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in ("compiled", "from the cache"):
        assert c_library.options_of(c_library.compiled(source)) in named
    assert f"compiled ({c_library.options_of(cpu_binding.library())})" == cpu_binding.state()


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "spherify").write_text("a file stands where the folder should")
    assert without_kernels(XDG_CACHE_HOME=str(tmp_path)).startswith("compiled")


def test_the_key_knows_the_processor():
    assert c_library.processor()


def test_plain_operations_have_the_same_answer():
    x, weight = normal(2, 3, 8, 8, dtype=torch.float32), normal(5, 3, 3, 3, seed=1, dtype=torch.float32)
    window = dict(stride=1, padding=1, dilation=1, groups=1, padding_mode="zeros")
    for name in OPERATORS:
        options = options_of(name, 5, torch.float32)
        plain = plain_sphere(x, weight, None, options["operator"], options.get("k"), 1e-4, None, window)
        assert_close(sphere_conv2d(x, weight, padding=1, **options), plain, rtol=1e-5, atol=1e-6)


def test_the_sources_compile_with_the_first_options_that_the_compiler_knows(tmp_path):
    """A mistake under OpenMP alone would pass for a compiler without it, and cost threads and vectors in silence."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    empty = tmp_path / "empty.c"
    empty.write_text("int nothing;\n")
    source = Path(cpu_binding.__file__).with_name("cpu_kernels.c")

    def fails(file, options):
        command = [compiler, *c_library.FLAGS, *options, "-fsyntax-only", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    known = next(options for options in c_library.EXTRAS if not fails(empty, options))
    assert fails(source, known) == ""
