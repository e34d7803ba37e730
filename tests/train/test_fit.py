"""The loop against plain loops written by hand, and what can be plugged into it."""

import copy
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from training_samples import QUIET, angular_net, are_equal, batches, data_set, difference, net, recipe, weights

from spherify.data.preprocess import Preprocessing
from spherify.errors import OptionError, SpherifyError
from spherify.heads.angular import AngularHead
from spherify.layers.angular import AngularLayer
from spherify.regularizers import orthogonality
from spherify.train.conduct import Conduct
from spherify.train.fit import fit
from spherify.train.loaders import Loaders, loaders_for
from spherify.train.objective import groups_for, objective_for
from spherify.train.recipe import resolved
from spherify.train.sync_bn import with_synchronised_norms

HOW = Preprocessing(input_size=(1, 8, 8), mean=(0.2,), std=(0.2,))


def by_hand(model: nn.Module, train, epochs: int, *, penalty=None, accumulate: int = 1, clip: float | None = None):
    """What ``recipe()`` says, in the plainest of loops."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=False)
    for _ in range(epochs):
        for first in range(0, len(train), accumulate):
            for x, y in train[first : first + accumulate]:
                loss = F.cross_entropy(model(x), y)
                loss = loss if penalty is None else loss + penalty(model)
                (loss / accumulate).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def fitted(model: nn.Module, train=None, **changes) -> dict[str, torch.Tensor]:
    fit(model, (batches() if train is None else train, None), recipe(**changes), conduct=QUIET)
    return weights(model)


@pytest.mark.parametrize("make", [net, angular_net], ids=["plain", "angular"])
def test_training_is_what_a_plain_loop_computes(make):
    model = make()
    twin = copy.deepcopy(model)
    assert difference(fitted(model), by_hand(twin, batches(), 2)) < 1e-6


def test_accumulated_gradients_are_those_of_the_larger_batch():
    small, large = fitted(net(), batches(6, 4), grad_accum_steps=2), fitted(net(), batches(3, 8))
    assert difference(small, large) < 1e-6
    assert difference(small, by_hand(net(), batches(6, 4), 2, accumulate=2)) < 1e-6


def test_gradients_are_clipped():
    assert difference(fitted(net(), clip_grad=0.1), by_hand(net(), batches(), 2, clip=0.1)) < 1e-6
    assert difference(fitted(net(), clip_grad=0.1), fitted(net())) > 1e-3


def test_the_penalty_on_filters_is_part_of_the_loss():
    model = angular_net()
    twin = copy.deepcopy(model)
    want = by_hand(twin, batches(), 2, penalty=lambda twin: 0.01 * orthogonality(twin))
    assert difference(fitted(model, orthogonality=0.01), want) < 1e-6
    assert not are_equal(fitted(angular_net(), energy=0.01), fitted(angular_net()))


def test_a_plain_model_has_no_penalty_on_angular_filters():
    assert are_equal(fitted(net(), orthogonality=0.01), fitted(net()))


def test_the_moving_average_is_what_is_given_back():
    model = net()
    done = fit(model, (batches(), batches(2)), recipe(model_ema=True, model_ema_decay=0.5), conduct=QUIET)
    assert done.model is not model
    assert not are_equal(weights(done.model), weights(model))
    assert done.rows[-1]["average_top1"] is not None
    twin = net()
    average = weights(twin)

    def follow(step: int, total: int) -> None:
        if step == 1:  # timm starts the average at the first step
            average.update(weights(twin))
        elif step > 1:
            for name, value in weights(twin).items():
                average[name] = average[name] * 0.5 + value * 0.5

    fit(twin, (batches(), None), recipe(), conduct=QUIET, on_step=[follow])
    follow(12, 12)
    warm = recipe(model_ema=True, model_ema_decay=0.5, model_ema_warmup=False)
    plain = fit(net(), (batches(), None), warm, conduct=QUIET)
    assert difference(weights(plain.model), average) < 1e-6


def test_it_learns_the_stripes():
    model = angular_net("sigmoid")
    chosen = resolved("fast", epochs=8, batch_size=8, lr=1e-2, train_crop_mode="pad", img_size=8)
    done = fit(model, loaders_for(HOW, data_set(96), chosen), chosen, conduct=QUIET)
    assert done.evaluation.top1 > 80  # by chance: 33
    assert done.evaluation.classes == ("rows", "columns", "none")
    assert done.rows[-1]["test_top1"] == done.evaluation.top1
    assert done.stopped_by is None


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def run(seed: int) -> dict[str, torch.Tensor]:
        model = net(dropout=0.3)
        fit(model, loaders_for(HOW, data_set(), recipe(seed=seed)), recipe(seed=seed), conduct=QUIET)
        return weights(model)

    assert are_equal(run(1), run(1))
    assert not are_equal(run(1), run(2))


def test_callbacks_are_told_of_every_step_before_it():
    told = []
    model = net()
    before = weights(model)
    first = []
    fit(
        model,
        (batches(), None),
        recipe(),
        conduct=QUIET,
        on_step=[lambda step, total: told.append((step, total)), lambda step, total: first.append(weights(model))],
    )
    assert told == [(step, 12) for step in range(12)]
    assert are_equal(first[0], before)


class Distilled(nn.Module):
    """An objective that looks at the inputs, counts the steps, and keeps its count in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.seen: list[torch.Tensor] = []

    def see(self, inputs: torch.Tensor) -> None:
        self.seen.append(inputs)

    def step(self) -> None:
        self.steps += 1

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs, self.seen[-1].flatten(1)[:, :3])


