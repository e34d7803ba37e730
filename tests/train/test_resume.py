"""Nothing is lost: checkpoints whole or not there, and a resumed run that ends as if nothing had happened."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_samples import QUIET, angular_net, are_equal, batches, data_set, net, recipe, weights

from spherify.data.preprocess import Preprocessing
from spherify.errors import FileError, OptionError, SpherifyError
from spherify.train import checkpoint as checkpoints
from spherify.train.checkpoint import newest_checkpoint, steps_in
from spherify.train.conduct import Conduct
from spherify.train.fit import fit
from spherify.train.health import NotFiniteError
from spherify.train.loaders import loaders_for

HOW = Preprocessing(input_size=(1, 8, 8), mean=(0.2,), std=(0.2,))
FULL = dict(  # everything that has a state
    epochs=3,
    opt="adamw",
    lr=1e-2,
    sched="cosine",
    warmup_epochs=1,
    no_aug=False,
    train_crop_mode="pad",
    reprob=0.3,
    mixup=0.3,
    model_ema=True,
    model_ema_decay=0.9,
    smoothing=0.1,
)


class Stop(Exception):
    """Stands for a power cut."""


def run(output=None, resume=None, stop_at: int | None = None, conduct: Conduct | None = None, **changes):
    """A run of everything that has a state; the whole of it, or until it is cut off."""
    chosen = recipe(**(FULL | changes))
    model = angular_net("learnable", dropout=0.2)

    def cut(step: int, total: int) -> None:
        if step == stop_at:
            raise Stop

    loaders = loaders_for(HOW, data_set(), chosen)
    conduct = conduct or Conduct(quiet=True, log_interval=2, checkpoint_steps=2)
    return fit(model, loaders, chosen, output=output, resume=resume, on_step=[cut], conduct=conduct)


@pytest.mark.parametrize("stop_at", [1, 5, 6, 13])  # before any checkpoint; in an epoch; at its end; in the last
def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path, stop_at):
    whole = run()
    with pytest.raises(Stop):
        run(tmp_path, stop_at=stop_at)
    resumed = run(tmp_path, resume="auto")
    assert are_equal(weights(resumed.model), weights(whole.model))
    columns = ("step", "epoch", "lr", "train_loss", "test_loss", "test_top1", "average_top1")
    assert [[row[name] for name in columns] for row in resumed.rows] == [
        [row[name] for name in columns] for row in whole.rows
    ]


def test_it_can_be_cut_off_again_and_again(tmp_path):
    for stop_at in (3, 4, 9, 16):
        with pytest.raises(Stop):
            run(tmp_path, resume="auto", stop_at=stop_at)
    assert are_equal(weights(run(tmp_path, resume="auto").model), weights(run().model))


def test_margin_state_goes_on_too(tmp_path):
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def step(self) -> None:
            self.steps += 1

        def forward(self, outputs, targets):
            return torch.nn.functional.cross_entropy(outputs, targets)

    first, second = Counting(), Counting()
    conduct = Conduct(quiet=True, checkpoint_steps=5)

    def cut(step: int, total: int) -> None:
        if step == 7:
            raise Stop

    with pytest.raises(Stop):
        fit(net(), (batches(), None), recipe(), output=tmp_path, objective=first, on_step=[cut], conduct=conduct)
    fit(net(), (batches(), None), recipe(), output=tmp_path, resume="auto", objective=second, conduct=conduct)
    assert int(second.steps) == 12


def test_a_loader_of_ones_own_is_run_through_to_where_it_was(tmp_path):
    whole = net()
    fit(whole, (batches(), None), recipe(), conduct=QUIET)

    def cut(step: int, total: int) -> None:
        if step == 8:
            raise Stop

    conduct = Conduct(quiet=True, checkpoint_steps=3)
    with pytest.raises(Stop):
        fit(net(), (batches(), None), recipe(), output=tmp_path, on_step=[cut], conduct=conduct)
    model = net(seed=9)
    fit(model, (batches(), None), recipe(), output=tmp_path, resume="auto", conduct=conduct)
    assert are_equal(weights(model), weights(whole))


def test_a_checkpoint_holds_weights_as_safetensors_and_nothing_that_runs_code(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, stop_at=5)
    newest = steps_in(tmp_path / "checkpoints")[0]
    assert sorted(entry.name for entry in newest.iterdir()) == [
        "average.safetensors",
        "manifest.json",
        "model.safetensors",
        "state.pt",
    ]
    assert "0.weight" in safetensors.torch.load_file(newest / "model.safetensors")
    state = torch.load(newest / "state.pt", weights_only=True)
    assert set(state) >= {"optimizer", "scheduler", "scaler", "objective", "random", "tested", "recipe", "rows"}
    assert json.loads((newest / "manifest.json").read_text())["step"] == 4


def test_two_checkpoints_are_kept(tmp_path):
    run(tmp_path)
    assert [path.name for path in steps_in(tmp_path / "checkpoints")] == ["step-000000018", "step-000000016"]


def test_the_clock_writes_checkpoints_too(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, stop_at=4, conduct=Conduct(quiet=True, checkpoint_minutes=1e-9))
    assert newest_checkpoint(tmp_path)[0].step == 4


def test_a_run_is_not_written_over(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(OptionError, match=r"holds a run already; go on with --resume auto, or give another --output"):
        run(tmp_path, epochs=1)


def test_a_whole_run_that_is_resumed_is_tested_again_and_left_as_it_is(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, resume="auto")
    assert again.evaluation.top1 == first.evaluation.top1
    assert are_equal(weights(again.model), weights(first.model))


def test_another_recipe_is_not_resumed(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(OptionError, match=r"lr is 0\.5 now and was 0\.01 when the run began; resume with the recipe"):
        run(tmp_path, resume="auto", epochs=1, lr=0.5)


def test_another_model_is_not_resumed(tmp_path):
    fit(net(), (batches(), None), recipe(), output=tmp_path, conduct=QUIET)
    with pytest.raises(FileError, match="the checkpoint of step 12 does not fit this model"):
        fit(net(norm=True), (batches(), None), recipe(), output=tmp_path, resume="auto", conduct=QUIET)


def test_another_number_of_images_is_not_resumed(tmp_path):
    fit(net(), (batches(), None), recipe(), output=tmp_path, conduct=QUIET)
    with pytest.raises(OptionError, match="an epoch has 5 steps now and had 6 before"):
        fit(net(), (batches(5), None), recipe(), output=tmp_path, resume="auto", conduct=QUIET)


def test_a_path_can_be_resumed(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path / "one", stop_at=9)
    place = tmp_path / "one"
    for number, path in enumerate((place, steps_in(place / "checkpoints")[1])):
        resumed = run(tmp_path / f"two{number}", resume=path)
        assert are_equal(weights(resumed.model), weights(run().model))
    with pytest.raises(OptionError, match="is no checkpoint"):
        run(tmp_path / "three", resume=tmp_path / "nothing")
    with pytest.raises(OptionError, match="resume='auto' needs the output folder"):
        run(None, resume="auto")


# ---------------------------------------------------------------------------------------------- damage


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "short": lambda at: cut_short(at / "state.pt"),
    "byte": lambda at: change_a_byte(at / "model.safetensors"),
    "missing": lambda at: (at / "average.safetensors").unlink(),
    "manifest": lambda at: (at / "manifest.json").write_text("{"),
    "no manifest": lambda at: (at / "manifest.json").unlink(),
    "newer": lambda at: (at / "manifest.json").write_text('{"format_version": 99, "step": 1, "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_that_is_said(tmp_path, damage, capsys):
    whole = weights(run().model)
    with pytest.raises(Stop):
        run(tmp_path, stop_at=9)
    DAMAGES[damage](tmp_path / "checkpoints" / "step-000000008")
    resumed = run(tmp_path, resume="auto", conduct=Conduct(log_interval=2, checkpoint_steps=2))
    said = capsys.readouterr().err
    assert "step-000000008 is damaged" in said
    assert "going back to the one before" in said
    assert "Going on from step 6 of 18." in said
    assert are_equal(weights(resumed.model), whole)


def test_where_every_checkpoint_is_damaged_the_run_says_so(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, stop_at=9)
    for path in steps_in(tmp_path / "checkpoints"):
        change_a_byte(path / "state.pt")
    with pytest.raises(SpherifyError, match=r"no checkpoint in .* is whole; begin again in another --output") as raised:
        run(tmp_path, resume="auto")
    assert "\n" not in str(raised.value)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    write = torch.save

    def full(content, path):
        if "step-000000006" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(content, path)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(FileError, match=r"step-000000006 could not be written \(No space left on device\)"):
        run(tmp_path)
    monkeypatch.setattr(checkpoints.torch, "save", write)
    assert [path.name for path in steps_in(tmp_path / "checkpoints")] == ["step-000000004", "step-000000002"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert are_equal(weights(run(tmp_path, resume="auto").model), weights(run().model))


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    place = tmp_path / "checkpoints"
    half = place / f".step-000000002.new-{2**22 - 1}-0123abcd"  # no process has the highest number
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    run(tmp_path, resume="auto", epochs=1)
    assert not half.exists()


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_writes_and_ends(tmp_path, number, capsys):
    model = net(dropout=0.1)
    chosen = recipe(epochs=3)

    def interrupt(step: int, total: int) -> None:
        if step == 7:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    loaders = loaders_for(HOW, data_set(), chosen)
    done = fit(model, loaders, chosen, output=tmp_path, on_step=[interrupt], conduct=Conduct(checkpoint_minutes=99))
    assert done.stopped_by == signal.Signals(number).name
    assert done.step == 8
    assert newest_checkpoint(tmp_path)[0].step == 8
    assert f"Stopped by {signal.Signals(number).name} after step 8 of 18; go on with --resume auto" in (
        capsys.readouterr().err
    )
    assert signal.getsignal(number) is before
    resumed = fit(net(dropout=0.1), loaders, chosen, output=tmp_path, resume="auto", conduct=QUIET)
    whole = fit(net(dropout=0.1), loaders, chosen, conduct=QUIET)
    assert are_equal(weights(resumed.model), weights(whole.model))


def test_a_signal_at_the_end_of_an_epoch_leaves_the_test_for_later(tmp_path):
    chosen = recipe(epochs=2)
    loaders = loaders_for(HOW, data_set(), chosen)

    def interrupt(step: int, total: int) -> None:
        if step == 5:  # the last one of the first epoch
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = fit(net(), loaders, chosen, output=tmp_path, on_step=[interrupt], conduct=QUIET)
    assert stopped.step == 6
    assert not [row for row in stopped.rows if row["test_loss"] is not None]
    resumed = fit(net(), loaders, chosen, output=tmp_path, resume="auto", conduct=QUIET)
    assert [row["step"] for row in resumed.rows if row["test_loss"] is not None] == [6, 12]


def test_a_second_interrupt_does_not_wait(tmp_path):
    def interrupt(step: int, total: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(net(), (batches(), None), recipe(), output=tmp_path, on_step=[interrupt], conduct=QUIET)


# ---------------------------------------------------------------------------------------------- not finite


def test_a_loss_that_is_no_number_names_the_layer_and_keeps_the_last_checkpoint(tmp_path):
    model = net()

    def poison(step: int, total: int) -> None:
        if step == 5:
            with torch.no_grad():
                model[3].weight[0, 0, 0, 0] = float("inf")

    conduct = Conduct(quiet=True, checkpoint_steps=2)
    with pytest.raises(NotFiniteError) as raised:
        fit(model, (batches(), None), recipe(), output=tmp_path, on_step=[poison], conduct=conduct)
    text = str(raised.value)
    assert (
        "at step 5: 3 (Conv2d, whose weight is not finite) is the first layer with an output that is not finite" in text
    )
    assert f"the last good checkpoint in {tmp_path} is kept" in text
    found, _ = newest_checkpoint(tmp_path)
    assert found.step == 4
    assert all(torch.isfinite(value).all() for value in found.weights.values())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = net()

    def poison(step: int, total: int) -> None:
        if step == 3:
            model[0].bias.data[0] = float("nan")  # the loss of this step is found out, unless nothing reads it

    class Blind(torch.nn.Module):
        def forward(self, outputs, targets):
            return model[7].weight.square().sum()

    conduct = Conduct(quiet=True, checkpoint_steps=2)
    with pytest.raises(NotFiniteError, match="weights are not finite at step 4; the last good checkpoint"):
        fit(model, (batches(), None), recipe(), output=tmp_path, objective=Blind(), on_step=[poison], conduct=conduct)
    assert newest_checkpoint(tmp_path)[0].step == 2


def test_inputs_that_are_not_finite_are_named():
    x, y = batches(1)[0]
    with pytest.raises(NotFiniteError, match="the loss is nan at step 0: the inputs themselves is the first"):
        fit(net(), ([(x / 0, y)], None), recipe(), conduct=QUIET)
