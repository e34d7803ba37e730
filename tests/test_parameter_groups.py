"""Parameter groups: every trainable parameter once, none of the angular ones decayed, taken by torch and timm."""

import pytest
import torch
from networks import small_net, timm_model
from timm.optim import create_optimizer_v2
from torch import nn

from spherify import parameter_groups, spherify
from spherify.errors import OptionError


def names(model: nn.Module, group: dict) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_a_plain_model_is_split_as_usual():
    model = small_net()
    decayed, spared = parameter_groups(model, weight_decay=0.1)
    assert names(model, decayed) == {"0.weight", "3.weight", "7.weight"}
    assert names(model, spared) == {"0.bias", "1.weight", "1.bias", "7.bias"}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_what_a_conversion_added_and_every_angular_weight_is_spared():
    model = spherify(small_net(), operator="learnable", head="ga-softmax", exclude="0", gain="learned")
    decayed, spared = parameter_groups(model, lr=0.01)
    assert names(model, decayed) == {"0.weight"}
    assert {"3.weight", "3.gain", "3.bias", "3.k_logit", "7.weight", "0.bias"} <= names(model, spared)
    assert decayed["lr"] == spared["lr"] == 0.01


def test_every_trainable_parameter_stands_in_one_group():
    model = spherify(timm_model("test_vit"), head="w-softmax", exclude="blocks.0.*")
    model.patch_embed.proj.weight.requires_grad_(False)
    groups = parameter_groups(model)
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {"pos_embed", "cls_token"} & {n for n, _ in model.named_parameters()} <= names(
        model, groups[1]
    )  # timm's own


def test_shared_parameters_stand_once_and_a_fully_angular_model_has_one_group():
    model = spherify(small_net(), operator="learnable", k_shared="network", head="w-softmax")
    (group,) = parameter_groups(model)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == len(list(model.parameters()))


def test_the_user_names_more():
    model = small_net()
    decayed, _ = parameter_groups(model, no_weight_decay=["7.*", "3.weight"])
    assert names(model, decayed) == {"0.weight"}


def test_torchs_and_timms_optimisers_take_them():
    model = spherify(small_net(), head="keep")
    for optimizer in (
        torch.optim.AdamW(parameter_groups(model, weight_decay=0.2), lr=1e-3),
        create_optimizer_v2(parameter_groups(model, weight_decay=0.2), opt="adamw", lr=1e-3),
    ):
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.2]
        assert all(group["lr"] == 1e-3 for group in optimizer.param_groups)
        optimizer.step()


def test_wrong_calls_are_refused():
    with pytest.raises(OptionError, match=r"^weight_decay=-1, lr=None: neither may be negative\.$"):
        parameter_groups(small_net(), weight_decay=-1)
    with pytest.raises(OptionError, match=r"^no_weight_decay 'embed\*' matches no parameter of Sequential\.$"):
        parameter_groups(small_net(), no_weight_decay=["embed*"])
    with pytest.raises(OptionError, match=r"^Sequential has no trainable parameter\.$"):
        parameter_groups(small_net().requires_grad_(False))
