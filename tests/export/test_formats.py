"""Exported files: what they compute, what they hold, and that the same model gives the same bytes."""

import io
import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from spherify import FileError, ModelError, OptionError, SpherifyError, fold, save, spherify
from spherify.export import formats
from spherify.export.formats import export
from spherify.graph.record import tensors_in

ANY_WARNING = pytest.mark.filterwarnings("ignore")  # the exporters' own
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def small(operator: str = "sigmoid") -> nn.Module:
    torch.manual_seed(0)
    return spherify(Small(), operator=operator, example_input=X).eval()


def run_onnx(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})


def onnx_difference(model: nn.Module, path, x: torch.Tensor) -> float:
    with torch.no_grad():
        truth = list(tensors_in(model.eval()(x)))
    return max(
        float((torch.from_numpy(one) - other).abs().max()) for one, other in zip(run_onnx(path, x), truth, strict=True)
    )


@ANY_WARNING
@pytest.mark.parametrize("folded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["as it is", "folded"])
def test_onnx_computes_the_same_for_any_batch_with_standard_operators_alone(tmp_path, folded):
    model = small()
    path = export(model, tmp_path / "model.onnx", example_input=X, folded=folded)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))
        assert onnx_difference(model, path, x) < 1e-5
    proto = onnx.load(path)
    assert {opset.domain: opset.version for opset in proto.opset_import} == {"": formats.OPSET}
    assert {node.domain for node in proto.graph.node} == {""}


@ANY_WARNING
@pytest.mark.parametrize("operator", ["learnable"])
def test_a_program_computes_the_same_for_any_batch(tmp_path, operator):
    model = small(operator)
    path = export(model, tmp_path / "model.pt2", format="pt2", example_input=X)
    program = torch.export.load(str(path)).module()
    x = torch.randn(5, 3, 12, 12)
    assert_close(program(x)[0], model(x))


def test_the_example_input_in_a_program_is_zeros_that_need_no_pickle(tmp_path):
    path = export(small(), tmp_path / "model.pt2", format="pt2", example_input=X)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("sample_inputs/model.pt"))
        args, _ = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    assert_close(args[0], torch.zeros_like(X))


def test_safetensors_hold_the_weights_folded_or_not(tmp_path):
    model = small()
    tensors = safetensors.torch.load_file(export(model, tmp_path / "m.safetensors", format="safetensors"))
    assert tensors.keys() == model.state_dict().keys()
    path = export(model, tmp_path / "f.safetensors", format="safetensors", folded=True, example_input=X)
    tensors = safetensors.torch.load_file(path)
    assert tensors.keys() == fold(model, example_input=X).state_dict().keys()
    assert not [name for name in tensors if "running" in name]


def test_tied_weights_are_written_once_and_named(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    path = export(model, tmp_path / "m.safetensors", format="safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ties"]) == {"1.weight": "0.weight"}
        assert "1.weight" not in file.keys()  # noqa: SIM118 - no dict


SCRIPT = """
import sys; from pathlib import Path; sys.path[:0] = {path!r}
import warnings; warnings.simplefilter("ignore")
from test_formats import X, small; from spherify.export.formats import export
for form in ("onnx", "pt2", "safetensors"):
    for folded in (False, True):
        path = Path({folder!r}) / f"{{folded}}.{{form}}"
        export(small(), path, format=form, folded=folded, example_input=X)
"""


@ANY_WARNING
@pytest.mark.parametrize("folded", [False, True], ids=["as it is", "folded"])
@pytest.mark.parametrize("form", [pytest.param("onnx", marks=pytest.mark.slow), "pt2", "safetensors"])
def test_the_same_model_gives_the_same_bytes_and_no_trace_of_this_machine(tmp_path, form, folded):
    call = dict(format=form, folded=folded, example_input=X)
    one = export(small(), tmp_path / f"one.{form}", **call).read_bytes()
    other = export(small(), tmp_path / "elsewhere" / f"other.{form}", **call).read_bytes()
    assert one == other
    for trace in (str(tmp_path), sys.prefix, "site-packages", "Traceback", 'File \\"'):
        assert trace.encode() not in one


@ANY_WARNING
@pytest.mark.slow
@pytest.mark.parametrize("operator", ["cosine", "sigmoid"])
def test_a_folded_program_is_compiled_ahead_of_time_by_aotinductor(tmp_path, operator):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    model = small(operator)
    path = export(model, tmp_path / "model.pt2", format="pt2", folded=True, example_input=X)
    program = torch.export.load(str(path))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            assert_close(compiled(x)[0], model(x), rtol=1e-5, atol=1e-5)


@ANY_WARNING
@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        script = SCRIPT.format(path=sys.path, folder=str(folder))
        subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=300)
    for name in [f"{folded}.{form}" for form in ("onnx", "pt2", "safetensors") for folded in (False, True)]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize("operator", ["cosine", "learnable"])
