"""Values that do not fit in memory are put into a temporary file, come back bit by bit, and leave nothing behind."""

import errno
import gc
import os
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from networks import Residual, image, timm_model
from torch import nn

from spherify import calibrate, spherify
from spherify.calibrate import pair as pair_file
from spherify.calibrate.pair import Pair
from spherify.calibrate.recorded import Recorded
from spherify.calibrate.store import Store, Stored, bytes_held, fetched
from spherify.calibrate.world import World
from spherify.errors import FileError

IMAGES = image(24, 3, 16, 16)


def open_files(folder: Path) -> int:
    """The file has no name, but its descriptor still says where it is."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]  # noqa: PTH115
    return sum(link.startswith(str(folder)) for link in links)


@pytest.fixture
def file_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, 1:, ::2],
        lambda x: x[:1, :1].expand(4, 3, 6, 5),
        lambda x: x[0, 0, 0, 0],
        lambda x: x[:0],
        lambda x: x.transpose(1, 3),
    ],
)
def test_a_tensor_comes_back_with_its_bits_and_strides(dtype, form):
    value = form(image(2, 3, 6, 5).mul(3).to(dtype))
    store = Store()
    back = fetched(store.put(value))
    assert torch.equal(back, value)
    assert (back.dtype, back.shape, back.stride()) == (value.dtype, value.shape, value.stride())
    store.close()


def test_what_is_thrown_away_makes_room():
    store = Store()
    first, second = store.put(image(4)), store.put(image(4, seed=1))
    assert (first.offset, second.offset, store.end) == (0, 16, 32)
    del first
    third = store.put((image(4, seed=2), 7))
    assert (third[0].offset, third[1], store.end) == (0, 7, 32)
    assert torch.equal(fetched(third)[0], image(4, seed=2))
    assert torch.equal(fetched(second), image(4, seed=1))
    store.close()


def test_a_tensor_that_slopes_may_be_asked_of_stays_in_memory():
    value = image(4).requires_grad_()
    assert Store().put(value) is value


def test_waiting_values_take_no_more_memory_than_allowed():
    model = Residual().eval()
    batches = list(IMAGES.split(4))
    recorded = Recorded(model, batches[0])
    value = 4 * 8 * 16 * 16 * 4  # bytes of one batch's result
    world = World(recorded, batches, most_held=2 * value)
    world.want([len(recorded.nodes) - 1])
    two = recorded.layer_calls()[1]
    source = recorded.position[recorded.flow.sources(recorded.nodes[two])[0]]
    with torch.no_grad():
        world.advance([source])
        waiting = [values[source] for values in world.values]
        assert [isinstance(value, Stored) for value in waiting] == [False, False, True, True, True, True]
        assert sum(map(bytes_held, waiting)) == 2 * value
        answers = []
        world.advance(recorded.outputs, lambda number, values: answers.append(values[0]))
        for batch, answer in zip(batches, answers, strict=True):
            torch.testing.assert_close(answer, model(batch), rtol=1e-4, atol=1e-5)
    world.store.close()


def without_norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def calibrated(model, method, images, monkeypatch, bound=None):
    converted = spherify(model, example_input=images[:2])
    if bound is not None:
        monkeypatch.setattr(pair_file, "most_held", lambda device: bound)
    calibrate(converted, images.split(8), method, donor=model, output_solves=1)
    return converted.state_dict()


@pytest.mark.parametrize(
    ("make", "images", "method", "half"),
    [
        (Residual, image(48, 3, 16, 16), "transplant", False),
        (Residual, image(48, 3, 16, 16), "transplant", True),
        (lambda: timm_model("test_vit"), image(16, 3, 160, 160), "transplant", False),
        (without_norms, IMAGES, "statistics", True),
    ],
)
def test_weights_are_the_same_to_the_bit_with_a_file_and_without(make, images, method, half, monkeypatch, file_folder):
    torch.manual_seed(0)
    model = make().eval()
    monkeypatch.setattr(import_module("spherify.calibrate.calibrate"), "is_large", lambda parts: half)
    expected = calibrated(model, method, images, monkeypatch)
    written = []
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda store, value: written.append(put(store, value)) or written[-1])
    found = calibrated(model, method, images, monkeypatch, bound=1000)
    dtypes = {value.dtype for value in written if isinstance(value, Stored)}
    assert (torch.float16 if half else torch.float32) in dtypes
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert list(file_folder.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be listed here")
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_file_is_gone_afterwards_whatever_happens(error, monkeypatch, file_folder):
    model = Residual().eval()
    converted = spherify(model, example_input=IMAGES[:2])
    monkeypatch.setattr(pair_file, "most_held", lambda device: 0)
    seen = []

    def progress(name: str) -> None:
        seen.append(open_files(file_folder))
        if error is not None and max(seen):
            raise error

    gc.disable()  # closed because it is said so, not because it is found to be unused
    try:
        report = calibrate(converted, IMAGES, donor=model, output_solves=0, progress=progress)
        assert "activations waited in a temporary file" in report.notes[-1]
    except (KeyboardInterrupt, RuntimeError) as stopped:
        assert type(stopped) is error
    finally:
        gc.enable()
    assert max(seen) == 1
    assert open_files(file_folder) == 0
    assert list(file_folder.iterdir()) == []


def test_a_full_disk_is_one_line_with_the_folder_and_what_to_do(monkeypatch, file_folder):
    model = Residual().eval()
    converted = spherify(model, example_input=IMAGES[:2])
    before = {name: value.clone() for name, value in converted.state_dict().items()}
    monkeypatch.setattr(pair_file, "most_held", lambda device: 0)

    def write(store: Store, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(FileError, match=r"No space left on device") as refusal:
        calibrate(converted, IMAGES, donor=model)
    assert str(refusal.value) == (
        f"{file_folder}: 0.0 GB of activations cannot be put there (No space left on device); "
        "free space, name another folder with TMPDIR, or calibrate with fewer images."
    )
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())


def test_a_file_may_be_written_in_pieces(monkeypatch):
    store, value = Store(), image(100)
    store.put(value)

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:7])

        def readinto(self, data):
            return self.file.readinto(data[:5])

        def __getattr__(self, name):
            return getattr(self.file, name)

    store.file = Slow(store.file)
    assert torch.equal(fetched(store.put(value)), value)
    store.close()


def test_a_pair_shares_one_file_between_both_runs():
    model = Residual().eval()
    with Pair(spherify(model, example_input=IMAGES[:2]), model, [IMAGES], half=False) as pair:
        assert pair.student.store is pair.donor.store is pair.store
