"""Selectors name layers by name, role, type or regular expression; one that names none is an error."""

import pytest
from networks import FromFunction, Residual, hollow, image
from torch import nn

from spherify.convert import plan
from spherify.errors import OptionError
from spherify.graph.roles import ROLES
from spherify.graph.site import Site
from spherify.plan.selectors import check_selectors, matches


def site(name="layer1.0.conv1", aliases=(), kind=nn.Conv2d, roles=()):
    return Site(
        name=name,
        aliases=aliases,
        source_type=kind,
        kind="conv2d",
        shape=(4, 4, 1, 1),
        fan_in=4,
        groups=1,
        has_bias=True,
        calls_eval=1,
        calls_train=1,
        roles=frozenset(roles),
    )


SITE = site(aliases=("shared.conv",), roles=("@stem",))


@pytest.mark.parametrize(
    "selector",
    [
        *("layer1.0.conv1", "layer1.*", "*", "layer?.0.conv[12]", "shared.*", "@stem", "type:Conv2d", "type:Conv*"),
        *(r"re:layer\d.*", "re:.*conv1", "re:shared.conv"),
    ],
)
def test_selectors_that_name_the_site(selector):
    assert matches(selector, SITE)


@pytest.mark.parametrize(
    "selector",
    ["layer1", "conv1", "LAYER1.*", "@shortcut", "type:Conv", "type:conv2d", "re:layer1", "re:conv1", "layer2.*"],
)
def test_selectors_that_do_not(selector):
    assert not matches(selector, SITE)


SITES = [
    SITE,
    site("layer1.0.conv2"),
    site("fc", kind=nn.Linear, roles=("@head",)),
]

LOST = {
    "layer1.0.conv9": r"^selector 'layer1\.0\.conv9' matches no layer; the nearest is 'layer1\.0\.conv\d'$",
    "layer1": r"^selector 'layer1' matches no layer; it holds 2, named by 'layer1\.\*'$",
    "type:Conv3d": r"^selector 'type:Conv3d' matches no layer; this model has Conv2d, Linear$",
    "@shortcut": r"^selector '@shortcut' matches no layer; this model has @head, @stem$",
    "@soup": rf"this model has @head, @stem, and the roles are {', '.join(ROLES)}$",
    "re:fcc": r"^selector 're:fcc' matches no layer; the nearest is 'fc'$",
}


@pytest.mark.parametrize(("selector", "message"), LOST.items(), ids=LOST)
def test_a_selector_that_matches_nothing_names_the_nearest(selector, message):
    with pytest.raises(OptionError, match=message):
        check_selectors([selector], SITES)


def test_all_lost_selectors_are_told_together():
    with pytest.raises(OptionError, match=r"'fcc' matches no layer; .*'fc'; selector 'type:LSTM' matches no layer; "):
        check_selectors(["fc", "fcc", "type:LSTM"], SITES)


def test_a_model_without_roles_says_so():
    with pytest.raises(OptionError, match=r"this model has no roles$"):
        check_selectors(["@stem"], [site()])


def test_a_model_without_layers_has_no_nearest():
    with pytest.raises(OptionError, match=r"^selector 'fc' matches no layer$"):
        check_selectors(["fc"], [])


def test_selectors_that_match_pass():
    check_selectors(["fc", "@stem", "re:.*conv2"], SITES)


def test_a_bad_regular_expression_is_refused():
    with pytest.raises(OptionError, match=r"^selector 're:\(' is not a regular expression: missing \), .*\.$"):
        check_selectors(["re:("], SITES)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_the_error_reaches_the_caller_of_plan(option):
    with pytest.raises(OptionError, match=r"'layer1' matches no layer; it holds 4, named by 'layer1\.\*'"):
        plan(hollow("resnet18"), **{option: "layer1"})


def test_an_alias_selects_the_layer():
    layer = nn.Linear(4, 4)
    model = FromFunction(lambda self, x: self.c(self.b(self.a(x))), a=layer, b=layer, c=nn.Linear(4, 4))
    report = plan(model, exclude="b", example_input=image(2, 4))
    assert [(decision.site.name, decision.rule) for decision in report.decisions] == [("a", "exclude"), ("c", "head")]


def test_include_converts_nothing_else():
    report = plan(Residual(), include=["@shortcut"], example_input=image())
    assert [decision.site.name for decision in report.converted] == ["projection.0"]
