"""Replacing a folder in one step: whoever looks, and whoever kills, finds the old one or the new one, whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spherify.export import atomic
from spherify.export.atomic import replacing_folder

KILLS = 15
MEGABYTE = 1_000_000
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and renames")


def write(folder: Path, **files: str) -> None:
    with replacing_folder(folder) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[True, False], ids=["exchange call", "no exchange call"])
def either_way(request, monkeypatch) -> bool:
    """With the system's call that swaps two folders, where it has one, and without."""
    if not request.param:
        monkeypatch.setattr(atomic, "exchange_by_system_call", lambda one, two: False)
    return request.param


@pytest.fixture
def no_exchange_call(monkeypatch) -> None:
    monkeypatch.setattr(atomic, "exchange_by_system_call", lambda one, two: False)


# ---------------------------------------------------------------------------------------------- what it does


def test_a_new_folder_is_made_with_those_above_it(tmp_path, either_way):
    write(tmp_path / "a" / "b", x="1")
    assert contents(tmp_path / "a" / "b") == {"x": "1"}
    assert names(tmp_path / "a") == ["b"]


def test_an_old_folder_is_replaced_and_its_other_files_stay(tmp_path, either_way):
    write(tmp_path / "folder", x="1", y="old")
    (tmp_path / "folder" / "deep").mkdir()
    (tmp_path / "folder" / "deep" / "z").write_text("mine")
    write(tmp_path / "folder", x="2")
    assert contents(tmp_path / "folder") == {"x": "2", "y": "old", "deep/z": "mine"}
    assert names(tmp_path) == ["folder"]


def test_nothing_is_seen_before_the_end(tmp_path, either_way):
    write(tmp_path / "folder", x="1")
    with replacing_folder(tmp_path / "folder") as new:
        (new / "x").write_text("2")
        assert contents(tmp_path / "folder") == {"x": "1"}
    assert contents(tmp_path / "folder") == {"x": "2"}


def test_a_folder_named_by_where_one_stands_is_replaced(tmp_path, monkeypatch, either_way):
    monkeypatch.chdir(tmp_path)
    write(Path("folder"), x="1")
    write(Path("folder"), x="2")
    assert contents(tmp_path / "folder") == {"x": "2"}


def test_files_are_carried_over_without_being_copied(tmp_path):
    write(tmp_path / "folder", x="1", large="old")
    before = (tmp_path / "folder" / "large").stat().st_ino
    write(tmp_path / "folder", x="2")
    assert (tmp_path / "folder" / "large").stat().st_ino == before


def test_files_are_copied_where_the_disk_has_no_links(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "folder", x="1", y="old")
    (tmp_path / "folder" / "link").symlink_to("nowhere")
    write(tmp_path / "folder", x="2")
    assert contents(tmp_path / "folder") == {"x": "2", "y": "old"}
    assert (tmp_path / "folder" / "link").readlink() == Path("nowhere")


def test_this_system_has_the_exchange_call(tmp_path):
    """Else the first of the two ways would not be tested here."""
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").touch()
    assert atomic.exchange_by_system_call(os.fsencode(tmp_path / "a"), os.fsencode(tmp_path / "b"))
    assert (tmp_path / "a").is_file()
    assert (tmp_path / "b").is_dir()


def test_a_system_without_the_exchange_call_says_no(monkeypatch):
    class NoSuchFunction:
        def __getattr__(self, name: str) -> None:
            raise AttributeError(name)

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *arguments, **options: NoSuchFunction())
    assert atomic.exchange_by_system_call(b"one", b"two") is False


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_the_old_folder(tmp_path, either_way, error):
    write(tmp_path / "folder", x="1")
    with pytest.raises(error), replacing_folder(tmp_path / "folder") as new:
        (new / "x").write_text("2")
        raise error
    assert contents(tmp_path / "folder") == {"x": "1"}
    assert names(tmp_path) == ["folder"]


