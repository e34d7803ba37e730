"""The examples of training run, and what they train has learned the digits."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "epochs", "percent"),
    [("own_loop", 1, 40), ("accelerate_margin", 1, 40), ("timm_train", 2, 60)],  # by chance: 10
)
def test_an_example_learns_most_digits(name, epochs, percent, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(epochs)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    found = [re.match(r"epoch (\d): (\d+\.\d) % of (355|359) test images", line) for line in lines]
    assert [match[1] for match in found if match] == [str(epoch + 1) for epoch in range(epochs)]
    assert found[-1] is not None
    assert float(found[-1][2]) > percent
