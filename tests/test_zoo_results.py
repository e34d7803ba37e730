"""The sweep's table: equal results give equal text, and what changed is said."""

import sys

import pytest

from benchmarks.zoo import __main__ as sweep
from benchmarks.zoo.page import page, short_table
from benchmarks.zoo.results import as_csv, differences, read_table, rows, totals
from benchmarks.zoo.worker import examine
from spherify.models import zoo


@pytest.fixture
def results():
    found = {name: examine(name) for name in ("timm:test_resnet", "torchvision:quantized_resnet18")}
    failed = {"model": "timm:broken", "family": "timm broken", "outcome": "failed", "message": "it fell"}
    return {**found, "timm:broken": failed}


def test_a_table_read_again_does_not_differ_from_its_results(results, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(as_csv(rows(results)))
    assert differences(read_table(path), rows(results)) == []


def test_times_do_not_count_as_differences(results, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(as_csv(rows(results)))
    results["timm:test_resnet"]["seconds"] += 1
    assert differences(read_table(path), rows(results)) == []


def test_what_changed_is_said_with_both_values(results, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(as_csv(rows(results)))
    was = results["timm:test_resnet"]["converted"]
    results["timm:test_resnet"]["converted"] = was - 1
    results["timm:new"] = {**results["timm:test_resnet"], "model": "timm:new"}
    assert differences(read_table(path), rows(results)) == [
        "timm:new: not in the table",
        f"timm:test_resnet: converted was '{was}', is '{was - 1}'",
    ]


def test_totals_count_failures_and_sites_without_an_action(results):
    results["timm:test_resnet"]["sites"] += 2
    text = totals(results)
    assert text.startswith("models 3, failed 1, converted 1, refused 1\n")
    assert "silently unaccounted 2" in text


def test_the_page_names_what_is_refused_and_sums_the_families(results):
    text = page(rows(results), "timm 9", "models 3")
    assert "- `torchvision:quantized_resnet18`: refused: " in text
    assert "- `timm:broken`: failed: it fell" in text
    row = results["timm:test_resnet"]
    assert f"| {row['family']} | 1 | {row['sites']} | {row['converted']} |" in text


def test_the_short_table_is_what_list_models_reads(results, tmp_path, monkeypatch):
    path = tmp_path / "zoo.csv"
    path.write_text(short_table(rows(results), "timm 9"))
    monkeypatch.setattr(zoo, "TABLE", path)
    row = results["timm:test_resnet"]
    read = zoo.zoo.__wrapped__()
    assert list(read) == ["timm:test_resnet"]
    assert (read["timm:test_resnet"].layers, read["timm:test_resnet"].converted) == (row["sites"], row["converted"])
    assert zoo.zoo_versions.__wrapped__() == "timm 9"


def test_the_sweep_runs_restarts_and_compares(tmp_path, monkeypatch, capsys):
    log = tmp_path / "sweep.jsonl"
    monkeypatch.setattr(sweep, "TABLE", tmp_path / "table.csv")
    command = ["zoo", "--models", "timm:test_resnet", "--workers", "1", "--log", str(log)]
    monkeypatch.setattr(sys, "argv", command)
    assert sweep.main() == 1  # the table does not have it
    assert "models 1, failed 0, converted 1" in capsys.readouterr().out
    first = log.read_text()
    (tmp_path / "table.csv").write_text(as_csv(rows(sweep.read(log))))
    assert sweep.main() == 0
    assert log.read_text() == first  # nothing was examined again
    assert "0 of 1 models differ" in capsys.readouterr().out


def test_pages_of_a_part_of_the_zoo_are_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["zoo", "--models", "timm:test_*", "--write"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "--write is for the whole zoo" in capsys.readouterr().err
