"""A module of the user's own with ten difficulties: each alone, then all at once, nothing passed over in silence."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, decisions_of, image
from torch import nn
from torch.nn.utils import parametrizations

from spherify.convert import plan, spherify, unspherify
from spherify.layers.angular import AngularLayer

PARAMETRISED = "its weight is parametrised; remove the parametrisation first (torch.nn.utils.parametrize)"
CONVERTED = "no BatchNorm follows; gain and bias learned"


def told(model, example, **options):
    """Action, rule and reason for each layer."""
    decisions = decisions_of(model, example, **options)
    return {name: (decision.action, decision.rule, decision.reason) for name, decision in decisions.items()}


def converted_layers(model):
    return {name for name, part in model.named_modules() if isinstance(part, AngularLayer)}


def tokens():
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def test_a_module_called_twice_is_converted_once_and_called_twice():
    shared = nn.Linear(6, 6)
    model = FromFunction(
        lambda self, x: self.fc(self.shared(F.relu(self.shared(x)))), shared=shared, fc=nn.Linear(6, 2)
    )
    assert told(model, tokens())["shared"] == ("convert", "body", CONVERTED)
    converted, x = spherify(model, example_input=tokens()), tokens()
    assert torch.equal(converted(x), converted.fc(converted.shared(F.relu(converted.shared(x)))))


def test_a_module_with_two_names_is_one_layer_and_stays_one():
    model = FromFunction(lambda self, x: self.fc(self.other(self.one(x))), one=nn.Linear(6, 6), fc=nn.Linear(6, 2))
    model.other = model.one
    assert decisions_of(model, tokens())["one"].site.aliases == ("other",)
    converted = spherify(model, example_input=tokens())
    assert converted.one is converted.other


def test_tied_weights_stay_tied_and_both_layers_are_converted():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    converted = spherify(model, example_input=tokens())
    assert converted_layers(converted) == {"0", "2"}
    assert converted[0].weight is converted[2].weight
    assert converted[0].gain is not converted[2].gain


def with_old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, PARAMETRISED),
    "spectral_norm": (parametrizations.spectral_norm, PARAMETRISED),
    "orthogonal": (parametrizations.orthogonal, PARAMETRISED),
    "old weight_norm": (
        with_old_weight_norm,
        "its weight is computed by a hook (weight_norm or spectral_norm); remove it first",
    ),
    "old spectral_norm": (
        nn.utils.spectral_norm,
        "its weight is computed by a hook (weight_norm or spectral_norm); remove it first",
    ),
}


@pytest.mark.parametrize(("change", "reason"), COMPUTED.values(), ids=COMPUTED)
def test_a_computed_weight_is_refused_with_what_to_do(change, reason):
    model = nn.Sequential(change(nn.Linear(6, 6)), nn.Linear(6, 6), nn.Linear(6, 2))
    assert told(model, tokens())["0"] == ("unsupported", "obstacle", reason)
    assert converted_layers(spherify(model, example_input=tokens(), inplace=True)) == {"1"}  # not all can be copied


def with_lora(model, *targets):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # zero at first, which would hide the update
    return adapted


LORA = (
    "it belongs to the adapter {} (peft Linear), which adds an inner product to its result; "
    "merge it first (merge_and_unload)"
)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def test_layers_inside_an_adapter_are_refused_with_what_to_do():
    found = told(with_lora(mlp(), "2").base_model.model, tokens())
    refused = ("unsupported", "obstacle", LORA.format("2"))
    assert found == {
        "0": ("convert", "body", CONVERTED),
        "2.base_layer": refused,
        "2.lora_A.default": refused,
        "2.lora_B.default": refused,
        "4": ("keep", "head", "the classifier; head=keep"),
    }


def test_an_adapter_that_was_merged_leaves_nothing_to_refuse():
    merged = with_lora(mlp(), "2").merge_and_unload()
    assert converted_layers(spherify(merged, example_input=tokens())) == {"0", "2"}


def test_a_wrapped_model_keeps_its_adapter_working():
    adapted = with_lora(mlp(), "2")
    converted, x = spherify(adapted, example_input=tokens()), tokens()
    changed = converted(x)
    with converted.disable_adapter():
        assert not torch.allclose(converted(x), changed)
    assert torch.equal(unspherify(converted)(x), adapted(x))


def test_hooks_fire_on_converted_layers_and_may_change_results():
    model, seen = mlp(), []
    model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    model[0].register_forward_hook(lambda module, args, output: seen.append("after") or 0 * output)
    converted = spherify(model, example_input=tokens(), inplace=True)
    assert seen == []  # no hook ran while the model was examined
    assert torch.equal(converted(tokens()), converted[2:](torch.zeros(2, 5, 8)))
    assert seen == ["before", "after"]


def test_frozen_layers_stay_frozen_and_so_do_their_gains():
    model = mlp()
    model[0].requires_grad_(False)
    converted = spherify(model, operator="learnable", example_input=tokens())
    frozen = {name for name, value in converted.named_parameters() if not value.requires_grad}
    assert frozen == {f"0.{name}" for name in ("weight", "bias", "gain", "k_logit")}


PRODUCTS = {
    "einsum": lambda self, x: torch.einsum("bnd,de->bne", x, self.matrix),
    "einsum of a list": lambda self, x: torch.einsum("bnd,de->bne", [x, self.matrix]),
    "@": lambda self, x: x @ self.matrix,
    "@ from the left": lambda self, x: self.matrix @ x.mT,
    "transposed": lambda self, x: x @ self.matrix.t(),
    "normalised": lambda self, x: x @ F.normalize(self.matrix),
    "matmul": lambda self, x: torch.matmul(x, self.matrix),
    "bmm": lambda self, x: torch.bmm(x, self.matrix.expand(2, 6, 6)),
    "tensordot": lambda self, x: torch.tensordot(x, self.matrix, 1),
    "addmm": lambda self, x: torch.addmm(self.vector, x[0], self.matrix),
}


def with_parameters(forward):
    model = FromFunction(
        lambda self, x: self.fc(forward(self, self.body(x))), body=nn.Linear(6, 6), fc=nn.LazyLinear(2)
    )
    model.matrix, model.vector = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
    model.table = nn.Parameter(torch.randn(5, 6))
    model(tokens())
    return model


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_parameter_multiplied_outside_any_layer_is_noted(product):
    note = "Not converted: matrix, multiplied with an activation outside any conv or linear layer."
    assert plan(with_parameters(product), example_input=tokens()).notes == (note,)


QUIET = {
    "a table added": lambda self, x: x + self.table,
    "a scale": lambda self, x: x * self.table,
    "a bias of a product of activations": lambda self, x: torch.baddbmm(self.table[:, :5].expand(2, 5, 5), x, x.mT),
    "a product of Parameters": lambda self, x: x + self.table @ self.matrix,
    "attention": lambda self, x: F.scaled_dot_product_attention(x, x, x),
    "a product of what a layer made of a Parameter": lambda self, x: x @ self.body(self.table).mT,
}


@pytest.mark.parametrize("forward", QUIET.values(), ids=QUIET)
def test_other_uses_of_parameters_are_not_noted(forward):
    assert plan(with_parameters(forward), example_input=tokens()).notes == ()


def test_many_loose_parameters_are_counted():
    model = FromFunction(lambda self, x: self.fc(x @ self.a @ self.b @ self.c @ self.d @ self.e), fc=nn.Linear(6, 2))
    for name in "abcde":
        setattr(model, name, nn.Parameter(torch.randn(6, 6)))
    assert any(
        note.startswith("Not converted: a, b, c and 2 more,") for note in plan(model, example_input=tokens()).notes
    )


def test_a_weight_of_a_layer_multiplied_elsewhere_has_its_row_and_no_note():
    model = FromFunction(lambda self, x: self.fc(x) @ self.fc.weight, fc=nn.Linear(6, 6))
    report = plan(model, example_input=tokens())
    assert report.decisions[0].rule == "functional"
    assert not any("Not converted" in note for note in report.notes)


def test_both_sides_of_a_branch_on_data_work_though_one_was_recorded():
    def forward(self, x):
        return self.fc(self.small(x) if x.abs().max() < 1 else self.large(x))

    model = FromFunction(forward, small=nn.Linear(6, 6), large=nn.Linear(6, 6), fc=nn.Linear(6, 2))
    found = told(model, 0.1 * tokens().clamp(-1, 1))
    assert found["small"] == ("convert", "body", CONVERTED)
    assert found["large"] == ("keep", "unused", "runs neither in eval nor in train mode")
    converted = spherify(model, example_input=0.1 * tokens().clamp(-1, 1))
    assert converted(100 * tokens()).isfinite().all()


def test_a_model_called_with_a_dict_in_a_tuple():
    model = FromFunction(
        lambda self, batch: {"y": self.fc(self.body(batch["x"]))}, body=nn.Linear(6, 6), fc=nn.Linear(6, 2)
    )
    batch = {"x": tokens(), "unused": None}
    converted = spherify(model, example_input=(batch,))
    assert converted_layers(converted) == {"body"}
    assert converted(batch)["y"].shape == (2, 5, 2)


class Composite(nn.Module):
    """All ten at once."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)  # called twice
        self.also_shared = self.shared  # under two names
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight  # tied
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.adapted = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.mixer = nn.Parameter(torch.randn(8, 8))
        self.calm = nn.Linear(8, 8)
        self.wild = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, batch):
        x = F.relu(self.also_shared(F.relu(self.shared(F.relu(self.stem(batch["pixels"]))))))
        x = x.mean((2, 3))
        x = self.second(F.relu(self.first(x)))
        x = self.spectral(F.relu(self.normed(x)))
        x = self.frozen(F.relu(self.adapted(x)))
        x = torch.einsum("nd,de->ne", x, self.mixer)
        x = self.calm(x) if x.isfinite().all() else self.wild(x)
        return {"logits": self.fc(F.relu(x)), "features": x}


