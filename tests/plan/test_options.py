"""What the user asks for is checked once, and said in one line."""

import pytest

from spherify.errors import OptionError
from spherify.plan.options import CHOICES, HEADS, Options


def test_the_defaults_stand():
    options = Options()
    assert (options.operator, options.k, options.eps, options.head) == ("cosine", None, 1e-4, "keep")
    assert options.linear
    assert not options.skip_shortcuts


@pytest.mark.parametrize(("operator", "k"), [("cosine", None), ("linear", None), ("sigmoid", 0.3), ("learnable", 0.5)])
def test_k_is_the_operators_own_where_none_is_given(operator, k):
    assert Options(operator=operator).k == k


def test_a_single_selector_may_be_a_plain_string():
    assert Options(include="@stem").include == ("@stem",)
    assert Options(exclude=["a", "b"]).exclude == ("a", "b")


WRONG = {
    "operator": (
        dict(operator="cos"),
        r"^operator 'cos' is unknown; choose one of: cosine, linear, sigmoid, learnable\.$",
    ),
    "k of cosine": (dict(k=0.3), r"^operator 'cosine' has no k; leave k out, or choose sigmoid or learnable\.$"),
    "k out of range": (dict(operator="sigmoid", k=1e9), r"^k=1000000000\.0 is out of range"),
    "k not positive": (dict(operator="learnable", k=0), r"^k=0 is out of range; choose a number in \[0\.001, 1000\]"),
    "k_shared": (dict(k_shared="world"), r"^k_shared 'world' is unknown; choose one of: filter, layer, network\.$"),
    "head": (dict(head="soft"), r"^head 'soft' is unknown; choose one of: keep, convert"),
    "margin without a head": (
        dict(margin=4),
        r"^margin=4 goes with an angular head, and head='keep'; choose head from:",
    ),
    "scale of ga-softmax": (dict(head="ga-softmax", scale=3), r"^head 'ga-softmax' has no scale\.$"),
    "operator of a-softmax": (
        dict(head="a-softmax", head_operator="linear"),
        r"^head_operator 'linear' does not go with",
    ),
    "norm": (dict(norm="drop"), r"^norm 'drop' is unknown; choose one of: keep, remove\.$"),
    "activation": (dict(activation="relu"), r"^activation 'relu' is unknown; choose one of: keep, remove\.$"),
    "gain": (dict(gain="yes"), r"^gain 'yes' is unknown; choose one of: auto, none, learned\.$"),
    "bias": (dict(bias="no"), r"^bias 'no' is unknown; choose one of: keep, drop\.$"),
    "eps zero": (dict(eps=0), r"^eps=0 is no positive number; without it a patch of zeros has no cosine\.$"),
    "eps negative": (dict(eps=-1e-4), r"^eps=-0\.0001 is no positive number"),
    "eps no number": (dict(eps="small"), r"^eps='small' is no positive number"),
    "num_classes": (dict(num_classes=0), r"^num_classes=0 is no number of classes; give 1 or more\.$"),
    "empty selector": (dict(include=[""]), r"^include '' is not a selector; give a name, a glob, @role, type:Class or"),
    "selector of another type": (dict(exclude=[3]), r"^exclude 3 is not a selector"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_refused_with_what_is_allowed(options, message):
    with pytest.raises(OptionError, match=message):
        Options(**options)


def test_the_head_is_described_by_its_own_options():
    options = Options(operator="sigmoid", k=0.2, head="ga-softmax", head_operator="sigmoid", head_k=0.7, eps=1e-3)
    settings = options.head_settings(10)
    assert (settings.k, settings.margin, settings.scale, settings.eps) == (0.7, 4.0, None, 1e-3)
    assert Options(head="s-softmax").head_settings(10).scale == 7.0
    assert not Options(head="softmax").has_angular_head


def test_every_choice_is_accepted():
    for name, allowed in CHOICES.items():
        for value in allowed:
            assert getattr(Options(**{name: value}), name) == value
    assert CHOICES["head"] == tuple(HEADS)


def test_options_survive_the_way_to_a_dict_and_back():
    options = Options(operator="learnable", k=0.7, k_shared="layer", include=["a.*"], exclude="@stem", bias="drop")
    values = options.to_dict()
    assert values["include"] == ["a.*"]
    assert Options.from_dict(values) == options


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match=r"^option 'radius' is unknown; choose one of: activation, bias, eps, .*\.$"):
        Options.from_dict({"radius": 2})