def test_an_error_inside_leaves_no_folder_where_there_was_none(tmp_path):
    with pytest.raises(ValueError), replacing_folder(tmp_path / "folder"):
        raise ValueError
    assert names(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_the_disk_refuses_leaves_the_old_folder(tmp_path, monkeypatch, no_exchange_call, failing):
    write(tmp_path / "folder", x="1")
    rename, calls = Path.rename, []

    def refuse(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "folder", x="2")
    assert contents(tmp_path / "folder") == {"x": "1"}
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_cannot_be_flushed_is_replaced_all_the_same(tmp_path, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path / "folder", x="1")
    assert contents(tmp_path / "folder") == {"x": "1"}


# ---------------------------------------------------------------------------------------------- leftovers


@pytest.fixture
def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("suffix", ["", "-old"])
@pytest.mark.parametrize("name", ["folder", "fol[d]er", "a-b.new-1"])
def test_what_a_dead_process_left_is_cleared(tmp_path, dead_process, name, suffix):
    write(tmp_path / name, x="1")
    (tmp_path / f".{name}.new-{dead_process}-0123abcd{suffix}").mkdir()
    write(tmp_path / name, x="2")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("suffix", ["", "-old"])
def test_what_a_living_process_works_on_is_left(tmp_path, suffix):
    write(tmp_path / "folder", x="1")
    theirs = f".folder.new-{os.getppid()}-0123abcd{suffix}"
    (tmp_path / theirs).mkdir()
    write(tmp_path / "folder", x="2")
    assert names(tmp_path) == sorted([theirs, "folder"])


@pytest.mark.parametrize(
    "other", [".folder.new-mine", ".folder2.new-{}-0123abcd", ".folder.new-{}-notes", "folder.new"]
)
def test_what_only_looks_like_a_leftover_is_left(tmp_path, dead_process, other):
    write(tmp_path / "folder", x="1")
    (tmp_path / other.format(dead_process)).mkdir()
    write(tmp_path / "folder", x="2")
    assert (tmp_path / other.format(dead_process)).is_dir()


def test_a_leftover_is_kept_while_it_may_be_all_there_is(tmp_path, dead_process):
    leftover = tmp_path / f".folder.new-{dead_process}-0123abcd"
    leftover.mkdir()
    with pytest.raises(ValueError), replacing_folder(tmp_path / "folder"):
        raise ValueError
    assert leftover.is_dir()


def test_a_process_of_another_user_counts_as_running(monkeypatch):
    def refuse(process: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert atomic.is_running(1)


# ---------------------------------------------------------------------------------------------- kills

DIES_AT_A_RENAME = """
import os, sys
from pathlib import Path
from spherify.export import atomic
atomic.exchange_by_system_call = lambda one, two: False
rename, calls, last = Path.rename, [], int(sys.argv[2])
def dying(path, target):
    calls.append(path)
    if len(calls) == last:
        os._exit(9)
    return rename(path, target)
Path.rename = dying
with atomic.replacing_folder(Path(sys.argv[1])) as new:
    (new / "x").write_text("2")
"""


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_process_that_dies_between_two_renames_leaves_both_folders_whole(tmp_path, last):
    folder = tmp_path / "folder"
    write(folder, x="1")
    assert subprocess.run([sys.executable, "-c", DIES_AT_A_RENAME, folder, str(last)], check=False).returncode == 9
    left = [contents(path) for path in tmp_path.iterdir()]
    assert sorted(left, key=str) == [{"x": "1"}, {"x": "2"}]
    assert folder.exists() is (last != 2)  # between the first and the second rename it has no name
    write(folder, x="3")
    write(folder, x="4")
    assert contents(folder) == {"x": "4"}
    assert names(tmp_path) == ["folder"]


WRITES_FOREVER = f"""
import sys
from pathlib import Path
from spherify.export.atomic import replacing_folder
assert "torch" not in sys.modules
while True:
    for letter in "AB":
        with replacing_folder(Path(sys.argv[1])) as new:
            for name in "xyz":
                (new / name).write_text(letter * {MEGABYTE})
        print(letter, flush=True)
"""


def test_a_kill_at_any_moment_leaves_one_whole_folder(tmp_path):
    folder = tmp_path / "folder"
    moments = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", WRITES_FOREVER, folder], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # it is at work
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = contents(folder)
        assert found.keys() == set("xyz")
        assert found["x"] in ("A" * MEGABYTE, "B" * MEGABYTE)
        assert len(set(found.values())) == 1
    write(folder, x="1")
    assert names(tmp_path) == ["folder"]


SAVES_FOREVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from spherify import load, save, spherify

def network():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
models = [spherify(network(), operator=operator, head="convert") for operator in ("cosine", "linear")]
wanted = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
save(models[0], folder)
moments, found = random.Random(0), []
for _ in range(kills):
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                save(model, folder)
    time.sleep(moments.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    model = load(folder, base=network())
    operators = {module.operator for module in model.modules() if hasattr(module, "operator")}
    which = [
        number for number, state in enumerate(wanted)
        if all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    ]
    found.append([which, sorted(operators)])
print(json.dumps(found))
"""


def test_a_kill_while_models_are_saved_leaves_one_that_loads(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVES_FOREVER, tmp_path / "saved", str(KILLS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a fork takes no other threads along
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == KILLS
    assert all(entry in ([[0], ["cosine"]], [[1], ["linear"]]) for entry in found), found
    assert len({str(entry) for entry in found}) == 2  # else it was never killed behind a change
