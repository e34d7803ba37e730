"""What a folded model says about itself, and what the commands print of it."""

import json
import sys

import pytest
import torch
from torch import nn

from spherify import fold, save, spherify
from spherify.export.fold import fold_any
from spherify.export.fold_report import FoldReport, fold_report
from spherify.layers import SphereConv2d

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Two layers share an input; one norm has two readers; one is behind a layer that stays plain."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm_one, self.norm_two, self.norm_three = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = nn.ReLU()

    def forward(self, x):
        two = self.two(x)
        return self.norm_three(self.three(self.act(self.norm_one(self.one(x))) + self.norm_two(two) + two))


def test_a_report_counts_what_was_folded_and_names_what_was_not():
    model = spherify(Network(), exclude=["three"], example_input=X)
    report = fold_report(fold(model, example_input=X))
    assert report == FoldReport(
        layers=2,
        norms=1,
        norms_of_plain_layers=1,
        activations=1,
        shared=(("two", "one"),),  # in the order in which they run
        left_unfolded=(),
        norms_left=("norm_two",),
    )
    assert str(report) == (
        "Folded: 2 layers, 1 BatchNorm into them and 1 into plain layers, 1 activation.\n"
        "2 layers share the patch norms of 1 tensor.\n"
        "BatchNorms left, not alone behind one layer: norm_two."
    )
    assert json.loads(json.dumps(report.to_dict()))["norms_left"] == ["norm_two"]


def test_a_plain_network_reports_its_norms():
    report = fold_report(fold_any(Network(), example_input=X))
    assert (report.layers, report.norms, report.norms_of_plain_layers, report.shared) == (0, 0, 2, ())


class MyConv2d(SphereConv2d):
    """Of a class that has no folded form."""


def test_a_layer_whose_class_has_no_folded_form_is_named_and_runs_as_it_is():
    torch.manual_seed(0)
    model = spherify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), example_input=X).eval()
    model[0].__class__ = MyConv2d
    folded = fold(model, example_input=X)
    report = fold_report(folded)
    assert report.left_unfolded == (("0", "MyConv2d"),)
    assert "Left unfolded, since their class has no folded form: 0 (MyConv2d)." in str(report)
    assert report.to_dict()["left_unfolded"] == [{"name": "0", "type": "MyConv2d"}]
    torch.testing.assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_long_list_is_cut_in_words_and_whole_as_data():
    names = tuple(f"norm{index}" for index in range(9))
    report = FoldReport(1, 0, 0, 0, (), (), names)
    assert str(report).endswith("norm0, norm1, norm2, norm3, norm4 and 4 more.")
    assert report.to_dict()["norms_left"] == list(names)


@pytest.fixture
def printed_by(monkeypatch, capsys):
    from spherify.cli import app

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["spherify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            app.main()
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == 0, printed.err
        return printed.out

    return call


def test_the_export_command_says_what_was_folded(tmp_path, printed_by):
    folder = save(spherify("test_resnet"), tmp_path / "model")
    out = " ".join(printed_by("export", folder, "--format", "safetensors", "--fold").split())
    assert "Folded: 15 layers, 15 BatchNorms into them and 0 into plain layers, 8 activations." in out
    found = json.loads(printed_by("export", folder, "--format", "safetensors", "--fold", "--json"))
    assert found["file"] == str(folder / "exported.safetensors")
    assert found["bytes"] == (folder / "exported.safetensors").stat().st_size
    assert found["format"] == "safetensors"
    assert found["folded"] == fold_report(fold(spherify("test_resnet"))).to_dict()
    plain = json.loads(printed_by("export", folder, "--format", "safetensors", "--json"))
    assert plain["folded"] is None


def test_a_folder_that_is_folded_already_is_reported_too(tmp_path, printed_by):
    folder = save(fold(spherify("test_resnet")), tmp_path / "model")
    found = json.loads(printed_by("export", folder, "--format", "safetensors", "--fold", "--json"))
    assert found["folded"]["layers"] == 15


def test_the_bench_command_says_what_was_folded(printed_by):
    arguments = ("bench", "test_resnet", "--batch", 2, "--size", 32, "--repeats", 1, "--threads", 1)
    assert "Folded: 15 layers" in printed_by(*arguments)
    found = json.loads(printed_by(*arguments, "--json"))
    assert found["folded"] == fold_report(fold(spherify("test_resnet"))).to_dict()
