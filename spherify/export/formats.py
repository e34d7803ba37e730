"""``export``: a converted model as ONNX, as a ``torch.export`` program, or as weights alone."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from spherify.errors import FileError, ModelError, OptionError, SpherifyError
from spherify.export.atomic import replace_file
from spherify.export.fold import as_inputs, fold, in_type
from spherify.export.folder import tensors_to_write
from spherify.graph.record import Inputs, one_line, tensors_in
from spherify.models.inputs import candidate_inputs

OPSET = 18
BATCH_AXIS = "batch"
EXTENSIONS = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}
ONNX_LIMIT = 2**31 - 2**20  # bytes of weights: one ONNX file is a protobuf message, which ends at 2 GiB
FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip archive can hold


class Outputs(nn.Module):
    """The model with its outputs as a flat tuple, which every format can hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.model(*args)))


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    folded: bool = False,
    example_input: Any = None,
) -> Path:
    """Write a converted model as one file, in one step: it stands there whole or not at all.

    The same model gives the same bytes. The file holds weights and the graph: no paths, no stack traces, no pickle.

    Args:
        model: what ``spherify``, ``load`` or ``fold`` returned; it is exported in eval mode.
        format: ``onnx`` (opset 18, standard operators), ``pt2`` (``torch.export``), ``safetensors`` (weights alone).
        folded: fold a copy first.
        example_input: a tensor, or a tuple of tensors; its first dimension is the batch, which stays dynamic.
            Guessed where it is None.

    Returns:
        The file's path.

    Raises:
        OptionError: the format is unknown.
        ModelError: the model does not run on the example input, or torch cannot export it.
        SpherifyError: a package of the extra ``export`` is missing.
        FileError: the disk refused.
    """
    checked_format(format)
    path = Path(path)
    model = fold(model, example_input=example_input) if folded else model
    data = WRITERS[format](model, example_input)
    try:
        replace_file(path, data)
    except OSError as error:
        raise FileError(f"{path} could not be written ({error.strerror or error}).") from error
    return path


def checked_format(format: str) -> None:
    """Raises OptionError for a format that is not known."""
    if format not in WRITERS:
        raise OptionError(f"format {format!r} is unknown; choose one of: {', '.join(WRITERS)}.")


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and each back in its own afterwards."""
    was_training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in was_training:
            part.training = True


def inputs_for(model: nn.Module, example_input: Any) -> tuple[Tensor, ...]:
    """Tensors of batch 2 that the model runs on."""
    if example_input is not None:
        inputs = as_inputs(example_input)
        if inputs.kwargs or not all(isinstance(value, Tensor) for value in inputs.args):
            raise ModelError(
                "export: example_input holds something else than tensors; give a tensor or a tuple of them."
            )
        return inputs.args
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    failure: Exception | None = None
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    for args in (in_type(args, dtype) for args in candidate_inputs(model)):
        moved = tuple(value.to(device) for value in Inputs(args).on("cpu").args if isinstance(value, Tensor))
        if len(moved) != len(args):
            continue
        try:
            with torch.no_grad():
                model(*moved)
        except Exception as error:  # the model's own code, which may raise anything
            failure = failure or error
        else:
            return moved
    reason = f" ({one_line(failure)})" if failure else ""
    raise ModelError(
        f"{type(model).__name__}: no input could be guessed{reason}; pass example_input=... ."
    ) from failure


def as_onnx(model: nn.Module, example_input: Any) -> bytes:
    """The bytes of an ONNX file with a dynamic batch."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SpherifyError(f"ONNX needs {error.name}; install it with: pip install 'spherify[export]'.") from error
    size = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    if size > ONNX_LIMIT:
        raise ModelError(
            f"{type(model).__name__} has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2 GB; "
            "use the format pt2."
        )
    with in_eval_mode(model), quiet():
        inputs = inputs_for(model, example_input)
        shapes = tuple({0: torch.export.Dim(BATCH_AXIS)} for _ in inputs)
        try:
            program = torch.onnx.export(
                Outputs(model),
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(shapes,),
                input_names=[f"input_{index}" for index in range(len(inputs))],
                verbose=False,
            )
        except Exception as error:  # torch's own, of many kinds
            raise ModelError(f"{type(model).__name__} cannot be exported to ONNX ({one_line(error)}).") from error
    assert program is not None
    proto = program.model_proto
    strip(proto)
    onnx.checker.check_model(proto)
    return proto.SerializeToString(deterministic=True)


def strip(proto: Any) -> None:
    """Take out what tells where and how the file was made, which differs from machine to machine."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    proto.producer_name, proto.producer_version = "spherify", ""
    for graph in (proto.graph, *proto.functions):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for part in (*graph.node, *graph.value_info):
            part.doc_string = ""
            del part.metadata_props[:]
    for part in (*proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]


def as_program(model: nn.Module, example_input: Any) -> bytes:
    """The bytes of a ``torch.export`` archive with a dynamic batch."""
    with in_eval_mode(model), quiet():
        inputs = tuple(map(torch.zeros_like, inputs_for(model, example_input)))  # the file holds them, for compilers
        shapes = tuple({0: torch.export.Dim(BATCH_AXIS)} for _ in inputs)
        try:
            program = torch.export.export(Outputs(model), inputs, dynamic_shapes=(shapes,))
        except Exception as error:  # torch's own, of many kinds
            raise ModelError(
                f"{type(model).__name__} cannot be exported by torch.export ({one_line(error)})."
            ) from error
        for node in program.graph.nodes:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
                node.meta.pop(key, None)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    return with_fixed_dates(buffer.getvalue())


def with_fixed_dates(archive: bytes) -> bytes:
    """The same zip archive, its entries in the order of their names and without the time of writing."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for entry in sorted(old.namelist()):
            new.writestr(zipfile.ZipInfo(entry, FIXED_DATE), old.read(entry))
    return buffer.getvalue()


def as_weights(model: nn.Module, example_input: Any) -> bytes:
    """The bytes of a safetensors file: each tensor once; its metadata say which other names a tied one has."""
    tensors, ties = tensors_to_write(model)
    # One key, since safetensors keeps no order of several.
    metadata = {"ties": json.dumps(ties, sort_keys=True)} if ties else {"format": "pt"}
    return safetensors.torch.save(tensors, metadata=metadata)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's own warnings, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


WRITERS: dict[str, Callable[[nn.Module, Any], bytes]] = {"onnx": as_onnx, "pt2": as_program, "safetensors": as_weights}
