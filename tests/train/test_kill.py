"""``kill -9`` at random moments: the resumed run ends with the weights of one that nobody interrupted, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

TESTS = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("killed_run.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
COMMAND = "-m spherify train test_resnet --data digits --epochs 2 --checkpoint-steps 3 --model-ema --mixup 0.2"
OPTIONS = "--drop 0.1 --operator learnable --lr 1e-3 --quiet --resume auto --output"


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> None:
    _, text = process.communicate(timeout=600)
    assert process.returncode == 0, text.decode()


def kill_after(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it was still running then."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    return False


def assert_kills_change_nothing(
    tmp_path: Path, arguments: list[object], weights: str, *, kills: int, seed: int
) -> None:
    begun = time.monotonic()
    finish(start(*arguments, tmp_path / "whole"))
    duration = time.monotonic() - begun
    want = (tmp_path / "whole" / weights).read_bytes()
    moments, killed = random.Random(seed), 0
    for number in range(kills):
        folder = tmp_path / f"killed{number}"
        killed += kill_after(start(*arguments, folder), moments.uniform(0.3, 1.0) * duration)
        finish(start(*arguments, folder))
        assert (folder / weights).read_bytes() == want
        assert not [entry for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]
    assert killed >= kills * 0.7  # else the moments were not those of a run


def test_kills_change_nothing(tmp_path):
    assert_kills_change_nothing(tmp_path, [SCRIPT], "model/model.safetensors", kills=2, seed=0)


@pytest.mark.slow
def test_twenty_kills_of_the_command_change_nothing(tmp_path):
    arguments = [*COMMAND.split(), *OPTIONS.split()]
    assert_kills_change_nothing(tmp_path, arguments, "model.safetensors", kills=20, seed=1)
