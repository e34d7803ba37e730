"""Roles are read from the graph: what a layer is in its network, whatever it is called."""

import re

import pytest
import torch
import torch.nn.functional as F
from networks import (
    FromFunction,
    Residual,
    conv_bn,
    hollow,
    image,
    names_with,
    sites_of,
    torchvision_model,
)
from torch import nn

from spherify.graph.roles import ROLES

RESNET18 = {f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)}
SLOW = pytest.mark.slow


def test_every_role_says_in_one_line_what_it_is():
    assert all(name.startswith("@") for name in ROLES)
    assert all(len(role.__doc__.strip().splitlines()) == 1 for role in ROLES.values())


def test_the_shortcuts_of_resnet18_are_its_three_downsamples():
    assert names_with("@shortcut", hollow("resnet18")) == RESNET18


# Model, its names for the 1x1 convolution of a shortcut, how many there are: read off the source of each network.
SHORTCUTS = [
    ("torchvision:resnet18", r"downsample\.0", 3),
    ("test_resnet", r"layer\d\.0\.downsample\.1", 3),
    ("resnet18d", r"downsample\.1", 3),  # average pool, then 1x1
    pytest.param("resnet50d", r"downsample\.1", 4, marks=SLOW),
    ("test_nfnet", r"downsample\.conv", 4),
    ("test_byobnet", r"shortcut\.conv\.conv", 4),
    ("test_coatnet", r"shortcut\.expand", 3),
    ("test_maxvit", r"shortcut\.expand", 3),
    ("dla34", r"project\.0", 4),  # the projection lies outside the block that adds it
    ("ghostnet_100", r"shortcut\.2", 5),  # depthwise, then 1x1
    ("dpn68", r"c1x1_w_s\d\.conv", 4),  # its output is sliced, added and concatenated
    pytest.param("dpn48b", r"c1x1_w_s\d\.conv", 4, marks=SLOW),  # the other half of the block has a layer of its own
    ("resnetv2_50", r"downsample\.conv", 4),
    ("torchvision:r3d_18", r"downsample\.0", 3),
    pytest.param("ghostnetv3_050", r"shortcut\.2", 5, marks=SLOW),  # and parallel branches that are none
    pytest.param("repghostnet_050", r"shortcut\.2", 5, marks=SLOW),
    pytest.param("xception41", r"shortcut\.conv", 4, marks=SLOW),
    pytest.param("regnety_002", r"downsample\.conv", 4, marks=SLOW),
    pytest.param("hrnet_w18_small", r"downsample\.0", 5, marks=SLOW),
    pytest.param("torchvision:maxvit_t", r"MBconv\.proj\.1", 4, marks=SLOW),
    pytest.param("maxvit_tiny_rw_224", r"shortcut\.expand", 3, marks=SLOW),
]


@pytest.mark.parametrize(("name", "pattern", "count"), SHORTCUTS)
def test_shortcuts_of_known_networks(name, pattern, count):
    model = hollow(name)
    convs = {path for path, part in model.named_modules() if isinstance(part, (nn.Conv2d, nn.Conv3d))}
    expected = {path for path in convs if re.search(rf"(^|\.){pattern}$", path)}
    assert len(expected) == count
    assert names_with("@shortcut", model) == expected


def test_shortcuts_of_a_regnet_of_torchvision_are_its_projections():
    model = torchvision_model("regnet_y_400mf")  # cannot be built on meta
    expected = {f"trunk_output.block{stage}.block{stage}-0.proj.0" for stage in (1, 2, 3, 4)}
    assert names_with("@shortcut", model) == expected


LINEAR_SHORTCUTS = [
    ("hiera_tiny_224", r"blocks\.\d+\.proj", 3),
    ("mvitv2_tiny", r"shortcut_proj_attn", 3),
    pytest.param("mvitv2_small_cls", r"shortcut_proj_attn", 3, marks=SLOW),  # the class token put aside and back
    pytest.param("torchvision:mvit_v1_b", r"blocks\.\d+\.project", 3, marks=SLOW),
    pytest.param("torchvision:mvit_v2_s", r"blocks\.\d+\.project", 3, marks=SLOW),
]


@pytest.mark.parametrize(("name", "pattern", "count"), LINEAR_SHORTCUTS)
def test_linear_projections_of_tokens_are_shortcuts(name, pattern, count):
    model = hollow(name)
    linears = {path for path, part in model.named_modules() if isinstance(part, nn.Linear)}
    expected = {path for path in linears if re.search(rf"(^|\.){pattern}$", path)}
    assert len(expected) == count
    assert names_with("@shortcut", model) == expected


