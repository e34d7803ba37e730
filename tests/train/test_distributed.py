"""Several processes on the CPU: what one process with the whole batch computes, and one that writes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spherify.cli import app as cli

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# without BatchNorm, whose statistics are those of each process; a network with LayerNorms
TRAIN = "-m spherify train test_convnext --data digits --quiet --lr 1e-3 --seed 3 --log-interval 1 --steps 20"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
ACCELERATE = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
ACCELERATE += " --dynamo_backend no --main_process_port 0"


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess:
    arguments = [part for word in words for part in word.split()]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(one: Path, two: Path) -> None:
    ours, theirs = rows_of(one), rows_of(two)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [str(step) for step in range(1, 21)]
    for mine, other in zip(ours, theirs, strict=True):
        assert abs(float(mine["train_loss"]) - float(other["train_loss"])) < 1e-5
        assert mine["train_top1"] == other["train_top1"]
    assert ours[-1]["test_top1"] == theirs[-1]["test_top1"]  # of 355 images, an odd number: each counted once
    assert abs(float(ours[-1]["test_loss"]) - float(theirs[-1]["test_loss"])) < 1e-5


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the whole batch of 32."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spherify", *TRAIN.split()[2:], "--batch-size", "32", "--output", str(folder)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    return folder


def test_torchrun_computes_what_one_process_with_twice_the_batch_computes(tmp_path, alone):
    done = launch(tmp_path, TORCHRUN, TRAIN, "--batch-size 16 --output run")
    assert_same_run(alone, tmp_path / "run")
    assert done.stdout.count("Wrote run") == 1
    assert "batch 2 x 16" in done.stdout
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_accelerate_launch_computes_the_same(tmp_path, alone):
    launch(tmp_path, ACCELERATE, TRAIN, "--batch-size 16 --output run")
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.slow
def test_evaluation_in_two_processes_counts_each_image_once_and_prints_once(tmp_path, alone):
    evaluate = f"-m spherify evaluate {alone} --data digits --json --confusion x.png"
    one, two = json.loads(launch(tmp_path, evaluate).stdout), json.loads(launch(tmp_path, TORCHRUN, evaluate).stdout)
    assert one["images"] == two["images"] == 355
    assert one["top1"] == two["top1"]
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert one["per_class"] == two["per_class"]


@pytest.mark.slow
def test_sigterm_stops_both_processes_together_and_the_run_goes_on_later(tmp_path, alone):
    words = f"{TORCHRUN} {TRAIN} --batch-size 16 --output run --resume auto --checkpoint-steps 5".split()
    words[words.index("20")] = "400"
    process = subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run").glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    process.communicate(timeout=200)
    newest = sorted((tmp_path / "run").glob("checkpoints/step-*"))[-1]
    step = int(newest.name.removeprefix("step-"))
    assert step % 10 == 0  # both looked at the same step
    assert 10 <= step < 400


FSDP = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from spherify.convert import spherify
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
def net():
    torch.manual_seed(0)
    return spherify(torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(512, 4)
    ), operator="learnable", example_input=torch.zeros(2, 3, 8, 8))
model, twin = net(), net()
fully_shard(model[0], mesh=mesh); fully_shard(model, mesh=mesh)
torch.manual_seed(1)
x = torch.randn(4, 3, 8, 8)
optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
for _ in range(3):
    for m, optimizer in zip((model, twin), optimizers):
        m(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
worst = max(float((whole[name] - value).abs().max()) for name, value in twin.state_dict().items())
print("WORST", worst)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_converted_model_can_be_sharded(tmp_path):
    """FSDP on the CPU: sharded and whole model take the same steps."""
    (tmp_path / "shard.py").write_text(FSDP)
    done = launch(tmp_path, TORCHRUN, "shard.py")
    worst = [float(line.split()[-1]) for line in done.stdout.splitlines() if "WORST" in line]
    assert len(worst) == 2
    assert max(worst) < 1e-5
