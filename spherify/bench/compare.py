"""A model's plain, converted and folded forms side by side: time, memory, images a second, ratios."""

from __future__ import annotations

import contextlib
import copy
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spherify.bench.memory import peak_bytes
from spherify.bench.timing import Timing, interleaved
from spherify.convert import plan
from spherify.errors import ModelError, OptionError
from spherify.export.fold import fold, fold_any
from spherify.export.fold_report import FoldReport, fold_report
from spherify.functional import cpu_binding
from spherify.graph.record import one_line, tensors_in
from spherify.models.inputs import candidate_inputs
from spherify.models.resolve import build, resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PHASES = ("train", "infer")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        batch, size: images in a batch, and their side in pixels; None takes the model's own size.
        dtype: float32, or bfloat16 and float16 by autocast.
        threads: of torch on the CPU; None leaves its choice.
        calls: steps within one measurement.
        cpu_time: count the process's own work on the CPU instead of the time that passes, for a busy machine.
    """

    batch: int = 8
    size: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False
    compiled: bool = False
    repeats: int = 11
    warmup: int = 2
    calls: int = 1
    threads: int | None = None
    cpu_time: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype {self.dtype!r} is unknown; choose one of: {', '.join(DTYPES)}.")
        if self.device not in ("cpu", "cuda"):
            raise OptionError(f"device {self.device!r} is unknown; choose one of: cpu, cuda.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise OptionError("device 'cuda': torch sees no GPU here; use cpu.")
        for name in ("batch", "repeats", "calls"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: give a number from 1 on.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form in one phase.

    Attributes:
        timing: of one step: forward and backward in train, forward in infer.
        bytes: at the step's peak, above what was held before it.
        ratio: median over the rounds of the time relative to the baseline's; 1 for the baseline.
        ratio_of_least: the same of the two least times.
        memory_ratio: of the bytes.
        folded: what was folded and what was not, of a folded form.
    """

    phase: str
    form: str
    timing: Timing
    bytes: int
    images_per_second: float
    ratio: float
    ratio_of_least: float
    memory_ratio: float
    folded: FoldReport | None = None

    def to_dict(self) -> dict[str, Any]:
        low, high = self.timing.spread
        return {
            "phase": self.phase,
            "form": self.form,
            "median_ms": self.timing.median * 1e3,
            "least_ms": self.timing.least * 1e3,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "repeats": len(self.timing.seconds),
            "peak_mb": self.bytes / 1e6,
            "images_per_second": self.images_per_second,
            "ratio": self.ratio,
            "ratio_of_least": self.ratio_of_least,
            "memory_ratio": self.memory_ratio,
        }


def compare(model: str | nn.Module, settings: Settings, **options: Any) -> list[Row]:
    """Rows for plain and converted in training, and plain, converted, plain folded and folded at inference.

    Args:
        model: a name or a plain network.
        options: of ``spherify.plan``.

    Raises:
        SpherifyError: as ``spherify``, or the model does not run at this size.
    """
    plain = build(resolve(model)) if isinstance(model, str) else model
    converted = plan(plain, **options).apply()
    return compare_forms(plain, {"converted": converted}, settings)


def compare_forms(
    plain: nn.Module, others: Mapping[str, nn.Module], settings: Settings, phases: tuple[str, ...] = PHASES
) -> list[Row]:
    """As ``compare``, for any number of forms that are converted already or are rivals."""
    x = images_for(plain, settings)
    with number_of_threads(settings.threads):
        rows = []
        if "train" in phases:
            rows += measure("train", {"plain": plain, **others}, x, settings)
        if "infer" in phases:
            forms = {"plain": plain, **others, "plain folded": fold_any(plain, example_input=x)}
            for name, model in others.items():
                with contextlib.suppress(ModelError):  # a rival that has nothing to fold
                    forms[f"{name} folded"] = fold(model, example_input=x)
            rows += measure("infer", forms, x, settings)
    return rows


@contextlib.contextmanager
def number_of_threads(number: int | None) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def images_for(model: nn.Module, settings: Settings) -> Tensor:
    """A batch of random images of the size asked for, or of the first that the model runs on."""
    generator = torch.Generator().manual_seed(0)
    failure: Exception | None = None
    for args in candidate_inputs(model):
        if len(args) != 1 or not isinstance(args[0], Tensor):
            continue
        shape = list(args[0].shape)
        shape[0] = settings.batch
        if settings.size is not None and len(shape) == 4:
            shape[2:] = [settings.size] * 2
        x = torch.randn(shape, generator=generator)
        was_training = model.training
        try:
            with torch.no_grad():
                model.eval()(x[:1])
        except Exception as error:  # the model's own code, which may raise anything
            failure = failure or error
        else:
            return x
        finally:
            model.train(was_training)
    reason = one_line(failure) if failure else "no single tensor can be guessed as its input"
    raise ModelError(f"{type(model).__name__} cannot be measured ({reason}); try another --size.")


def measure(phase: str, forms: Mapping[str, nn.Module], x: Tensor, settings: Settings) -> list[Row]:
    steps = {name: step_of(phase, model, x, settings) for name, model in forms.items()}
    with compiled_each_for_itself(len(forms)) if settings.compiled else contextlib.nullcontext():
        peaks = {name: peak_bytes(step, device=settings.device) for name, step in steps.items()}
        timings = interleaved(
            steps,
            repeats=settings.repeats,
            warmup=settings.warmup,
            device=settings.device,
            calls=settings.calls,
            clock=time.process_time if settings.cpu_time else time.perf_counter,
        )
    rows = []
    for name, timing in timings.items():
        base = "plain folded" if name.endswith("folded") else "plain"
        rows.append(
            Row(
                phase=phase,
                form=name,
                timing=timing,
                bytes=peaks[name],
                images_per_second=len(x) / timing.median,
                ratio=timing.ratio_to(timings[base]),
                ratio_of_least=timing.ratio_of_least(timings[base]),
                memory_ratio=peaks[name] / peaks[base],
                folded=fold_report(forms[name]) if name.endswith("folded") else None,
            )
        )
    return rows


@contextlib.contextmanager
def compiled_each_for_itself(forms: int) -> Iterator[None]:
    """Let ``torch.compile`` forget what it compiled before, and keep as many forms as are to be measured.

    All networks of one class share a forward function. Of it torch compiles eight forms and runs the next ones eagerly,
    and sizes that have changed since the first it takes for variable.
    """
    torch.compiler.reset()
    with torch._dynamo.config.patch(cache_size_limit=max(8, 2 * forms)):
        yield


def step_of(phase: str, model: nn.Module, x: Tensor, settings: Settings) -> Callable[[], object]:
    """One training step (forward, backward) or one inference, of a copy in the mode and place asked for."""
    own = copy.deepcopy(model).to(settings.device)
    if phase == "train":
        own.train()
    else:
        own.eval()
    if settings.channels_last:
        own, x = own.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    x = x.to(settings.device)
    run = torch.compile(own) if settings.compiled else own
    dtype = DTYPES[settings.dtype]
    is_half = dtype != torch.float32

    def train() -> None:
        own.zero_grad(set_to_none=True)
        with torch.autocast(settings.device, dtype, enabled=is_half):
            outputs = [out for out in tensors_in(run(x)) if out.is_floating_point()]
        loss = sum((out.float().square().mean() for out in outputs), start=x.new_zeros(()))
        loss.backward()

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(settings.device, dtype, enabled=is_half):
            run(x)

    return train if phase == "train" else infer


def machine() -> dict[str, Any]:
    """What the figures belong to: processor, threads, GPU, versions."""
    return {
        "processor": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": cpu_binding.state(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
