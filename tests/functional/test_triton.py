"""The Triton kernels: by Triton's interpreter on the CPU, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spherify.functional import blocks, sphere_conv2d

pytest.importorskip("triton")


FEW_OR_ALL = pytest.mark.parametrize("which", ["--few", pytest.param("--all", marks=pytest.mark.slow)])


def run(script, which, **environment):
    command = [sys.executable, str(Path(__file__).with_name(script)), which]
    environment |= {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    limit = 300 if which == "--few" else 3000
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@FEW_OR_ALL
def test_the_kernels_compute_what_the_plain_blocks_do(which):
    run("triton_checks.py", which, TRITON_INTERPRET="1")


@FEW_OR_ALL
def test_the_kernels_compile_for_gpus_that_are_not_there(which):
    backend = pytest.importorskip("triton.backends.nvidia")
    if not (Path(backend.__file__).parent / "bin").is_dir():
        pytest.skip("this Triton comes without NVIDIA's assembler")
    run("triton_compile.py", which)


def test_the_cpu_asks_for_no_kernel():
    assert blocks.kernels_for(torch.ones(2, 3)) is None


def test_kernels_that_do_not_compile_are_said_and_left(monkeypatch):
    class Broken:
        @staticmethod
        def works():
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(blocks.importlib, "import_module", lambda name: Broken)
    blocks.triton_kernels.cache_clear()
    with pytest.warns(
        UserWarning, match="Triton kernels do not run here and plain operations stand in .*no such instr"
    ):
        assert blocks.triton_kernels() is None
    blocks.triton_kernels.cache_clear()


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("SPHERIFY_TRITON", "0")
    blocks.triton_kernels.cache_clear()
    assert blocks.triton_kernels() is None
    blocks.triton_kernels.cache_clear()


@pytest.mark.gpu
def test_the_kernels_on_a_gpu():
    from triton_checks import all_problems

    assert all_problems("cuda") == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", ["cosine", "linear"])
def test_the_operator_on_a_gpu_is_that_on_the_cpu(dtype, operator):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, 9, 9, generator=generator), torch.randn(16, 8, 3, 3, generator=generator)
    truth = sphere_conv2d(x, weight, padding=1, operator=operator)
    fast = sphere_conv2d(x.to("cuda", dtype), weight.to("cuda", dtype), padding=1, operator=operator)
    assert (fast.float().cpu() - truth).abs().max() < 2e-2
