"""Replacing a folder or a file in one step: whoever looks sees the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # Linux, renameat2(2); the same number is RENAME_SWAP of macOS, renamex_np(2)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of ``folder`` when the block ends without an error.

    Files in the old folder that the new one does not have are carried over. The new folder stands beside the old one
    until the very last step, which is one rename. What a killed process left behind is cleared by the next call.
    """
    folder = folder.resolve()  # a link to a folder stays a link
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}-{secrets.token_hex(4)}")
    new.mkdir()
    try:
        yield new
        if folder.exists():
            carry_over(folder, new)
        flush(new)
        if folder.exists():
            exchange(new, folder)
        else:
            new.rename(folder)
        flush_entry(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after an exchange this is the old one


def replace_file(path: Path, data: bytes) -> None:
    """``data`` as the file at ``path``: written beside it and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            with suppress(OSError):
                os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that no longer run left beside ``folder``, unless it is all there is."""
    if not folder.exists():
        return
    ours = re.compile(rf"\.{re.escape(folder.name)}\.new-(\d+)-[0-9a-f]{{8}}(-old)?")
    for leftover in folder.parent.iterdir():
        owner = ours.fullmatch(leftover.name)
        if owner and not is_running(int(owner[1])):
            shutil.rmtree(leftover, ignore_errors=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def carry_over(old: Path, new: Path) -> None:
    """Everything of ``old`` that ``new`` does not have, by hard link where the disk can."""
    for entry in old.iterdir():
        target = new / entry.name
        if target.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(str(entry), str(target))


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def flush(folder: Path) -> None:
    """Have the disk itself hold every file, so that a power cut cannot leave an empty one."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file, suppress(OSError):
                os.fsync(file.fileno())
    flush_entry(folder)


def flush_entry(folder: Path) -> None:
    with suppress(OSError):  # some systems cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step; in two where the system has no such call, with both whole in between."""
    if exchange_by_system_call(os.fsencode(new), os.fsencode(old)):
        return
    aside = new.with_name(f"{new.name}-old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def exchange_by_system_call(one: bytes, two: bytes) -> bool:
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return library.renamex_np(one, two, RENAME_EXCHANGE) == 0
        return library.renameat2(AT_FDCWD, one, AT_FDCWD, two, RENAME_EXCHANGE) == 0
    except (OSError, AttributeError, TypeError):  # no such library, no such function
        return False
