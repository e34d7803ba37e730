"""Values that wait between layers and do not fit in memory: one temporary file, written and read tensor by tensor."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spherify.errors import FileError

MOST_HELD = 1_000_000_000  # bytes of the waiting values of a student and its donor that stay in memory
SHARE_OF_DEVICE = 0.5  # of an accelerator's free memory, where that is more


class Store:
    """A file for tensors. It has no name where the system allows that, and goes with ``close`` or with the process.

    Tensors are written as they lie in memory, so that what is read has the same bits and the same strides. A value is a
    tensor, or a tuple or list of such; other values, and tensors that a derivative may be asked of, stay in memory.
    """

    def __init__(self) -> None:
        self.file: io.FileIO | None = None
        self.end = 0
        self.free: dict[int, list[int]] = {}  # offsets of places that are used no more, by their size

    def put(self, value: Any) -> Any:
        """The value with every tensor in the file.

        Raises:
            FileError: the folder of temporary files is full, or cannot be written to.
        """
        if type(value) in (tuple, list):
            return type(value)(map(self.put, value))
        if not isinstance(value, Tensor) or not value.numel() or value.requires_grad:
            return value
        stretch = stretch_of(value)
        data = stretch.detach().cpu().view(torch.uint8).numpy().data
        places = self.free.get(len(data))
        offset = places.pop() if places else self.end
        self.end = max(self.end, offset + len(data))
        try:
            self.write(data, offset)
        except OSError as error:
            raise FileError(
                f"{folder()}: {self.end / 1e9:.1f} GB of activations cannot be put there ({error.strerror or error}); "
                "free space, name another folder with TMPDIR, or calibrate with fewer images."
            ) from error
        return Stored(self, offset, len(data), value.dtype, value.device, value.shape, value.stride())

    def write(self, data: memoryview, offset: int) -> None:
        if self.file is None:
            self.file = tempfile.TemporaryFile(prefix="spherify-", buffering=0)  # noqa: SIM115 - close() closes it
        self.file.seek(offset)
        while data:
            data = data[self.file.write(data) :]

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


@dataclass(eq=False)
class Stored:
    """A tensor in a file; its place can be used again when this is thrown away.

    Attributes:
        offset, size: of its place, bytes.
    """

    store: Store
    offset: int
    size: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]

    def __del__(self) -> None:
        self.store.free.setdefault(self.size, []).append(self.offset)

    def read(self) -> Tensor:
        stretch = torch.empty(self.size, dtype=torch.uint8)
        data, file = stretch.numpy().data, self.store.file
        assert file is not None
        file.seek(self.offset)
        while data:
            count = file.readinto(data)
            assert count, "the file is shorter than what was written"
            data = data[count:]
        return stretch.view(self.dtype).to(self.device).as_strided(self.shape, self.stride)


def fetched(value: Any) -> Any:
    """The value with every tensor in memory."""
    if type(value) in (tuple, list):
        return type(value)(map(fetched, value))
    return value.read() if isinstance(value, Stored) else value


def bytes_held(value: Any) -> int:
    """Of the tensors in memory; those that share it are counted each."""
    if type(value) in (tuple, list):
        return sum(map(bytes_held, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def stretch_of(value: Tensor) -> Tensor:
    """The stretch of memory from a tensor's first element to its last, as one dimension."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.as_strided((last + 1,), (1,))


def most_held(device: torch.device) -> int:
    """Bytes for both networks together."""
    if device.type != "cuda":
        return MOST_HELD
    return max(MOST_HELD, int(SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]))


def folder() -> str:
    """Where temporary files are made."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return "the folder of temporary files"
