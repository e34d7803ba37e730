"""The picture of two-dimensional features, drawn from the digits that need no file."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "feature_plot.py"


@pytest.fixture
def script():
    specification = importlib.util.spec_from_file_location("feature_plot", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_head_of_the_picture_trains_and_is_measured(script):
    images, labels = script.data("digits", 256)
    for options in script.HEADS.values():
        model = script.train(options, images[:256], labels[:256], epochs=1, seed=0)
        features, weight, angles, accuracy = script.measured(model, images[256:320], labels[256:320])
        assert features.shape == (64, 2)
        assert weight.shape == (10, 2)
        assert ((angles >= 0) & (angles <= 180)).all()
        assert 0 <= accuracy <= 100


def test_the_picture_is_written(script, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install spherify[plot])")
    results = {name: (torch.randn(20, 2), torch.randn(10, 2), torch.rand(20) * 90, 50.0) for name in script.HEADS}
    script.draw(results, torch.arange(20) % 10, tmp_path / "features.png")
    assert (tmp_path / "features.png").stat().st_size > 10_000


def test_a_missing_file_is_told(script):
    with pytest.raises(SystemExit, match=r"^nowhere\.npz is no file; give an \.npz, or 'digits'\.$"):
        script.data("nowhere.npz", 10)
