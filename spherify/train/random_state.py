"""The random generators of a process, taken down and set again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def take_down() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, as plain values and tensors."""
    python, numpy = random.getstate(), np.random.get_state(legacy=True)
    assert isinstance(numpy, tuple)
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [str(numpy[0]), torch.from_numpy(numpy[1].astype(np.int64)), *(value for value in numpy[2:])],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_again(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def start_from(seed: int) -> None:
    """All generators from one seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