def composite():
    torch.manual_seed(0)
    model = with_lora(Composite(), "adapted").base_model.model.requires_grad_(True)  # peft had frozen all else
    model.frozen.requires_grad_(False)
    return model


def batch():
    return {"pixels": image()}


def test_ten_difficulties_at_once_each_layer_is_accounted_for():
    report = plan(composite(), example_input=(batch(),))
    adapter = ("unsupported", "obstacle", LORA.format("adapted"))
    converted = ("convert", "body", CONVERTED)
    assert {d.site.name: (d.action, d.rule, d.reason) for d in report.decisions} == {
        "stem": converted,
        "shared": converted,
        "first": converted,
        "second": converted,
        "normed": ("unsupported", "obstacle", PARAMETRISED),
        "spectral": ("unsupported", "obstacle", PARAMETRISED),
        "adapted.base_layer": adapter,
        "adapted.lora_A.default": adapter,
        "adapted.lora_B.default": adapter,
        "frozen": converted,
        "calm": converted,
        "wild": ("keep", "unused", "runs neither in eval nor in train mode"),
        "fc": ("keep", "head", "the classifier; head=keep"),
    }
    assert report.decisions[1].site.aliases == ("also_shared",)
    assert report.notes == ("Not converted: mixer, multiplied with an activation outside any conv or linear layer.",)


