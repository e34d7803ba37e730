"""Accuracy, loss and confusions against counting by hand; pictures that are drawn and not empty."""

import csv
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from training_samples import QUIET, angular_net, batches, net, recipe

from spherify.errors import OptionError
from spherify.train import pictures
from spherify.train.evaluate import evaluate, in_eval_mode
from spherify.train.fit import fit
from spherify.train.health import first_non_finite
from spherify.train.pictures import angles_between, draw_all, draw_confusion, spread, try_to_draw_confusion


class Fixed(nn.Module):
    """Answers with the logits it is given as inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def logits_and_labels(count: int = 30, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator)
    return logits, torch.randint(0, classes, (count,), generator=generator)


def in_batches(logits, labels, size: int = 8):
    return list(zip(logits.split(size), labels.split(size), strict=True))


def test_it_counts_what_one_counts_by_hand():
    logits, labels = logits_and_labels()
    found = evaluate(Fixed(), in_batches(logits, labels), classes=tuple("abcdefg"))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found.images == 30
    assert found.top1 == pytest.approx(100 * (ranks == 0).float().mean().item())
    assert found.top5 == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert found.images_per_second > 0
    confusion = np.zeros((7, 7), dtype=int)
    for label, answer in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        confusion[label, answer] += 1
    assert (found.confusion == confusion).all()
    rows = found.per_class()
    assert [row["class"] for row in rows] == list("abcdefg")
    assert [row["images"] for row in rows] == confusion.sum(1).tolist()
    assert rows[2]["top1"] == pytest.approx(100 * confusion[2, 2] / confusion[2].sum(), abs=1e-3)


def test_it_has_the_keys_of_the_json_object():
    found = evaluate(Fixed(), in_batches(*logits_and_labels()))
    assert list(found.to_dict()) == ["top1", "top5", "loss", "images", "images_per_second", "per_class"]


def test_of_fewer_than_five_classes_all_are_among_the_first_five():
    found = evaluate(Fixed(), in_batches(*logits_and_labels(classes=3)))
    assert found.top5 == 100.0


def test_a_class_without_images_has_no_accuracy():
    found = evaluate(Fixed(), [(torch.eye(3), torch.tensor([0, 1, 1]))])
    assert found.per_class()[2] == {"class": "2", "images": 0, "top1": None}


def test_other_classes_than_the_models_are_refused():
    with pytest.raises(OptionError, match="the model answers for 7 classes, and the data have 3"):
        evaluate(Fixed(), in_batches(*logits_and_labels()), classes=("a", "b", "c"))
    logits, labels = logits_and_labels()
    with pytest.raises(OptionError, match="the model answers for 5 classes, and the data have"):
        evaluate(Fixed(), [(logits[:, :5], labels)])
    with pytest.raises(OptionError, match="there are no images"):
        evaluate(Fixed(), [])


def test_every_modules_mode_is_put_back_even_after_an_error():
    model = net(norm=True)
    model[1].eval()
    with pytest.raises(RuntimeError), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_it_can_be_stopped():
    told = []
    stopped = evaluate(
        Fixed(), in_batches(*logits_and_labels()), is_stopped=lambda: len(told) == 2, on_batch=told.append
    )
    assert stopped is None
    assert told == [8, 8]


# ---------------------------------------------------------------------------------------------- health


def test_the_first_layer_that_is_not_finite_is_named():
    model = net()
    x = batches(1)[0][0]
    assert first_non_finite(model, x) is None
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    assert first_non_finite(model, x) == "3 (Conv2d, whose bias is not finite)"


def test_a_layer_that_overflows_is_named_though_its_weights_are_finite():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    nn.init.constant_(model[1].weight, 3e38)
    assert first_non_finite(model, torch.ones(1, 1, 8, 8)) == "1 (Linear)"


# ---------------------------------------------------------------------------------------------- pictures


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("drawn")
    done = fit(angular_net("learnable"), (batches(), batches(2)), recipe(), conduct=QUIET)
    assert draw_all(done, folder) == []
    return folder, done


@pytest.mark.parametrize("name", ["curves.png", "k.png", "angles.png", "confusion.png"])
def test_every_picture_is_drawn_and_has_ink(drawn, name):
    pixels = pixels_of(drawn[0] / name)
    assert min(pixels.shape[:2]) > 100
    assert (pixels < 250).any(axis=2).mean() > 0.005
    assert (pixels.max(axis=2) - pixels.min(axis=2) > 60).mean() > 0.001  # and some colour
    assert not list(drawn[0].glob(".*"))


def test_the_table_of_angles_says_what_the_filters_are(drawn):
    with (drawn[0] / "angles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    layer = drawn[1].model[3]
    assert [row["layer"] for row in rows] == ["0", "3"]
    assert (rows[1]["filters"], rows[1]["fan_in"]) == ("8", "54")
    angles = angles_between(layer.weight)
    assert float(rows[1]["mean_degrees"]) == pytest.approx(float(angles.mean()), abs=1e-3)
    assert float(rows[1]["k_min"]) == pytest.approx(float(layer.k.detach().min()), rel=1e-3)


def test_angles_between_filters_are_those_of_geometry():
    filters = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]])
    assert torch.allclose(angles_between(filters), torch.tensor([90.0, 180.0, 90.0]), atol=1e-3)


def test_a_plain_model_has_curves_and_confusions_alone(tmp_path):
    pytest.importorskip("matplotlib")
    done = fit(net(), (batches(), batches(2)), recipe(), conduct=QUIET)
    draw_all(done, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "curves.png"]


def test_many_classes_are_drawn_without_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    logits, labels = logits_and_labels(200, 40)
    draw_confusion(evaluate(Fixed(), [(logits, labels)]), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    found = evaluate(Fixed(), in_batches(*logits_and_labels()))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (line,) = try_to_draw_confusion(found, tmp_path / "x.png")
    assert "pip install 'spherify[plot]'" in line
    done = fit(net(), (batches(), None), recipe(steps=1), conduct=QUIET)
    assert pictures.draw_all(done, tmp_path) == [f"No pictures: {line.removeprefix('no picture of the confusions: ')}"]


def test_a_selection_of_layers_begins_with_the_first_and_ends_with_the_last():
    chosen = spread({str(number): number for number in range(100)}, 10)
    assert len(chosen) == 10
    assert [*chosen][0::9] == ["0", "99"]
