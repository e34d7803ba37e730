"""Calibration on the command line: while converting, and of a saved folder."""

import json
import re
import sys

import numpy as np
import pytest
import timm
import torch

from spherify import load
from spherify.cli import app as cli
from spherify.layers.angular import AngularLayer


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 40, 40, 3), dtype=np.uint8)
    labels = np.arange(24) % 5
    np.savez("few.npz", train_images=images, train_labels=labels, test_images=images[:9], test_labels=labels[:9])

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["spherify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def test_converting_with_calibration_and_calibrating_the_folder_again(run):
    code, out, err = run("test_resnet", "--calibrate", "few.npz", "--calibration-images", "16", "--json")
    assert code == 0, err
    found = json.loads(out)["calibration"]
    assert found["method"] == "transplant"
    assert found["images"] == 16
    assert found["logits"]["error"] < found["logits"]["error_before"]
    assert set(found["accuracy"]) == {"donor", "swapped", "calibrated"}
    before = load("test_resnet-cosine").conv1[0].weight

    code, out, err = run("calibrate", "test_resnet-cosine", "--data", "few.npz", "--images", "16")
    assert (code, out) == (1, "")
    assert "the donor is needed" in err

    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), "donor.pth")
    how = ["--data", "few.npz", "--images", 16, "--checkpoint", "donor.pth"]
    code, out, err = run("calibrate", "test_resnet-cosine", *how)
    assert code == 0, err
    assert "transplant: 16 images" in out
    assert "16 images are few" in out
    assert not torch.equal(load("test_resnet-cosine").conv1[0].weight, before)

    code, out, err = run("calibrate", "test_resnet-cosine", *how, "--output-solves", -1)
    assert (code, out) == (2, "")
    assert "output_solves=-1 is negative" in err


def test_taking_back_what_costs_most_and_saving_it(run):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), "donor.pth")
    code, _, err = run("test_resnet", "--checkpoint", "donor.pth", "--include", "conv1*", "--output", "before")
    assert code == 0, err
    how = ["--data", "few.npz", "--images", 8, "--checkpoint", "donor.pth", "--method", "statistics"]
    code, out, err = run("calibrate", "before", *how, "--sensitivity", "--keep-worst", 1, "--output", "after")
    assert code == 0, err
    assert "converted alone" in out
    (kept,) = re.findall(r"Taken back to plain layers: (\S+)\.\n", out)
    assert kept in {"conv1.0", "conv1.3", "conv1.6"}
    angular = [name for name, module in load("after").named_modules() if isinstance(module, AngularLayer)]
    assert sorted([*angular, kept]) == ["conv1.0", "conv1.3", "conv1.6"]
    code, out, err = run("calibrate", "after", *how, "--keep-worst", 2, "--output", "never")
    assert (code, out) == (2, "")
    assert "2 layers are converted, choose 0 to 1" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", "magic"], "calibration method 'magic' is unknown"),
        (["--calibration-images", "3"], "got 3 images; give at least 8"),
        (["--output-solves", "-1"], "output_solves=-1 is negative"),
    ],
)
def test_wrong_calls(run, arguments, message):
    code, out, err = run("test_resnet", "--calibrate", "few.npz", *arguments)
    assert (code, out) == (2, "")
    assert message in err