def test_ten_difficulties_at_once_the_converted_model_runs_and_learns():
    model, seen = composite(), []
    model.shared.register_forward_hook(lambda *_: seen.append("shared"))
    converted = spherify(model, example_input=(batch(),), inplace=True)
    assert seen == []
    assert converted.shared is converted.also_shared
    assert converted.first.weight is converted.second.weight
    for training in (False, True):
        output = converted.train(training)(batch())
        assert output["logits"].isfinite().all()
    assert seen == ["shared"] * 4
    output["logits"].square().sum().backward()
    without = {name for name, value in converted.named_parameters() if value.requires_grad and value.grad is None}
    assert without == {"wild.weight", "wild.bias"}  # the side of the branch that was not taken
    assert {value.grad for value in converted.frozen.parameters()} == {None}


def test_ten_difficulties_at_once_are_taken_back_bit_for_bit():
    model = composite().eval()
    before, state = model(batch()), copy.deepcopy(model.state_dict())
    restored = unspherify(spherify(model, example_input=(batch(),)))
    after = restored(batch())
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert list(restored.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in restored.state_dict().items())
    assert restored.shared is restored.also_shared
    assert {name for name, value in restored.named_parameters() if not value.requires_grad} == {
        name for name, value in model.named_parameters() if not value.requires_grad
    }
