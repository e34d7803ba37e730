"""The margin's schedule: the formula, its presets, its warm-up."""

import pytest
import torch

from spherify.errors import OptionError
from spherify.heads.schedule import SCHEDULES, MarginSchedule, schedule_named


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [0, 1, 10, 1000, 50000])
def test_lambda_is_the_formula(name, step):
    schedule = SCHEDULES[name]
    expected = max(schedule.lambda_min, schedule.base * (1 + schedule.gamma * step) ** -schedule.power)
    assert schedule.lambda_at(step).item() == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_the_presets_end_where_the_authors_say():
    assert SCHEDULES["sphereface"].lambda_at(28000).item() == 5.0  # their training has 28,000 steps
    assert SCHEDULES["sphereface"].lambda_at(0).item() == 1000.0
    assert SCHEDULES["l-softmax"].lambda_at(20000).item() < 1e-3
    assert SCHEDULES["none"].share_at(0).item() == 1.0


def test_the_share_never_falls():
    for schedule in SCHEDULES.values():
        shares = schedule.share_at(torch.arange(0, 20000, 100))
        assert (shares.diff() >= 0).all()


def test_a_warm_up_grows_to_the_whole_margin():
    shares = MarginSchedule(warmup_steps=4).share_at(torch.arange(6))
    assert shares.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_wrong_numbers_and_names_are_refused():
    with pytest.raises(
        OptionError, match=r"^margin schedule: gamma=-1\.0 is out of range; give a number of 0 or more\."
    ):
        MarginSchedule(gamma=-1.0)
    with pytest.raises(OptionError, match=r"^margin schedule 'slow' is unknown; choose one of: none, sphereface"):
        schedule_named("slow")
