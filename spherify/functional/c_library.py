"""Compiles a C source of this package once for this processor and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())  # the first that the compiler knows
SECONDS = 120.0  # for the compiler


class NotCompiled(Exception):
    """Why there is no library."""


def compiled(source: Path, headers: tuple[Path, ...] = ()) -> ctypes.CDLL:
    """The library of a source file, from the user's cache or compiled now. ``headers``: of our own, beside it.

    Raises:
        NotCompiled: there is no compiler, it failed, or what it made cannot be loaded.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None or platform.system() == "Windows":
        raise NotCompiled("no C compiler (cc, gcc, clang) is on the path")
    texts = [file.read_text() for file in (source, *headers)]
    key = hashlib.sha256("\0".join([*texts, compiler, *FLAGS, processor()]).encode()).hexdigest()[:20]
    name = f"{source.stem}-{key}.so"
    try:
        return loaded(cache_folder() / name, source, compiler)
    except OSError:  # a cache that cannot be written, or whose programs may not run
        try:
            return loaded(Path(tempfile.mkdtemp(prefix="spherify-")) / name, source, compiler)
        except OSError as error:
            raise NotCompiled(f"the library cannot be written or loaded: {error}") from error


def loaded(path: Path, source: Path, compiler: str) -> ctypes.CDLL:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        compile_to(path, source, compiler)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spherify"


def compile_to(path: Path, source: Path, compiler: str) -> None:
    """Written under a temporary name, then renamed: several processes may do it at once."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        for extra in EXTRAS:
            told = f'-DBUILT_WITH="{" ".join(extra)}"'  # for `options_of`
            command = [compiler, *FLAGS, *extra, told, str(source), "-o", name, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            if done.returncode == 0:
                Path(name).replace(path)
                return
        lines = done.stderr.strip().splitlines()
        raise NotCompiled(f"{compiler} failed: {lines[0] if lines else done.returncode}")
    except subprocess.TimeoutExpired as error:
        raise NotCompiled(f"{compiler} did not end within {SECONDS:.0f} s") from error
    finally:
        Path(name).unlink(missing_ok=True)


def options_of(library: ctypes.CDLL) -> str:
    """Which of ``EXTRAS`` the compiler took; a library from the cache knows it, too."""
    told = ctypes.c_char_p.in_dll(library, "built_with").value
    assert told is not None
    return told.decode() or "no options for this processor"


def processor() -> str:
    """What tells this processor from others that may share the cache."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return platform.platform() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in described.read_text().splitlines() if line.startswith(kinds)}))
