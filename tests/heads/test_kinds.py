"""The table of heads: defaults, the scale that makes a small loss reachable, and what is refused."""

import math

import pytest

from spherify.errors import OptionError
from spherify.heads.kinds import HEAD_KINDS, LOSS_FLOOR, HeadSettings, scale_for, settings_for


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000, 21841])
def test_the_default_scale_lets_the_loss_fall_below_its_floor_and_one_less_does_not(classes):
    def floor(scale: float) -> float:
        return math.log1p((classes - 1) * math.exp(-scale * classes / (classes - 1)))

    scale = scale_for(classes)
    assert floor(scale) < LOSS_FLOOR
    assert floor(scale - 1) >= LOSS_FLOOR


def test_a_scale_of_one_would_never_do():
    assert math.log1p(9 * math.exp(-10 / 9)) == pytest.approx(1.377, abs=1e-3)  # the paper's radius 1, ten classes


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_kind_has_defaults_that_go_together_and_survive_their_dict(kind):
    settings = settings_for(kind, 10)
    assert HeadSettings.from_dict(settings.to_dict()) == settings
    assert str(settings).startswith(kind)


def test_the_defaults_are_those_of_the_papers():
    assert settings_for("a-softmax", 10).margin == 4.0
    assert (settings_for("ga-softmax", 10).margin, settings_for("ga-softmax", 10).operator) == (4.0, "linear")
    assert (settings_for("cosface", 10).margin, settings_for("cosface", 10).scale) == (0.35, 64.0)
    assert (settings_for("arcface", 10).margin, settings_for("arcface", 10).scale) == (0.5, 64.0)
    assert (settings_for("s-softmax", 10).scale, settings_for("s-softmax", 1000).scale) == (7.0, 12.0)
    assert settings_for("w-softmax", 10, operator="sigmoid").k == 0.3


WRONG = {
    "kind": (dict(kind="sphere"), r"^head 'sphere' is unknown; choose one of: w-softmax, a-softmax"),
    "operator": (
        dict(kind="a-softmax", operator="linear"),
        r"^head_operator 'linear' does not go with head 'a-softmax'; choose one of: cosine\.$",
    ),
    "k of cosine": (dict(kind="w-softmax", k=0.3), r"^operator 'cosine' has no k"),
    "margin below 1": (
        dict(kind="ga-softmax", margin=0.5),
        r"^margin=0\.5 is out of range for head 'ga-softmax'; choose a number in \[1, 64\]\.$",
    ),
    "margin of arcface": (dict(kind="arcface", margin=28.6), r"^margin=28\.6 is out of range .* in \[0, 3\.142\]\.$"),
    "margin not a number": (dict(kind="ga-softmax", margin=float("nan")), r"^margin=nan is out of range"),
    "no margin": (
        dict(kind="w-softmax", margin=4),
        r"^head 'w-softmax' has no margin; leave margin out, or choose ga-softmax\.$",
    ),
    "steep sigmoid": (
        dict(kind="ga-softmax", operator="sigmoid", k=0.05),
        r"^head_k=0\.05 is too steep for a margin: no angle can be read back from the response; choose 0\.1 or more\.$",
    ),
    "no scale": (dict(kind="ga-softmax", scale=4), r"^head 'ga-softmax' has no scale\.$"),
    "scale": (dict(kind="s-softmax", scale=-1), r"^scale=-1\.0 is no positive number\.$"),
    "eps": (dict(kind="w-softmax", eps=0.0), r"^eps=0\.0 is no positive number; without it a feature of zeros has no"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_refused_in_one_line(options, message):
    with pytest.raises(OptionError, match=message):
        settings_for(num_classes=10, **options)


def test_a_missing_scale_is_refused():
    with pytest.raises(OptionError, match=r"^head 's-softmax' has a scale\.$"):
        HeadSettings(kind="s-softmax")


def test_a_steep_sigmoid_without_a_margin_is_allowed():
    assert settings_for("w-softmax", 10, operator="sigmoid", k=0.01).k == 0.01