WITHOUT_SHORTCUTS = [
    "repvgg_a0",  # branches side by side, of one conv each
    "mobileone_s0",  # up to four branches side by side
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "deit_tiny_distilled_patch16_224",  # averages two heads
    "torchvision:lraspp_mobilenet_v3_large",  # adds a 1x1 of early features to upsampled ones
    "torchvision:squeezenet1_0",
    pytest.param("tnt_s_legacy_patch16_224", marks=SLOW),  # a stream of patches beside one of pixels
    pytest.param("vit_small_patch16_18x2_224", marks=SLOW),  # blocks side by side
    pytest.param("fastvit_t8", marks=SLOW),
    pytest.param("nasnetalarge", marks=SLOW),
    pytest.param("pnasnet5large", marks=SLOW),  # sums side by side, concatenated
    pytest.param("efficientvit_m0", marks=SLOW),  # stage transitions on the main path
]


@pytest.mark.parametrize("name", WITHOUT_SHORTCUTS)
def test_networks_without_shortcuts(name):
    assert names_with("@shortcut", hollow(name)) == set()


def test_a_projection_is_a_shortcut_whatever_it_is_called():
    assert names_with("@shortcut", Residual(), image()) == {"projection.0"}


def test_a_projection_is_found_whichever_side_of_the_add_it_stands_on():
    model = FromFunction(
        lambda self, x: self.skip(x).add_(self.two(F.relu(self.one(x)))),
        one=conv_bn(3, 8),
        two=conv_bn(8, 8),
        skip=conv_bn(3, 8, 1),
    )
    assert names_with("@shortcut", model, image()) == {"skip.0"}


def residual_with(skip, main=None):
    main = main or nn.Sequential(conv_bn(3, 8), nn.ReLU(), conv_bn(8, 8))
    return FromFunction(lambda self, x: self.main(x) + self.skip(x), main=main, skip=skip)


def test_a_pool_before_the_projection_changes_nothing():
    assert names_with("@shortcut", residual_with(nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(3, 8, 1))), image())


def test_a_depthwise_conv_before_the_projection_changes_nothing():
    skip = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 8, 1))
    main = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8))
    assert names_with("@shortcut", residual_with(skip, main), image()) == {"skip.1"}


class Tokens(nn.Module):
    """A residual block on tokens whose short side is a projection, with more beside it."""

    def __init__(self, short):
        super().__init__()
        self.one, self.two, self.short = nn.Linear(4, 16), nn.Linear(16, 8), short

    def forward(self, x):
        return self.short(x) + self.two(F.gelu(self.one(x)))


def test_a_projection_of_tokens_is_a_shortcut():
    assert names_with("@shortcut", Tokens(nn.Linear(4, 8)), torch.rand(2, 5, 4)) == {"short"}


@pytest.mark.parametrize("behind", [nn.GELU(), nn.LayerNorm(8)], ids=["activation", "norm"])
def test_a_branch_of_tokens_with_an_activation_or_a_norm_is_no_shortcut(behind):
    model = Tokens(nn.Sequential(nn.Linear(4, 8), behind))
    assert names_with("@shortcut", model, torch.rand(2, 5, 4)) == set()


def test_a_sum_of_two_classifiers_has_no_shortcut():
    assert names_with("@shortcut", Tokens(nn.Linear(4, 8)), torch.rand(2, 4)) == set()


NO_SHORTCUTS = {
    "identity": residual_with(nn.Identity(), nn.Sequential(conv_bn(3, 8), conv_bn(8, 3))),
    "3x3": residual_with(nn.Conv2d(3, 8, 3, padding=1)),
    "grouped 1x1": residual_with(nn.Conv2d(3, 9, 1, groups=3), nn.Sequential(conv_bn(3, 9), conv_bn(9, 9))),
    "two 1x1": residual_with(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), nn.Sequential(*[conv_bn(3, 3)] * 3)
    ),
    "as long as the main side": residual_with(nn.Conv2d(3, 8, 1), conv_bn(3, 8)),
}
NO_SHORTCUTS["two 1x1"].main.append(conv_bn(3, 8))


@pytest.mark.parametrize("model", NO_SHORTCUTS.values(), ids=NO_SHORTCUTS)
def test_sides_of_an_add_that_are_no_projection(model):
    assert names_with("@shortcut", model, image()) == set()


def test_parallel_branches_of_equal_length_are_no_shortcuts():
    model = FromFunction(
        lambda self, x: self.a(x) + self.b(x) + self.c(x) + self.d(x),
        **{name: conv_bn(3, 8, 1) for name in "abcd"},
    )
    assert names_with("@shortcut", model, image()) == set()


def test_the_lateral_of_a_feature_pyramid_is_no_shortcut():
    model = FromFunction(
        lambda self, x: self.lateral(x) + F.interpolate(self.top(self.deep(x)), scale_factor=2.0),
        lateral=nn.Conv2d(3, 8, 1),
        deep=nn.Conv2d(3, 8, 3, stride=2, padding=1),
        top=nn.Conv2d(8, 8, 1),
    )
    assert names_with("@shortcut", model, image()) == set()


def test_a_stage_transition_on_the_main_path_is_no_shortcut_although_it_is_called_downsample():
    model = FromFunction(
        lambda self, x: (y := self.downsample(x)) + self.block(y),
        downsample=nn.Conv2d(3, 8, 1, stride=2),
        block=nn.Sequential(conv_bn(8, 8), conv_bn(8, 8)),
    )
    assert names_with("@shortcut", model, image()) == set()


