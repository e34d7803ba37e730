"""What one sees: a bar on a terminal, plain lines elsewhere; the log as a file; TensorBoard where asked for."""

import csv
import io
import sys

import pytest
from training_samples import batches, net, recipe

from spherify.errors import FileError, SpherifyError
from spherify.train.conduct import Conduct
from spherify.train.display import Bar, Lines, Silence, clock, display_for, in_words
from spherify.train.fit import fit
from spherify.train.history import COLUMNS, History

ROW = {"step": 6, "epoch": 1.0, "lr": 0.05, "train_loss": 1.25, "train_top1": 50.0, "test_loss": 0.5, "test_top1": 75.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_pipe_lines():
    assert isinstance(display_for(10, 0, stream=Terminal()), Bar)
    assert isinstance(display_for(10, 0, stream=io.StringIO()), Lines)
    assert type(display_for(10, 0, quiet=True)) is Silence


def test_a_row_in_words_has_what_was_measured():
    assert (
        in_words(ROW)
        == "epoch 1  step 6  train loss 1.2500  train 50.00 %  test loss 0.5000  test 75.00 %  lr 5.00e-02"
    )


def test_lines_are_plain_and_not_too_many():
    stream = io.StringIO()
    with display_for(10, 0, stream=stream) as display:
        for step in range(1, 11):
            display.step(step, 1.0, 0.1, 100.0)
        display.row({**ROW, "test_loss": None})
        display.row(ROW)
    assert stream.getvalue() == in_words(ROW) + "\n"


def test_a_line_comes_after_ten_seconds():
    stream = io.StringIO()
    with display_for(10, 0, stream=stream) as display:
        display.start -= 20
        display.shown -= 20
        display.step(5, 1.0, 0.1, 100.0)
    assert stream.getvalue() == "step 5/10  loss 1.0000  lr 1.00e-01  100 images/s  0:20 left\n"


def test_the_bar_shows_loss_rate_speed_and_time_left():
    stream = Terminal()
    with display_for(10, 2, stream=stream) as display:
        display.step(5, 1.5, 0.1, 100.0)
        display.row(ROW)
        display.progress.refresh()
    text = stream.getvalue()
    for part in ("5/10", "loss 1.5000", "lr 1.00e-01", "100 images/s", "left", "test 75.00 %"):
        assert part in text


def test_times_are_written_as_clocks_show_them():
    assert [clock(5), clock(65), clock(3700)] == ["0:05", "1:05", "1:01:40"]


def rows_of(folder) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_is_a_table_with_a_column_for_everything(tmp_path):
    done = fit(net(), (batches(), batches(2)), recipe(), output=tmp_path, conduct=Conduct(log_interval=2, quiet=True))
    rows = rows_of(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [row["test_top1"] == "" for row in rows] == [True, True, False, True, True, False]
    assert float(rows[-1]["train_loss"]) == pytest.approx(done.rows[-1]["train_loss"], rel=1e-6)


def test_a_run_prints_its_tests(tmp_path, capsys):
    fit(net(), (batches(), batches(2)), recipe())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["epoch 1", "step 6"], ["epoch 2", "step 12"]]


def test_a_quiet_run_prints_nothing(capsys):
    fit(net(), (batches(), batches(2)), recipe(), conduct=Conduct(quiet=True))
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    conduct = Conduct(log_interval=2, quiet=True, tensorboard=True)
    fit(net(), (batches(), batches(2)), recipe(), output=tmp_path, conduct=conduct)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [2, 4, 6, 8, 10, 12]
    assert [event.value for event in events.Scalars("test_top1")] == pytest.approx(
        [float(row["test_top1"]) for row in rows_of(tmp_path) if row["test_top1"]], rel=1e-5
    )


def test_tensorboard_that_is_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SpherifyError, match=r"pip install 'spherify\[tensorboard\]'"):
        History(tmp_path, tensorboard=True)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(FileError, match=r"log\.csv could not be written \(Is a directory\)"):
        History(tmp_path)
