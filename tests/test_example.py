"""examples/convert_resnet18.py does what it says, and says so when it does not hold."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import spherify

SCRIPT = Path(__file__).parents[1] / "examples" / "convert_resnet18.py"
pytest.importorskip("sklearn")

ANGLE = re.compile(r"^ +(conv1|layer4\.1\.conv2) +(\d+) +(\d+\.\d\d) +(\d+), +(\d+)$", re.MULTILINE)


def assert_complete(text: str, operator: str) -> None:
    """All four parts of the output are there, and the numbers can be."""
    assert f"ResNet: 21 layers, 17 converted to {operator}" in text
    assert "reloaded equals converted bit for bit" in text
    difference = re.search(r"relative difference of original and converted: (\d+\.\d+)", text)
    assert difference is not None
    assert 0.01 < float(difference[1]) < 100
    found = ANGLE.findall(text)
    assert [layer for layer, *_ in found] == ["conv1"] * 5 + ["layer4.1.conv2"] * 5
    for layer, number, degrees, row, column in found:
        filters, side = {"conv1": (64, 112), "layer4.1.conv2": (512, 7)}[layer]  # of ResNet-18 at 224 pixels
        assert 0 < float(degrees) < 90
        assert int(number) < filters
        assert max(int(row), int(column)) < side
    angles = [float(degrees) for _, _, degrees, _, _ in found]
    assert angles[:5] == sorted(angles[:5])
    assert angles[5:] == sorted(angles[5:])


def run_here(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_it_runs_as_a_user_runs_it_and_leaves_nothing_behind(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert_complete(done.stdout, "cosine")
    assert list(tmp_path.iterdir()) == []
    scratch = re.search(r"in (\S+) \(removed at the end", done.stdout)
    assert scratch is not None
    assert not Path(scratch[1]).exists()


def test_it_takes_an_operator_a_photograph_and_a_folder(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, "--operator", "learnable", "--photograph", "flower.jpg", "--output", str(tmp_path / "kept"))
    text = capsys.readouterr().out
    assert_complete(text, "learnable")
    assert "flower.jpg through all three" in text
    assert spherify.load(tmp_path / "kept").conv1.operator == "learnable"


def test_it_ends_with_1_where_the_reloaded_model_answers_otherwise(monkeypatch, capsys):
    load = spherify.load

    def load_with_one_wrong_weight(folder: Path):
        model = load(folder)
        model.fc.bias.data[0] += 1
        return model

    monkeypatch.setattr(spherify, "load", load_with_one_wrong_weight)
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch)
    assert ended.value.code == "The reloaded model does not answer as the converted one did."  # printed; exit code 1
    assert "bit for bit" not in capsys.readouterr().out


@pytest.mark.parametrize("argument", [["--operator", "round"], ["--photograph", "cat.jpg"]])
def test_a_wrong_call_ends_with_2(monkeypatch, capsys, argument):
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *argument)
    assert ended.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