def test_two_conversions_with_one_seed_save_the_same_weights(tmp_path, operator):
    for name in ("one", "other"):
        torch.manual_seed(0)
        save(spherify("test_resnet", operator=operator), tmp_path / name)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_a_mode_is_as_before(tmp_path):
    model = small().train()
    model.body[1].eval()
    export(model, tmp_path / "m.pt2", format="pt2", example_input=X)
    assert model.training
    assert model.head.training
    assert not model.body[1].training


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.one(x) if x.sum() > 0 else self.one(-x)


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path):
    model = spherify(Raises(), example_input=X)
    with pytest.raises(ModelError, match=r"Raises cannot be exported by torch\.export \("):
        export(model, tmp_path / "m.pt2", format="pt2", example_input=X)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_one_onnx_file_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ONNX_LIMIT", 1000)
    with pytest.raises(
        ModelError, match=r"Small has 0\.0 GB of weights, and one ONNX file holds 2 GB; use the format pt2"
    ):
        export(small(), tmp_path / "m.onnx", example_input=X)


def test_wrong_calls_are_refused(tmp_path):
    with pytest.raises(OptionError, match="format 'caffe' is unknown; choose one of: onnx, pt2, safetensors"):
        export(small(), tmp_path / "m", format="caffe")
    with pytest.raises(ModelError, match="holds something else than tensors"):
        export(small(), tmp_path / "m.onnx", example_input={"x": X})
    with pytest.raises(ModelError, match="no input could be guessed"):
        export(nn.Sequential(nn.Identity()), tmp_path / "m.pt2", format="pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="could not be written"):
        export(small(), tmp_path / "file" / "m.safetensors", format="safetensors")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        SpherifyError, match=r"ONNX needs onnxscript; install it with: pip install 'spherify\[export\]'"
    ):
        export(small(), tmp_path / "m.onnx", example_input=X)


class Backbone(nn.Module):
    """The feature pyramid of a detector."""

    def __init__(self) -> None:
        super().__init__()
        self.fpn = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )

    def forward(self, x):
        return self.fpn(x)


ARCHITECTURES = {
    "resnet18": (lambda: timm.create_model("resnet18"), 64),
    "resnet50": (lambda: timm.create_model("resnet50"), 64),
    "resnext50": (lambda: timm.create_model("resnext50_32x4d"), 64),
    "densenet121": (lambda: timm.create_model("densenet121"), 64),
    "mobilenetv2": (lambda: timm.create_model("mobilenetv2_100"), 64),
    "efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), 64),
    "convnext_atto": (lambda: timm.create_model("convnext_atto"), 64),
    "regnety_002": (lambda: timm.create_model("regnety_002"), 64),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), 64),
    "fpn backbone": (Backbone, 64),
}


@ANY_WARNING
@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True], ids=["as it is", "folded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ten_architectures_in_onnxruntime(tmp_path, name, folded):
    """Relative to the largest number of each output; float64 says how far float32 itself is from the truth."""
    torch.manual_seed(0)
    build, size = ARCHITECTURES[name]
    x = torch.randn(2, 3, size, size)
    model = spherify(build(), operator="linear", example_input=x)
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):  # some are initialised to 0, and take their branch out
            nn.init.uniform_(part.weight, 0.5, 1.5)
    with torch.no_grad():
        model(torch.randn(8, 3, size, size))
    path = export(model.eval(), tmp_path / "model.onnx", example_input=x, folded=folded)
    x = torch.randn(3, 3, size, size)
    found = [torch.from_numpy(output) for output in run_onnx(path, x)]
    with torch.no_grad():
        ours, truth = list(tensors_in(model(x))), list(tensors_in(model.double()(x.double())))
    from_ours, from_truth = distance(found, ours), distance(found, truth)
    print(f"{name} {'folded' if folded else 'as it is'}: from torch {from_ours:.1e}, from float64 {from_truth:.1e}")
    assert from_ours < max(1e-4, 4 * distance(ours, truth))


def distance(outputs, truth) -> float:
    return max(
        float((output.double() - true).abs().max() / true.abs().max())
        for output, true in zip(outputs, truth, strict=True)
    )


@ANY_WARNING
@pytest.mark.parametrize(
    ("form", "name"),
    [pytest.param("pt2", "model.pt2", marks=pytest.mark.slow), ("safetensors", "exported.safetensors")],
)
def test_the_command_exports_a_folder(tmp_path, monkeypatch, capsys, form, name):
    from spherify.cli import app

    save(spherify("test_resnet"), tmp_path / "folder")
    monkeypatch.setattr(sys, "argv", ["spherify", "export", str(tmp_path / "folder"), "--format", form, "--fold"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    printed = capsys.readouterr()
    assert (ended.value.code or 0) == 0, printed.err
    assert "folded" in printed.out
    assert (tmp_path / "folder" / name).stat().st_size > 1000