def test_a_projection_that_the_cell_goes_on_using_is_no_shortcut():
    def cell(self, x):
        previous = self.previous(x)
        merged = previous + self.branch(x)
        return torch.cat([merged, self.other(previous)], 1)

    model = FromFunction(
        cell,
        previous=nn.Conv2d(3, 8, 1),
        branch=nn.Sequential(conv_bn(3, 8), conv_bn(8, 8)),
        other=conv_bn(8, 8),
    )
    assert names_with("@shortcut", model, image()) == set()


def test_a_projection_that_is_merged_with_another_branch_too_is_no_shortcut():
    def cell(self, x):
        skip = self.skip(x)
        return torch.cat([(self.main(x) + skip).amax(1, keepdim=True), torch.cat([skip, self.other(x)], 1)], 1)

    model = FromFunction(
        cell,
        skip=nn.Conv2d(3, 8, 1),
        main=nn.Sequential(conv_bn(3, 8), conv_bn(8, 8)),
        other=conv_bn(3, 8),
    )
    assert names_with("@shortcut", model, image()) == set()


def test_a_projection_that_is_an_output_too_is_no_shortcut():
    def forward(self, x):
        skip = self.skip(x)
        return self.main(x) + skip, skip

    model = FromFunction(forward, skip=nn.Conv2d(3, 8, 1), main=nn.Sequential(conv_bn(3, 8), conv_bn(8, 8)))
    assert names_with("@shortcut", model, image()) == set()


def test_a_projection_sliced_added_and_concatenated_is_a_shortcut():
    def forward(self, x):
        left, right = self.skip(x).split([6, 2], 1)
        main = self.main(x)
        return torch.cat([left + main[:, :6], right, main[:, 6:]], 1)

    model = FromFunction(forward, skip=nn.Conv2d(3, 8, 1), main=nn.Sequential(conv_bn(3, 8), conv_bn(8, 8)))
    assert names_with("@shortcut", model, image()) == {"skip"}


def cell_of_sums(*, other):
    """A sum with a 1x1 on its short side, concatenated with what ``other`` makes."""
    return FromFunction(
        lambda self, x: torch.cat([self.skip(x) + self.main(x), self.other(x)], 1),
        skip=nn.Conv2d(3, 8, 1),
        main=nn.Sequential(conv_bn(3, 8), conv_bn(8, 8)),
        other=other,
    )


def test_one_of_several_sums_side_by_side_has_no_shortcut():
    assert names_with("@shortcut", cell_of_sums(other=Residual()), image()) == {"other.projection.0"}


def test_a_sum_concatenated_with_the_input_has_a_shortcut():
    assert names_with("@shortcut", cell_of_sums(other=nn.AvgPool2d(3, 1, 1)), image()) == {"skip"}


def test_averaged_heads_are_no_shortcuts():
    model = FromFunction(
        lambda self, x: (self.a(x) + self.b(self.deep(x))) / 2,
        a=nn.Linear(6, 4),
        b=nn.Linear(6, 4),
        deep=nn.Linear(6, 6),
    )
    assert names_with("@shortcut", model, torch.rand(2, 6)) == set()


def test_the_stem_is_the_first_layer():
    assert names_with("@stem", hollow("resnet18")) == {"conv1"}


def test_every_first_layer_is_a_stem():
    model = FromFunction(lambda self, x: self.c(self.a(x) + self.b(x)), **{name: nn.Linear(6, 6) for name in "abc"})
    assert names_with("@stem", model, torch.rand(2, 6)) == {"a", "b"}


def test_a_layer_fed_with_a_constant_is_no_stem():
    model = FromFunction(lambda self, x: self.a(x) + self.b(torch.ones(6)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    assert names_with("@stem", model, torch.rand(2, 6)) == {"a"}


def test_depthwise_and_pointwise():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 16, 1, groups=4),
        nn.Conv2d(16, 1, 3),
        nn.Conv2d(1, 4, 3, groups=1),
    )
    assert names_with("@depthwise", model, image()) == {"1", "2"}
    assert names_with("@pointwise", model, image()) == {"0"}


def test_depthwise_in_one_and_three_dimensions():
    assert names_with("@depthwise", nn.Sequential(nn.Conv1d(3, 3, 3, groups=3)), image(2, 3, 9)) == {"0"}
    assert names_with("@depthwise", nn.Sequential(nn.Conv3d(3, 3, 3, groups=3)), image(2, 3, 5, 5, 5)) == {"0"}


def test_depthwise_layers_of_a_network():
    model = hollow("torchvision:mobilenet_v3_small")
    expected = {name for name, part in model.named_modules() if isinstance(part, nn.Conv2d) and part.groups > 1}
    assert len(expected) == 11
    assert names_with("@depthwise", model) == expected


def test_roles_are_those_of_the_site():
    sites = sites_of(Residual(), image())
    assert sites["projection.0"].roles == {"@stem", "@shortcut", "@pointwise"}
    assert sites["two.0"].roles == set()
