"""Roles of side branches: attention, gates, re-parameterisation branches, auxiliary classifiers."""

import re

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, hollow, image, names_with, torchvision_model
from torch import nn


def matching(pattern: str, model: nn.Module) -> set[str]:
    layers = (nn.Conv1d, nn.Conv2d, nn.Linear)
    found = {name for name, part in model.named_modules() if isinstance(part, layers) and re.search(pattern, name)}
    assert found, pattern
    return found


ATTENTION = [
    ("test_vit", r"attn\.(qkv|proj)$"),
    ("test_coatnet", r"attn\.(qkv|proj)$"),
    ("eva02_tiny_patch14_224", r"attn\.(qkv|proj)$"),  # the weight of qkv is used functionally
    ("swin_tiny_patch4_window7_224", r"attn\.(qkv|proj)$"),
    ("coat_tiny", r"\.(qkv|proj)$(?<!patch_embed\d\.proj)(?<!cpe\d\.proj)"),
]


@pytest.mark.parametrize(("name", "pattern"), ATTENTION)
def test_attention_is_what_makes_queries_keys_and_values_and_what_takes_their_result(name, pattern):
    model = hollow(name)
    assert names_with("@attention", model) == matching(pattern, model)


GATES = [
    ("seresnet18", r"\.se\.fc\d$"),
    ("test_efficientnet", r"\.se\.conv_(reduce|expand)$"),
    ("eca_resnet33ts", r"\.attn\.conv$"),
    ("ghostnetv2_100", r"\.se\.conv_|short_conv\.\d$"),
    ("test_nfnet", r"attn_last\.fc\d$"),
]


@pytest.mark.parametrize(("name", "pattern"), GATES)
def test_gates_are_the_layers_that_say_how_much_of_another_activation_passes(name, pattern):
    model = hollow(name)
    assert names_with("@gate", model) == matching(pattern, model)


REP_BRANCHES = [
    ("repvgg_a0", r"conv_(kxk|1x1)\.conv$"),
    ("repvit_m0_9", r"token_mixer\.(conv\.c|conv1)$"),
]


@pytest.mark.parametrize(("name", "pattern"), REP_BRANCHES)
def test_rep_branches_are_parallel_convolutions_of_one_input_that_are_summed(name, pattern):
    model = hollow(name)
    assert names_with("@rep_branch", model) == matching(pattern, model)


def test_every_branch_of_a_block_of_mobileone_that_sums_several_is_a_rep_branch():
    model = hollow("mobileone_s0")
    found = names_with("@rep_branch", model)
    assert found == matching(r"conv_(kxk\.\d|scale)\.conv$", model) - lone_branches(model)


def lone_branches(model: nn.Module) -> set[str]:
    """Convolutions that stand alone in their block."""
    blocks = [(name, part) for name, part in model.named_modules() if hasattr(part, "conv_kxk")]
    convs = {
        name: [f"{name}.{path}" for path, part in block.named_modules() if isinstance(part, nn.Conv2d)]
        for name, block in blocks
    }
    return {paths[0] for paths in convs.values() if len(paths) == 1}


@pytest.mark.parametrize("name", ["test_resnet", "dla34", "dpn68", "test_convnext", "convnext_tiny", "test_vit"])
def test_networks_without_them_have_no_rep_branch_and_no_gate(name):
    model = hollow(name)
    assert not names_with("@rep_branch", model)
    assert not names_with("@gate", model)


def test_a_lateral_of_a_feature_pyramid_is_no_rep_branch():
    def forward(self, x):
        deep = self.down(x)
        return F.interpolate(self.deep(deep), scale_factor=2) + self.shallow(x)

    model = FromFunction(forward, down=nn.Conv2d(3, 4, 2, 2), deep=nn.Conv2d(4, 8, 1), shallow=nn.Conv2d(3, 8, 1))
    assert not names_with("@rep_branch", model, image())


def test_two_branches_with_an_activation_between_are_no_rep_branches():
    model = FromFunction(
        lambda self, x: F.relu(self.one(x)) + self.two(x), one=nn.Conv2d(3, 8, 3, padding=1), two=nn.Conv2d(3, 8, 1)
    )
    assert not names_with("@rep_branch", model, image())


def test_both_halves_of_a_gated_linear_unit_without_a_squashing_function_are_no_gates():
    model = FromFunction(lambda self, x: F.silu(self.one(x)) * self.two(x), one=nn.Linear(4, 8), two=nn.Linear(4, 8))
    assert not names_with("@gate", model, torch.zeros(2, 4))


def test_the_half_of_a_gated_linear_unit_that_ends_in_a_sigmoid_is_a_gate():
    model = FromFunction(
        lambda self, x: torch.sigmoid(self.one(x)) * self.two(x), one=nn.Linear(4, 8), two=nn.Linear(4, 8)
    )
    assert names_with("@gate", model, torch.zeros(2, 4)) == {"one"}


def test_the_layers_that_run_in_train_mode_alone_are_auxiliary():
    model = torchvision_model("googlenet", init_weights=False, aux_logits=True)
    assert names_with("@aux", model, image(2, 3, 64, 64)) == matching(r"^aux\d", model)


class RecurrentCell(nn.Module):
    """A gated update, run twice, of a state by what an encoder and a correlation say (as in RAFT)."""

    def __init__(self):
        super().__init__()
        self.state = nn.Conv2d(3, 4, 3, padding=1)
        self.encoder = nn.Conv2d(3, 4, 3, padding=1)
        self.motion = nn.Conv2d(8, 4, 3, padding=1)
        self.update = nn.Conv2d(8, 4, 3, padding=1)
        self.candidate = nn.Conv2d(8, 4, 3, padding=1)
        self.flow = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        h, e, f = torch.tanh(self.state(x)), self.encoder(x), 0
        for _ in range(2):
            m = self.motion(torch.cat([e, e + f], 1))
            z = torch.sigmoid(self.update(torch.cat([h, m], 1)))
            h = (1 - z) * h + z * torch.tanh(self.candidate(torch.cat([h, m], 1)))
            f = self.flow(h)
        return f


def test_what_a_recurrent_cell_is_computed_from_is_no_gate():
    assert names_with("@gate", RecurrentCell(), torch.rand(1, 3, 8, 8)) == {"update"}
