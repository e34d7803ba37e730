"""The table: one row a layer, long runs folded, and never a range that lies."""

import pytest
from networks import hollow
from torch import nn

from spherify.convert import plan
from spherify.graph.site import Site
from spherify.plan.options import Options
from spherify.plan.plan import draft
from spherify.plan.table import rows, with_ranges
from spherify.rewrite.swaps import SWAPS


def plan_of(*names, shapes=None, options=None, roles=None):
    sites = [
        Site(
            name=name,
            aliases=(),
            source_type=nn.Linear,
            kind="linear",
            shape=(shapes or {}).get(name, (4, 6)),
            fan_in=6,
            groups=1,
            has_bias=True,
            calls_eval=1,
            calls_train=1,
            roles=frozenset((roles or {}).get(name, ())),
        )
        for name in names
    ]
    return draft(sites, options or Options(), model="x", converts=SWAPS.converts)


def names(report):
    return [f"{row.name} ({row.count})" for row in rows(report)]


BLOCKS = [f"blocks.{index}.fc" for index in range(6)]


def test_a_transformer_is_folded():
    text = str(plan(hollow("vit_tiny_patch16_224")))
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert f"blocks.{{0-11}}.{part} (12)" in text
    assert len(text.splitlines()) == 8  # head, stem, 4 folded, classifier, summary


def test_a_folded_row_stands_where_its_first_layer_stands():
    report = plan_of("stem", *(name for index in range(5) for name in (f"b.{index}.x", f"b.{index}.y")), "head")
    assert names(report) == ["stem (1)", "b.{0-4}.x (5)", "b.{0-4}.y (5)", "head (1)"]


def test_four_rows_are_not_folded_and_five_are():
    assert names(plan_of(*BLOCKS[:4])) == [f"{name} (1)" for name in BLOCKS[:4]]
    assert names(plan_of(*BLOCKS[:5])) == ["blocks.{0-4}.fc (5)"]


def test_numbers_with_gaps_are_listed():
    assert names(plan_of(*BLOCKS[:2], *BLOCKS[3:])) == ["blocks.{0,1,3,4,5}.fc (5)"]


def test_two_ranges_that_are_filled_are_folded():
    grid = [f"s.{stage}.b.{block}" for stage in range(2) for block in range(3)]
    assert names(plan_of(*grid)) == ["s.{0-1}.b.{0-2} (6)"]


def test_two_ranges_that_are_not_filled_are_not_folded():
    ragged = [f"s.{stage}.b.{block}" for stage, depth in ((0, 2), (1, 4)) for block in range(depth)]
    assert names(plan_of(*ragged)) == [f"{name} (1)" for name in ragged]


@pytest.mark.parametrize("difference", ["shape", "action", "role"])
def test_layers_that_differ_in_more_than_numbers_are_not_folded_together(difference):
    changes = {
        "shape": dict(shapes={BLOCKS[2]: (8, 6)}),
        "action": dict(options=Options(exclude=BLOCKS[2])),
        "role": dict(roles={BLOCKS[2]: ["@stem"]}),
    }[difference]
    assert names(plan_of(*BLOCKS, **changes)) == ["blocks.{0,1,3,4,5}.fc (5)", "blocks.2.fc (1)"]


def test_every_layer_is_counted_once():
    for model in ("resnet18", "test_vit", "mobilenetv3_small_050"):
        report = plan(hollow(model))
        assert sum(row.count for row in rows(report)) == len(report.decisions)


def test_the_shape_is_that_of_the_weight():
    assert rows(plan(nn.Conv2d(3, 4, (3, 5))))[0].shape == "4x3x3x5"


def test_the_model_itself_has_a_name():
    assert names(plan(nn.Conv2d(3, 4, 3))) == ["(the model) (1)"]


def test_ranges_in_reasons_follow_those_in_names():
    reasons = [f"BatchNorm blocks.{index}.bn2 follows" for index in range(3)]
    assert with_ranges(reasons) == "BatchNorm blocks.{0-2}.bn2 follows"
