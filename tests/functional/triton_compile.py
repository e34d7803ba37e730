"""Compiles the Triton kernels for GPUs that are not there, as the wrappers launch them; run by test_triton.py.

Nothing is launched, so that nothing is said of the numbers: triton_checks.py has those from the interpreter.
"""

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton_checks import LAYERS, OPERATORS, by_kernels, tensor

from spherify.functional import eager, fused

CAPABILITIES = {"A100": 80, "H200": 90}
EVEN = {  # sizes that a compiler can make use of
    "even 3x3": ((2, 64, 16, 16), (128, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "even 1x1": ((4, 256, 16, 16), (64, 256, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "even depthwise": ((2, 96, 16, 16), (96, 1, 7, 7), (1, 1), (3, 3), (1, 1), 96),
    "even linear": ((256, 384), (1536, 384), (), (), (), 1),
}
LAYERS = {**LAYERS, **EVEN}
compiled = []


class NoDriver:
    """What compiling asks a driver for."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def only_compile(kernel, grid):
    def launch(*arguments, **constants):
        compiled.append((kernel.fn.__name__, kernel.warmup(*arguments, grid=grid, **constants)))

    return launch


def step(name, operator, layout, dtype):
    """Forward and backward of a layer, with no number computed."""
    shape, rows, stride, padding, dilation, groups = LAYERS[name]
    layout = layout if len(shape) == 4 else "contiguous"
    x, weight = (tensor(*sizes, seed=1, dtype=dtype, layout=layout).requires_grad_() for sizes in (shape, rows))
    bias, gain, k = (torch.ones(rows[0], requires_grad=True) for _ in range(3))
    numbers = (list(stride), list(padding), list(dilation), groups, operator, 0.0 if operator == "learnable" else 0.3)
    out = eager.SphereProduct.apply(
        x, weight, bias, gain, k if operator == "learnable" else None, *numbers, 1e-6, dtype
    )
    out.float().sum().backward()


def resources(kernel):
    """Registers of a thread and bytes that are spilled, where the tool that tells is there."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if path is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", told).group(1)) for word in ("REG", "LOCAL"))


def main(arguments):
    names = (
        list(EVEN)
        if "--even" in arguments
        else list(LAYERS)
        if "--all" in arguments
        else ["even 3x3", "depthwise", "linear"]
    )
    operators = list(OPERATORS) if "--all" in arguments else ["cosine", "learnable"]
    layouts = ("contiguous", "channels_last") if "--all" in arguments else ("channels_last",)
    types = (torch.float32, torch.bfloat16, torch.float16) if "--all" in arguments else (torch.bfloat16,)
    JITFunction.__getitem__ = only_compile
    eager.cpu_training.forward = lambda *given, **named: None
    fused.is_safe_divisor = lambda gain: False
    spilled = []
    for capability in CAPABILITIES.values() if "--all" in arguments else (90,):
        triton.runtime.driver.set_active(NoDriver(capability))
        for choice in itertools.product(names, operators, layouts, types):
            compiled.clear()
            by_kernels(step, *choice)
            for name, kernel in compiled:
                used = resources(kernel)
                loads = sorted(set(re.findall(r"ld\.global[.\w]*", kernel.asm["ptx"])))
                if "--verbose" in arguments:
                    print(capability, *choice, name, used, *loads)
                if used is not None and used[1]:
                    spilled.append(f"{name} for {choice} spills {used[1]} bytes of each thread")
    print("\n".join(spilled))
    return bool(spilled)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
