"""``spherify train`` and ``spherify evaluate`` as a user calls them, on real digits."""

import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch

from spherify.cli import app as cli
from spherify.data.preprocess import Preprocessing
from spherify.export.folder import load
from spherify.layers.angular import AngularLayer
from spherify.train import begin
from spherify.train.plain import load_trained
from spherify.train.recipe import Recipe

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

SMALL = ["test_resnet", "--data", "digits", "--steps", "2", "--quiet", "--img-size", "16"]


class Ran:
    """How one call ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(begin, "draw_all", lambda fitted, folder: [])  # the fixture `trained` has them drawn

    def call(*arguments: object, code: int = 0) -> Ran:
        monkeypatch.setattr(sys, "argv", ["spherify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        ran = Ran(ended.value.code or 0, printed.out, printed.err)
        assert ran.code == code, ran.err
        if code:
            assert ran.err.count("\n") == 1, ran.err
            assert ran.err.startswith("spherify: ")
        return ran

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder that ten steps on digits gave."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["spherify", "train", *SMALL[:3], "--quiet", "--steps", "10", "--output", str(folder)]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    return folder


# ---------------------------------------------------------------------------------------------- train


def test_a_run_leaves_a_folder_with_everything(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "angles.csv",
        "angles.png",
        "checkpoints",
        "config.json",
        "confusion.png",
        "curves.png",
        "log.csv",
        "model.safetensors",
        "preprocessing.json",
        "recipe.json",
    ]
    assert not [path for path in trained.parent.iterdir() if path.name.startswith(".")]


def test_the_folder_holds_the_converted_model_that_was_trained(trained):
    model = load(trained)
    assert any(isinstance(module, AngularLayer) for module in model.modules())
    assert model.num_classes == 10
    untrained = timm.create_model("test_resnet", num_classes=10)
    assert not torch.equal(model.fc.weight, untrained.fc.weight)
    how = Preprocessing.read(trained)
    assert (how.input_size, how.classes) == ((3, 32, 32), tuple("0123456789"))


def test_the_recipe_is_saved_as_it_was_resolved(trained):
    saved = Recipe.read(trained / "recipe.json")
    assert (saved.steps, saved.img_size, saved.opt) == (10, 32, "adamw")


def test_what_was_chosen_is_said(run):
    ran = run("train", *SMALL, "--lr", "0.001")
    assert "timm:test_resnet on angles (cosine): 0.37 M parameters" in ran.out
    assert "digits: 1442 training and 355 test images of 10 classes, shown as 16x16 pixels in colour" in ran.out
    assert "adamw, lr 0.001, cosine, 2 steps, batch 64, CPU with 1 thread" in ran.out
    assert "Wrote runs/test_resnet-cosine-digits: top-1 " in ran.out
    assert ran.err == ""


def test_the_plain_twin_is_trained_by_the_same_recipe(run):
    run("train", *SMALL, "--operator", "none", "--output", "twin", "--img-size", "40")
    model, source = load_trained("twin")
    assert source.name == "test_resnet"
    assert not any(isinstance(module, AngularLayer) for module in model.modules())
    assert Preprocessing.read("twin").input_size == (3, 40, 40)
    found = json.loads(run("evaluate", "twin", "--data", "digits", "--json").out)
    assert found["images"] == 355


def test_training_goes_on_from_a_folder(run, trained):
    run(
        "train", str(trained), "--data", "digits", "--recipe", "finetune", "--quiet", "--steps", "3", "--output", "more"
    )
    before, after = load(trained), load("more")
    assert after.fc.weight.shape == before.fc.weight.shape
    assert 0 < (after.fc.weight - before.fc.weight).abs().max() < 0.1
    assert Preprocessing.read("more") == Preprocessing.read(trained)


def two_classes(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def test_a_folder_of_ones_own_images_gets_a_classifier_of_its_own(run, trained, tmp_path):
    images = two_classes(tmp_path / "images")
    options = ["--data", images, "--quiet", "--steps", "2", "--batch-size", "4"]
    run("train", trained, *options, "--output", "two", "--resume", "auto")
    assert load("two").num_classes == 2
    assert Preprocessing.read("two").classes == ("cat", "dog")
    assert Preprocessing.read("two").input_size == (3, 32, 32)  # as the folder was trained
    found = json.loads(run("evaluate", "two", "--data", images, "--json").out)
    assert [row["class"] for row in found["per_class"]] == ["cat", "dog"]
    broken = images / "train" / "dog" / "3.png"
    broken.write_bytes(b"no image")
    ran = run("train", "test_resnet", *options, "--steps", "8", "--output", "three", code=1)
    assert f"image {broken} cannot be read" in ran.err


def test_weights_for_other_classes_begin_a_fine_tuning(run):
    torch.manual_seed(0)
    donor = timm.create_model("test_resnet")
    safetensors.torch.save_model(donor, "donor.safetensors")
    options = ["--lr", "1e-9", "--img-size", "32"]
    run("train", *SMALL, "--checkpoint", "donor.safetensors", *options, "--output", "tuned")
    model = load("tuned")
    assert model.num_classes == 10
    assert torch.allclose(model.layer1[0].conv1.weight, donor.layer1[0].conv1.weight, atol=1e-6)


def test_flags_of_conversion_reach_the_model(run):
    run("train", *SMALL, "--operator", "sigmoid", "--k", "0.4", "--exclude", "@stem", "--output", "out")
    model = load("out")
    layers = [module for module in model.modules() if isinstance(module, AngularLayer)]
    assert {layer.operator for layer in layers} == {"sigmoid"}
    assert {layer.k for layer in layers} == {0.4}
    assert not isinstance(model.conv1, AngularLayer)


def test_an_interrupted_run_is_resumed_and_a_run_is_not_written_over(run):
    run("train", *SMALL, "--output", "out")
    ran = run("train", *SMALL, "--output", "out", code=2)
    assert "out holds a run already; go on with --resume auto, or give another --output" in ran.err
    run("train", *SMALL, "--output", "out", "--resume", "auto")
    assert "lr is 0.5 now" in run("train", *SMALL, "--output", "out", "--resume", "auto", "--lr", "0.5", code=2).err


def test_experiments_are_subfolders(run):
    run("train", *SMALL, "--output", "here", "--experiment", "first")
    assert Path("here/first/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "digitz"], 2, "data 'digitz' is unknown"),
        (["--recipe", "slow"], 2, "recipe 'slow' is unknown; choose one of: fast, finetune"),
        (["--lr", "0"], 2, "lr must be above 0"),
        (["--opt", "spheradam"], 2, "optimiser 'spheradam' could not be made"),
        (["--operator", "round"], 2, "'round'"),
        (["--batch-size", "2000"], 2, "1442 training images do not fill one step of 2000"),
        (["--num-classes", "7"], 2, "timm:test_resnet answers for 7 classes and digits has 10"),
        (["--margin-schedule", "warmup"], 2, "without a margin to schedule"),
        (["--log-interval", "0"], 2, "log_interval=0 must be above 0"),
        (["--anneal", "slowly"], 2, "anneal must be one of: none, together, progressive"),
        (["--distill", "0.5"], 2, "distill needs the donor's weights; give --checkpoint FILE or --pretrained"),
        (["--resume", "nowhere"], 2, "nowhere is no checkpoint"),
    ],
)
def test_a_wrong_call_is_one_line(run, arguments, code, message):
    assert message in run("train", *SMALL, "--output", "out", *arguments, code=code).err


def test_options_of_conversion_do_not_go_with_a_folder(run, trained):
    ran = run("train", trained, "--data", "digits", "--operator", "linear", "--output", "out", code=2)
    assert "operator goes with a model's name" in ran.err


def test_a_folder_that_holds_something_else_is_not_written_to(run):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert "mine holds notes.txt; give a new folder" in run("train", *SMALL, "--output", "mine", code=2).err


# ---------------------------------------------------------------------------------------------- evaluate


def test_evaluation_prints_classes_and_sums_and_draws_confusions(run, trained):
    ran = run("evaluate", trained, "--data", "digits", "--confusion", "x.png")
    assert "mostly taken for" in ran.out
    assert "355 images" in ran.out
    assert "top-1 " in ran.out
    assert Path("x.png").stat().st_size > 5000


def test_evaluation_as_json_is_one_object_and_agrees_with_the_log(run, trained):
    ran = run("evaluate", trained, "--data", "digits", "--json", "--batch-size", "50", "--confusion", "x.png")
    found = json.loads(ran.out)
    assert set(found) == {"top1", "top5", "loss", "images", "images_per_second", "per_class"}
    last = (trained / "log.csv").read_text().splitlines()[-1].split(",")
    assert found["top1"] == pytest.approx(float(last[7]), abs=1e-3)
    assert found["loss"] == pytest.approx(float(last[6]), abs=1e-4)
    assert sum(row["images"] for row in found["per_class"]) == found["images"] == 355


def test_the_training_images_can_be_evaluated_too(run, trained):
    found = run("evaluate", trained, "--data", "digits", "--json", "--split", "train", "--confusion", "x.png")
    assert json.loads(found.out)["images"] == 1442


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--data", "digits"], "nothing holds no config.json, so it is not a saved model"),
        (["TRAINED", "--data", "digits", "--split", "half"], "split 'half' is unknown; choose one of: train, test"),
    ],
)
def test_a_wrong_evaluation_is_one_line(run, trained, arguments, message):
    arguments = [trained if argument == "TRAINED" else argument for argument in arguments]
    assert message in run("evaluate", *arguments, code=2).err


def test_other_classes_than_the_models_are_refused(run, trained, tmp_path):
    images = two_classes(tmp_path / "images")
    assert "answers for 10 classes and" in run("evaluate", trained, "--data", images, code=2).err
    np.savez(
        "other.npz",
        train_images=np.zeros((10, 8, 8), np.uint8),
        train_labels=np.arange(10),
        test_images=np.zeros((10, 8, 8), np.uint8),
        test_labels=np.arange(10),
        classes=np.array(list("abcdefghij")),
    )
    assert (
        "was trained on other classes than other.npz has: '0', not 'a'"
        in run("evaluate", trained, "--data", "other.npz", code=2).err
    )


def test_a_run_that_is_not_finished_says_so(run):
    Path("half/checkpoints").mkdir(parents=True)
    assert "holds a run that is not finished" in run("evaluate", "half", "--data", "digits", code=2).err


def test_a_damaged_twin_is_refused(run):
    run("train", *SMALL, "--operator", "none", "--output", "twin")
    content = bytearray(Path("twin/model.safetensors").read_bytes())
    content[-1] ^= 1
    Path("twin/model.safetensors").write_bytes(content)
    assert "is damaged: its contents are not those saved" in run("evaluate", "twin", "--data", "digits", code=1).err
    Path("twin/plain.json").write_text("{")
    assert "twin is damaged" in run("evaluate", "twin", "--data", "digits", code=1).err
