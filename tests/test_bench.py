"""Benchmarks: turns, ratios, peaks, and what the command prints."""

import dataclasses
import functools
import json

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from benchmarks import peers, speed
from spherify import ModelError, OptionError
from spherify.bench.compare import Settings, compare, images_for, machine, measure
from spherify.bench.memory import highest_rise, peak_bytes
from spherify.bench.timing import Timing, interleaved
from spherify.layers import SphereConv2d


def test_steps_take_turns_and_none_is_always_first():
    order = []
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_a_timing_knows_its_median_spread_and_paired_ratio():
    slow, fast = Timing((3.0, 6.0, 90.0)), Timing((1.0, 2.0, 45.0))
    assert slow.median == 6.0
    assert slow.least == 3.0
    assert slow.spread == (4.5, 48.0)
    assert slow.ratio_to(fast) == 3.0  # of 3, 3, 2: one disturbed round does not tell
    assert slow.ratio_of_least(fast) == 3.0
    assert Timing((2.0,)).spread == (2.0, 2.0)


def test_the_peak_of_a_step_is_what_it_adds_at_its_highest():
    x = torch.ones(1000)
    peak = peak_bytes(lambda: (x + 1) * (x + 2))
    assert peak == 3 * 4000  # two summands and their product


def test_a_rise_starts_at_the_lowest_point_before():
    assert highest_rise([10, -5, 7]) == 12
    assert highest_rise([-20, 30, -30]) == 30
    assert highest_rise([]) == 0


def test_every_compiled_form_is_compiled_for_its_own_size(monkeypatch):
    counter = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    names = ["plain", *map(str, range(9))]  # torch keeps 8 by itself
    forms = {name: nn.Sequential(nn.Linear(4, 4 + number)) for number, name in enumerate(names)}
    for size in (2, 3):
        measure("infer", forms, torch.randn(size, 4), Settings(compiled=True, repeats=2, warmup=0))
    assert counter.frame_count == 20


def test_every_form_is_measured_in_both_phases():
    rows = compare("test_resnet", Settings(batch=2, size=32, repeats=1, warmup=0, threads=1), operator="linear")
    assert [(row.phase, row.form) for row in rows] == [
        ("train", "plain"),
        ("train", "converted"),
        ("infer", "plain"),
        ("infer", "converted"),
        ("infer", "plain folded"),
        ("infer", "converted folded"),
    ]
    for row in rows:
        assert row.timing.least > 0
        assert row.images_per_second == pytest.approx(2 / row.timing.median)
        assert row.bytes > 0
        assert (row.ratio == row.memory_ratio == 1.0) or not row.form.startswith("plain")
        json.dumps(row.to_dict())


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(OptionError, match="dtype 'float8' is unknown; choose one of: float32, bfloat16, float16"):
        Settings(dtype="float8")
    with pytest.raises(OptionError, match="device 'tpu' is unknown; choose one of: cpu, cuda"):
        Settings(device="tpu")
    with pytest.raises(OptionError, match="batch=0: give a number from 1 on"):
        Settings(batch=0)
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="torch sees no GPU here"):
            Settings(device="cuda")


def test_a_size_that_the_model_cannot_take_is_said():
    with pytest.raises(ModelError, match=r"cannot be measured .*; try another --size"):
        images_for(nn.Sequential(nn.Conv2d(3, 4, 9)), Settings(size=4))


def test_the_machine_is_named():
    assert {"processor", "threads", "gpu", "torch"} <= machine().keys()


@pytest.mark.parametrize("window", [dict(), dict(stride=2, padding=1), dict(padding=1, groups=2)], ids=str)
def test_the_authors_formula_is_our_cosine(window):
    conv, x = nn.Conv2d(4, 6, 3, bias=False, **window), torch.randn(2, 4, 9, 9)
    rival = peers.as_peer(nn.Sequential(conv), "authors")
    torch.testing.assert_close(rival(x), SphereConv2d.from_conv(conv)(x), rtol=1e-4, atol=1e-5)


def test_the_patches_cut_out_are_our_cosine():
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), torch.randn(2, 4, 9, 8)
    rival = peers.as_peer(nn.Sequential(conv), "im2col")
    torch.testing.assert_close(rival(x), SphereConv2d.from_conv(conv)(x), rtol=1e-4, atol=1e-5)


def test_b_cos_is_the_length_times_the_square_of_the_cosine():
    conv, x = nn.Conv2d(4, 6, 3, bias=False), torch.randn(2, 4, 9, 9)
    cosine = SphereConv2d.from_conv(conv)(x)
    length = torch.nn.functional.conv2d(x * x, torch.ones(1, 4, 3, 3)).sqrt()
    rival = peers.as_peer(nn.Sequential(conv), "b-cos")
    torch.testing.assert_close(rival(x), length * cosine * cosine.abs(), rtol=1e-3, atol=1e-3)


def test_the_suite_writes_its_results_and_the_page(tmp_path, monkeypatch):
    settings = Settings(batch=2, size=32, repeats=1, warmup=0, threads=1)
    case = speed.Case("cnn9", ("cosine",), ("authors",), settings)
    monkeypatch.setattr(speed, "cases", lambda *_: [case])
    out = tmp_path / "speed-test.json"
    speed.measure("cpu", 1, 1.0, ["cnn9"], out)
    found = json.loads(out.read_text())
    assert found["left_out"] == []
    assert found["machine"]["torch"] == torch.__version__
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n{speed.BEGIN}\nstale\n{speed.END}\nafter\n")
    monkeypatch.setattr(speed, "plot", lambda paths, out: None)
    speed.report([out], page)
    text = page.read_text()
    assert "| cnn9, 2 x 32 px | cosine |" in text
    assert "stale" not in text
    assert text.endswith("after\n")


def test_a_second_run_of_the_suite_can_add_to_the_first(tmp_path, monkeypatch):
    settings = Settings(batch=2, size=32, repeats=1, warmup=0, threads=1)
    first = speed.Case("cnn9", ("cosine",), (), settings, ("infer",))
    out = tmp_path / "speed-test.json"
    monkeypatch.setattr(speed, "cases", lambda *_: [first])
    speed.measure("cpu", 1, 1.0, ["cnn9"], out)
    monkeypatch.setattr(speed, "cases", lambda *_: [first, dataclasses.replace(first, operators=("linear",))])
    speed.measure("cpu", 1, 1.0, ["cnn9"], out, adds=True)
    found = [{row["form"] for row in case["rows"]} for case in json.loads(out.read_text())["cases"]]
    assert len(found) == 2  # the first was measured again
    assert ["cosine" in forms for forms in found] == [True, False]
    monkeypatch.setattr(speed, "cases", lambda *_: [dataclasses.replace(first, operators=("linear", "sigmoid"))])
    speed.measure("cpu", 1, 1.0, ["cnn9"], out, adds=True)
    found = [{row["form"] for row in case["rows"]} for case in json.loads(out.read_text())["cases"]]
    assert [forms & {"cosine", "linear", "sigmoid"} for forms in found] == [{"cosine"}, {"linear", "sigmoid"}]