def test_an_objective_of_ones_own_sees_the_inputs_and_the_steps():
    objective = Distilled()
    done = fit(net(), (batches(), None), recipe(lr=0.01), objective=objective, conduct=QUIET)
    assert int(objective.steps) == 12
    assert len(objective.seen) == 12
    losses = [row["train_loss"] for row in done.rows]
    assert sum(losses[6:]) < sum(losses[:6])


def test_a_module_that_was_frozen_in_eval_mode_stays_so():
    model = net(norm=True)
    model[1].eval()
    before = model[1].running_mean.clone()
    fit(model, (batches(), batches(1)), recipe(), conduct=QUIET)
    assert torch.equal(model[1].running_mean, before)
    assert [model[0].training, model[1].training] == [True, False]


def test_a_model_in_eval_mode_is_put_into_train_mode():
    model = net(norm=True).eval()
    fit(model, (batches(), None), recipe(), conduct=QUIET)
    assert model[1].training
    assert model[1].running_mean.abs().sum() > 0


def test_mixup_mixes_images_and_labels_and_ends_where_asked():
    mixed = recipe(mixup=0.5, smoothing=0.1, mixup_off_epoch=1)
    loaders = Loaders(train=batches(), classes=("a", "b", "c"))
    seen = []

    class Watching(nn.Module):
        def forward(self, outputs, targets):
            seen.append(targets)
            return F.cross_entropy(outputs, targets)

    fit(net(), loaders, mixed, objective=Watching(), conduct=QUIET)
    assert all(targets.shape == (8, 3) for targets in seen)
    highest = [targets.max(1).values for targets in seen]
    assert any((values < 0.9).any() for values in highest[:6])
    assert all(torch.allclose(values, torch.tensor(1 - 0.1 + 0.1 / 3)) for values in highest[6:])
    with pytest.raises(OptionError, match="mixup and cutmix need the number of classes"):
        fit(net(), (batches(), None), mixed, conduct=QUIET)


def test_label_smoothing_is_not_applied_twice_behind_mixup():
    assert objective_for(net(), recipe(mixup=0.5, smoothing=0.1)).label_smoothing == 0.0
    assert objective_for(net(), recipe(smoothing=0.1)).label_smoothing == 0.1


@pytest.mark.parametrize("layout", [False, True], ids=["contiguous", "channels_last"])
def test_bfloat16_trains_near_full_precision_and_leaves_the_model_as_it_was(layout):
    model, plain = angular_net(), angular_net()
    fit(model, (batches(), batches(2)), recipe(amp=True, channels_last=layout), conduct=QUIET)
    fit(plain, (batches(), None), recipe(), conduct=QUIET)
    assert 0 < difference(weights(model), weights(plain)) < 0.1
    assert "forward" not in vars(model)
    assert not [name for name in vars(model) if "original" in name]
    copy.deepcopy(model)
    assert next(model.parameters()).dtype == torch.float32


