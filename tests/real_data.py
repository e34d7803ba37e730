"""Where the real images and the real weights are that are no part of the repository."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

VARIABLE = "SPHERIFY_DATA"
DEFAULT = Path(__file__).parents[1] / ".." / "shared" / "data"


def shared_data() -> Path:
    """The folder named by the environment variable SPHERIFY_DATA, else ../shared/data; without it, a skip."""
    folder = Path(os.environ.get(VARIABLE) or DEFAULT).resolve()
    if not (folder / "MANIFEST.md").is_file():
        pytest.skip(f"no real data in {folder}; set {VARIABLE} to the folder that holds its MANIFEST.md")
    return folder


def loaders() -> ModuleType:
    """The readers that stand beside the data."""
    specification = importlib.util.spec_from_file_location("shared_data_loaders", shared_data() / "loaders.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
