"""The copy for a trial run is what ``copy.deepcopy`` gives, on another device."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from networks import hollow, small_net
from torch import nn
from torch.nn.utils import parametrizations

from spherify.graph.copies import copy_without_data, has_plain_state


class Odd(nn.Module):
    """Attributes of many kinds, some of them the same object."""

    def __init__(self):
        super().__init__()
        self.fc, self.same = nn.Linear(4, 4), nn.Linear(4, 4)
        self.same.weight = self.fc.weight
        self.steps = [1, (2, [3]), {"fc": self.fc}, {4}]
        self.same.steps = self.steps
        self.call, self.me, self.function = self.fc.forward, [self], torch.relu
        self.loose = torch.ones(3)
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.register_buffer("nothing", None)


class Restored(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__(state)
        self.was_restored = True


class CopiesItself(nn.Linear):
    def __deepcopy__(self, memo):
        return CopiesItself(7, 7)


class Slotted(nn.Linear):
    __slots__ = ("note",)


MODELS = {
    "small": small_net,
    "odd": Odd,
    "lstm": lambda: nn.LSTM(3, 4),
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2),
    "parametrised": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3))),
    "restored": lambda: nn.Sequential(Restored(3, 3)),
    "slotted": lambda: nn.Sequential(Slotted(3, 3)),
    "timm": lambda: hollow("test_vit"),
}


def described(value, seen):
    """What an object is made of, places in memory apart; what was seen before by its number."""
    if isinstance(value, (int, float, str, type(None), type, torch.dtype)):
        return value
    if id(value) in seen:
        return f"object {seen[id(value)]}"
    seen[id(value)] = len(seen)
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, dict):
        return type(value), [(described(key, seen), described(item, seen)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set)):
        return type(value), [described(item, seen) for item in value]
    if hasattr(value, "__self__") and isinstance(value.__self__, nn.Module):
        return value.__func__, described(value.__self__, seen)
    return type(value), described(getattr(value, "__dict__", None), seen)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_copy_is_as_deepcopy_makes_it(make):
    model = make()
    copied = copy_without_data(model, "cpu")
    assert described(copied, {}) == described(copy.deepcopy(model), {})
    assert not {id(part) for part in copied.modules()} & {id(part) for part in model.modules()}


def test_what_is_one_object_stays_one_and_is_not_the_models():
    model = Odd()
    copied = copy_without_data(model, "meta")
    assert copied.steps is copied.same.steps is not model.steps
    assert copied.fc.weight is copied.same.weight
    assert copied.steps[2]["fc"] is copied.call.__self__ is copied.fc
    assert copied.me[0] is copied
    assert all(tensor.is_meta for tensor in (copied.loose, *copied.parameters(), *copied.buffers()))


def test_hooks_of_the_copy_are_its_own():
    model = small_net()
    copied = copy_without_data(model, "meta")
    copied.register_forward_hook(lambda *args: None)
    assert len(model._forward_hooks) == 0


@pytest.mark.parametrize("kind", [Restored, CopiesItself, Slotted, nn.LSTM])
def test_a_class_that_says_how_it_is_copied_is_asked(kind):
    assert not has_plain_state(kind)


def test_a_class_that_copies_itself_does():
    assert copy_without_data(nn.Sequential(CopiesItself(3, 3)), "meta")[0].in_features == 7


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear, nn.MultiheadAttention, nn.Sequential, Odd])
def test_torchs_own_layers_are_copied_the_fast_way(kind):
    assert has_plain_state(kind)


def test_the_fast_way_is_still_taken_once_torch_compile_has_run():
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    assert has_plain_state(nn.Linear)


def test_hooks_that_compute_weights_stay_in_the_copy_and_others_do_not():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.spectral_norm(model[0])
    copied = copy_without_data(model, "meta")
    assert isinstance(copied[0]._forward_hooks, OrderedDict)
    assert len(copied[0]._forward_hooks) == 0
    assert len(copied[0]._forward_pre_hooks) == 1
    assert len(model[0]._forward_hooks) == 1
