"""``kill -9`` at random moments: the resumed run ends with the weights of one that nobody interrupted, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_run
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
COMMAND = "-m spherify train test_resnet --data digits --steps 24 --batch-size 8 --img-size 16 --model-ema"
OPTIONS = "--checkpoint-steps 3 --mixup 0.2 --drop 0.1 --operator learnable --lr 1e-3 --quiet --resume auto --output"


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
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


def leftovers(folder: Path) -> list[Path]:
    return [entry for entry in (folder / "checkpoints").iterdir() if entry.name.startswith(".")]


def test_kills_change_nothing(tmp_path):
    killed_run.run(tmp_path / "whole")
    want = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    for number, moment in enumerate((0.4, 0.9)):
        folder = tmp_path / f"killed{number}"
        process = start(killed_run.__file__, folder)
        assert process.stdout is not None
        process.stdout.readline()  # past the imports
        kill_after(process, moment)
        killed_run.run(folder)
        assert (folder / "model" / "model.safetensors").read_bytes() == want
        assert leftovers(folder) == []


@pytest.mark.slow
def test_twenty_kills_of_the_command_change_nothing(tmp_path):
    arguments = [*COMMAND.split(), *OPTIONS.split()]
    begun = time.monotonic()
    finish(start(*arguments, tmp_path / "whole"))
    duration = time.monotonic() - begun
    want = (tmp_path / "whole" / "model.safetensors").read_bytes()
    moments, killed = random.Random(1), 0
    for number in range(20):
        folder = tmp_path / f"killed{number}"
        was_killed = kill_after(start(*arguments, folder), moments.uniform(0.3, 1.0) * duration)
        killed += was_killed
        steps = sorted(path.name for path in folder.glob("checkpoints/*"))
        print(number, "killed" if was_killed else "was done", steps, flush=True)
        finish(start(*arguments, folder))
        assert (folder / "model.safetensors").read_bytes() == want
        assert leftovers(folder) == []
    assert killed >= 14  # else the moments were not those of a run
