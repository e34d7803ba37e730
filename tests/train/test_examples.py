"""The examples of training run, and what they train has learned the digits."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["own_loop", "timm_train", "accelerate_margin"])
def test_two_epochs_of_an_example_learn_most_digits(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "2"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    found = [re.match(r"epoch (\d): (\d+\.\d) % of (355|359) test images", line) for line in lines]
    assert [match[1] for match in found if match] == ["1", "2"]
    assert found[-1] is not None
    assert float(found[-1][2]) > 60  # by chance: 10