def test_a_margin_head_is_trained_with_its_margin_and_tested_without():
    from spherify.convert import spherify

    try:
        model = spherify(net(), head="a-softmax", example_input=torch.zeros(2, 1, 8, 8))
    except OptionError:
        pytest.skip("this version converts no heads")
    assert any(isinstance(module, AngularHead) for module in model.modules())
    done = fit(model, (batches(), batches(2)), recipe(margin_schedule="warmup", lr=0.01), conduct=QUIET)
    assert done.rows[-1]["train_top1"] is not None
    assert done.evaluation.confusion.shape == (3, 3)


def test_decay_spares_angular_filters_and_vectors():
    model = angular_net()
    groups = groups_for(model, recipe(weight_decay=0.1))
    spared = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    own = [layer.weight for layer in model.modules() if isinstance(layer, AngularLayer)]
    assert own
    assert all(id(weight) in spared for weight in own)
    assert id(model[7].weight) not in spared


def test_layer_decay_reaches_timms_models():
    model = timm.create_model("test_vit")
    fit(model, ([(torch.randn(2, 3, 160, 160), torch.tensor([0, 1]))], None), recipe(layer_decay=0.5), conduct=QUIET)


def test_a_schedule_moves_with_every_step():
    done = fit(net(), (batches(), None), recipe(sched="cosine", warmup_epochs=1, warmup_lr=0.01), conduct=QUIET)
    rates = [row["lr"] for row in done.rows]
    assert len(set(rates)) == len(rates) == 12
    assert rates[-1] == pytest.approx(0.0)


def test_the_log_has_a_row_each_interval_and_for_each_test():
    done = fit(
        net(), (batches(), batches(2)), recipe(epochs=4), conduct=Conduct(quiet=True, log_interval=4, val_interval=2)
    )
    assert [row["step"] for row in done.rows] == [4, 8, 12, 16, 20, 24]
    assert [row["step"] for row in done.rows if row["test_loss"] is not None] == [12, 24]


def test_part_of_an_epoch_can_be_trained():
    done = fit(net(), (batches(), None), recipe(epochs=1.5), conduct=QUIET)
    assert done.step == 9
    assert fit(net(), (batches(), None), recipe(steps=4), conduct=QUIET).step == 4


class Sampled(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int):
        return torch.full((1, 8, 8), float(index) / 24), index % 3


def test_a_data_loader_of_ones_own_will_do():
    loader = torch.utils.data.DataLoader(Sampled(), batch_size=4)
    assert fit(net(), (loader, loader), recipe(), conduct=QUIET).evaluation.images == 24


def test_batches_without_a_length_are_refused():
    with pytest.raises(OptionError, match="the training batches have no length; give a DataLoader"):
        fit(net(), (iter(batches()), None), recipe(), conduct=QUIET)
    with pytest.raises(OptionError, match="1 training batches are too few for grad_accum_steps=2"):
        fit(net(), (batches(1), None), recipe(grad_accum_steps=2), conduct=QUIET)


def test_what_this_machine_cannot_do_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(OptionError, match="amp_dtype float16 needs a GPU; choose bfloat16"):
        fit(net(), (batches(), None), recipe(amp=True, amp_dtype="float16"), conduct=QUIET)
    with pytest.raises(OptionError, match="sync_bn needs GPUs"):
        fit(net(norm=True), (batches(), None), recipe(sync_bn=True), conduct=QUIET)


def test_norms_are_synchronised_for_a_while_and_are_then_what_they_were():
    model = net(norm=True)
    norm, state = model[1], set(vars(model[1]))
    with with_synchronised_norms(model):
        assert type(norm) is nn.SyncBatchNorm
        assert norm.process_group is None
    assert type(norm) is nn.BatchNorm2d
    assert set(vars(norm)) == state


def test_conduct_out_of_range_is_refused():
    with pytest.raises(OptionError, match="log_interval=0 must be above 0"):
        Conduct(log_interval=0)


def test_the_generators_start_from_the_seed():
    drawn = []
    for _ in range(2):
        np.random.rand(5)
        torch.rand(5)
        fit(net(), (batches(), None), recipe(steps=1), conduct=QUIET, on_step=[lambda *_: drawn.append(torch.rand(1))])
    assert torch.equal(drawn[0], drawn[1])


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        SpherifyError, match=r"training needs accelerate; install it with: pip install 'spherify\[train\]'"
    ):
        fit(net(), (batches(), None), recipe(), conduct=QUIET)
