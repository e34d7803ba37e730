"""Recipes: what stands in the table, what replaces it, and what is refused."""

import json

import pytest
from training_samples import net, recipe

from spherify.cli.recipe_flags import KINDS
from spherify.errors import FileError, OptionError
from spherify.train.optimizer import optimizer_for, scheduler_for
from spherify.train.recipe import RECIPES, Recipe, resolved


def rate_at(name: str, step: int) -> float:
    chosen = RECIPES[name][1]
    optimizer = optimizer_for(net(), chosen)
    scheduler = scheduler_for(optimizer, chosen, updates=100, total=chosen.steps)
    scheduler.step_update(step)
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("name", "falls", "first"), [("paper-cifar", (34_000, 54_000), 1e-3), ("paper-imagenet", (200_000, 375_000), 0.1)]
)
def test_the_papers_rates_fall_by_ten_where_the_paper_says(name, falls, first):
    for number, place in enumerate(falls):
        assert rate_at(name, place - 1) == pytest.approx(first / 10**number)
        assert rate_at(name, place) == pytest.approx(first / 10 ** (number + 1))


def test_the_papers_recipes_are_the_papers():
    cifar, imagenet = RECIPES["paper-cifar"][1], RECIPES["paper-imagenet"][1]
    assert (cifar.opt, cifar.lr, cifar.steps, cifar.batch_size) == ("adam", 1e-3, 64_000, 128)
    assert (imagenet.opt, imagenet.momentum, imagenet.lr, imagenet.steps) == ("momentum", 0.9, 0.1, 550_000)


def test_every_value_can_be_replaced():
    for name in Recipe.__dataclass_fields__:
        if name in ("epochs", "steps"):
            continue
        before = getattr(RECIPES["fast"][1], name)
        other = {int: 4, float: 0.5, bool: not before, str: "rrc" if name == "train_crop_mode" else "float16"}
        value = (0.5, 0.9) if isinstance(before, tuple) else other.get(type(before), 1)
        if name in ("opt", "sched", "remode", "mixup_mode", "margin_schedule"):
            value = "other"
        if name == "anneal":
            value = "progressive"
        if name == "aa":
            value = "rand-m9"
        assert getattr(resolved("fast", **{name: value}), name) == value


def test_epochs_take_the_place_of_steps_and_the_other_way_round():
    assert (resolved("paper-cifar", epochs=3).epochs, resolved("paper-cifar", epochs=3).steps) == (3, None)
    assert (resolved("fast", steps=7).epochs, resolved("fast", steps=7).steps) == (None, 7)
    with pytest.raises(OptionError, match="give epochs or steps, and not both"):
        resolved("fast", steps=7, epochs=2)


def test_a_shortened_recipe_keeps_its_shape():
    short = resolved("paper-cifar", steps=64)
    optimizer = optimizer_for(net(), short)
    scheduler = scheduler_for(optimizer, short, updates=10, total=64)
    rates = []
    for step in (33, 34, 54):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5])


def test_a_recipe_is_saved_and_read_again(tmp_path):
    chosen = resolved("finetune", lr=0.125, decay_milestones=[0.5, 3])
    chosen.write(tmp_path / "mine.json")
    assert Recipe.read(tmp_path / "mine.json") == chosen
    assert resolved(tmp_path / "mine.json", lr=1.0).lr == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=0), "lr must be above 0"),
        (dict(lr=float("nan")), "lr must be above 0"),
        (dict(batch_size=-1), "batch_size must be above 0"),
        (dict(mixup=-0.1), "mixup must be 0 or above"),
        (dict(reprob=1.5), "reprob must be from 0 to 1"),
        (dict(hflip=2.0), "hflip must be from 0 to 1"),
        (dict(amp_dtype="int8"), "amp_dtype must be one of: bfloat16, float16"),
        (dict(train_crop_mode="round"), "train_crop_mode must be one of: rrc, rkrc, rkrr, pad, none"),
        (dict(crop_scale=(0.9, 0.1)), "crop_scale must be two rising shares"),
        (dict(decay_milestones=(-1.0,)), "decay_milestones must be above 0"),
        (dict(mixup=0.2, batch_size=3), "mixup and cutmix need an even batch_size"),
        (dict(lr=0, seed=-1), "lr must be above 0; seed must be 0 or above"),
        (dict(learning_rate=1), "recipe has no value 'learning_rate'"),
        (dict(warmup_epoch=1), "recipe has no value 'warmup_epoch'; close are warmup_epochs"),
    ],
)
def test_values_out_of_range_are_refused_all_at_once(changes, message):
    with pytest.raises(OptionError, match=message):
        resolved("fast", **changes)


def test_an_unknown_recipe_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(OptionError, match="recipe 'slow' is unknown; choose one of: fast, finetune, paper-cifar"):
        resolved("slow")
    with pytest.raises(OptionError, match=r"recipe .*none\.json is no file"):
        resolved(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["{", "[1]", json.dumps({"epochs": "many"})])
def test_a_file_that_is_no_recipe_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FileError, match=r"x\.json is no recipe"):
        resolved(tmp_path / "x.json")


def test_there_is_a_flag_for_every_value_and_no_other():
    assert set(KINDS) == set(Recipe.__dataclass_fields__)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(opt="spheradam"), "optimiser 'spheradam' could not be made"),
        (dict(layer_decay=0.7), "layer_decay needs a model of timm that knows its stages; Sequential does not"),
    ],
)
def test_an_optimiser_that_cannot_be_made_is_refused(changes, message):
    with pytest.raises(OptionError, match=message):
        optimizer_for(net(), recipe(**changes))


@pytest.mark.parametrize(
    ("name", "message"), [("plateau", "waits for test results"), ("zigzag", "schedule 'zigzag' (is unknown|could not)")]
)
def test_a_schedule_that_cannot_be_made_is_refused(name, message):
    optimizer = optimizer_for(net(), recipe())
    with pytest.raises(OptionError, match=message):
        scheduler_for(optimizer, recipe(sched=name), 10, 100)


def test_the_rate_warms_up_and_ends_at_nothing():
    chosen = resolved("fast", epochs=4, lr=1.0, warmup_epochs=1, warmup_lr=0.1)
    optimizer = optimizer_for(net(), chosen)
    scheduler = scheduler_for(optimizer, chosen, updates=10, total=40)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, 41):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) < 1.0 + 1e-9
    assert rates[40] == pytest.approx(0.0)
