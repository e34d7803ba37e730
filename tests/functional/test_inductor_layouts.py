"""What Inductor makes of compiled layers on the CPU: maps stay channels-last, and nothing is transposed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spherify.functional import cpu_binding

pytestmark = pytest.mark.skipif(
    cpu_binding.library() is None or not hasattr(torch.compiler, "is_exporting"),
    reason="no C compiler, or torch cannot tell that it exports",
)

DEPTHWISE = """
import torch, torch.nn.functional as F
from spherify.functional import cpu_depthwise, sphere_conv2d
calls, respond_backward = [], cpu_depthwise.respond_backward
def counted(*args):
    calls.append(args[0].is_contiguous(memory_format=torch.channels_last))
    return respond_backward(*args)
cpu_depthwise.respond_backward = counted
def run(x, before, weight, after):
    return F.conv2d(sphere_conv2d(F.conv2d(x, before), weight, groups=32, padding=1).relu(), after)
shapes = [(2, 8, 6, 6), (32, 8, 1, 1), (32, 1, 3, 3), (8, 32, 1, 1)]
leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
torch.compile(run)(*leaves).square().sum().backward()
assert calls == [True], calls
"""

PLANES = """
import torch, torch.nn.functional as F
from spherify.functional import cpu_depthwise, cpu_pointwise, sphere_conv2d
calls = []
def counted(module, name, place):
    call = getattr(module, name)
    def look(*args):
        calls.append(args[place].is_contiguous(memory_format=torch.channels_last))
        return call(*args)
    setattr(module, name, look)
counted(cpu_depthwise, "respond", 0)
counted(cpu_depthwise, "respond_backward", 0)
counted(cpu_pointwise, "described", 0)
from_planes = cpu_pointwise.in_rows
copied = []
def in_rows(x):
    found = from_planes(x)
    copied.append(found is not x)
    return found
cpu_pointwise.in_rows = in_rows
def run(x, depthwise, halving, after):
    y = sphere_conv2d(x.sin(), depthwise, groups=8, padding=1).relu()
    return sphere_conv2d(sphere_conv2d(y, halving, stride=2).relu(), after)
shapes = [(2, 8, 6, 6), (8, 1, 3, 3), (32, 8, 1, 1), (8, 32, 1, 1)]
leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
torch.compile(run)(*leaves).square().sum().backward()
assert len(calls) == 6 and all(calls), calls
assert copied and not any(copied), copied
"""

BEHIND = """
import torch, torch.nn.functional as F
from spherify.functional import graph_operators, sphere_conv2d
from_planes, copied = graph_operators.as_images, []
def as_images(x):
    found = from_planes(x)
    copied.append(found is not x)
    return found
graph_operators.as_images = as_images
def run(x, stem, depthwise):
    y = sphere_conv2d(x, stem, operator="linear", padding=1)
    y = F.batch_norm(y, None, None, training=True).clamp(0, 6)
    return F.batch_norm(sphere_conv2d(y, depthwise, operator="linear", groups=32, padding=1), None, None, training=True)
leaves = [torch.randn(shape, requires_grad=True) for shape in [(2, 3, 6, 6), (32, 3, 3, 3), (32, 1, 3, 3)]]
torch.compile(run)(*leaves).square().sum().backward()
assert len(copied) == 4 and not any(copied), copied
"""

LINEAR = """
import torch, torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from spherify.functional import sphere_linear
def run(x, before, weight, gain, bias, after):
    rows = F.conv2d(x, before).permute(0, 2, 3, 1)
    return F.conv2d(F.gelu(sphere_linear(rows, weight, bias, gain=gain)).permute(0, 3, 1, 2), after)
shapes = [(2, 8, 6, 6), (32, 8, 3, 3), (64, 32), (64,), (64,), (8, 64, 3, 3)]
leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
_, codes = run_and_get_code(lambda: torch.compile(run)(*leaves))
assert codes and not any("transpose_mxn(" in code or "tmpbuf" in code for code in codes)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [DEPTHWISE, PLANES, BEHIND, LINEAR], ids=["depthwise", "planes", "behind", "linear"]
)
def test_compiled_layers_keep_their_layout(program, tmp_path):
    """In a process of its own: an operator that Inductor has met before is one that it knows."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
