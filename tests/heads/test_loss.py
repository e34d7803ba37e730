"""The loss against float64 references written from the printed formulas, its labels, its schedule, its surroundings."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from angular_samples import normal
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from spherify.errors import ModelError, OptionError
from spherify.heads import SCHEDULES, AngularConv2d, AngularLinear, AngularLoss, MarginSchedule, criterion
from spherify.heads.loss import HEADS_OF_MODEL

HEADS = {  # head, operator, k, margin
    "w cosine": ("w-softmax", "cosine", None, None),
    "w sigmoid": ("w-softmax", "sigmoid", 0.3, None),
    "a": ("a-softmax", "cosine", None, 4.0),
    "ga cosine": ("ga-softmax", "cosine", None, 3.0),
    "ga linear": ("ga-softmax", "linear", None, 4.0),
    "ga linear 1.7": ("ga-softmax", "linear", None, 1.7),
    "ga sigmoid": ("ga-softmax", "sigmoid", 0.3, 4.0),
    "s": ("s-softmax", "cosine", None, None),
    "cosface": ("cosface", "cosine", None, 0.35),
    "arcface": ("arcface", "cosine", None, 0.5),
    "v1": ("sphereface-r-v1", "cosine", None, 1.5),
    "v2": ("sphereface-r-v2", "cosine", None, 1.5),
}


def make(name: str, **more) -> AngularLinear:
    head, operator, k, margin = HEADS[name]
    torch.manual_seed(0)
    return AngularLinear(6, 5, dtype=torch.float64, head=head, operator=operator, k=k, margin=margin, **more)


def labels(count: int = 16) -> torch.Tensor:
    return torch.arange(count) % 5


def g(theta: float, operator: str, k: float | None) -> float:
    if operator == "cosine":
        return math.cos(theta)
    if operator == "linear":
        return 1 - 2 * theta / math.pi
    assert k is not None
    e = math.exp(-math.pi / (2 * k))
    inner = math.exp(theta / k - math.pi / (2 * k))
    return (1 + e) / (1 - e) * (1 - inner) / (1 + inner)


def psi_of(head: str, theta: float, operator: str, k: float | None, m: float) -> float:
    """What the right class gets, by each paper's formula."""
    if head in ("a-softmax", "ga-softmax"):
        kappa = min(math.floor(m * theta / math.pi), math.ceil(m) - 1)
        return g(m * theta - kappa * math.pi, operator, k) - 2 * kappa
    if head == "cosface":
        return math.cos(theta) - m
    if head == "arcface":
        return math.cos(theta + m) if theta <= math.pi - m else -2 - math.cos(theta + m)
    if head == "sphereface-r-v1":
        return math.cos(min(m * theta, math.pi))
    return g(theta, operator, k)


def reference(layer: AngularLinear, x: torch.Tensor, y: torch.Tensor, share: float = 1.0) -> float:
    """Eq. 9 to 11 as they are printed, one sample after the other."""
    s, total = layer.settings, 0.0
    m = s.margin * (share if s.kind in ("cosface", "arcface") else 1.0)
    for vector, label in zip(x, y.tolist(), strict=True):
        norm = math.sqrt(float(vector @ vector) + s.eps)
        logits = []
        for j, w in enumerate(layer.weight.detach()):
            theta = math.acos(float(vector @ w) / norm / math.sqrt(float(w @ w) + s.eps))
            value = plain = g(theta, s.operator, s.k)
            if s.kind == "sphereface-r-v2":
                value = plain if j == label else math.cos(theta / m)
            elif j == label:
                value = psi_of(s.kind, theta, s.operator, s.k, m)
            if s.kind not in ("cosface", "arcface"):
                value = share * value + (1 - share) * plain
            logits.append(value * (s.scale or norm))
        top = max(logits)
        total += top + math.log(sum(math.exp(z - top) for z in logits)) - logits[label]
    return total / len(y)


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_printed_one(name):
    layer, x = make(name), normal(16, 6)
    assert criterion(layer)(layer(x), labels()).item() == pytest.approx(reference(layer, x, labels()), abs=1e-7)


@pytest.mark.parametrize("name", ["a", "ga sigmoid", "cosface", "arcface", "v2"])
def test_the_schedule_mixes_psi_with_the_plain_response(name):
    layer, x = make(name), normal(16, 6)
    loss_of = criterion(layer, schedule=MarginSchedule(base=10.0, gamma=0.5))
    for _ in range(6):
        loss_of.step()
    share = 1 / (1 + 10 / 4)
    assert loss_of.share.item() == pytest.approx(share)
    assert loss_of(layer(x), labels()).item() == pytest.approx(reference(layer, x, labels(), share), abs=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_those_of_the_values(name):
    layer = make(name)
    loss_of = criterion(layer)
    x = normal(6, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: loss_of(torch.func.functional_call(layer, {"weight": w}, (x,)), labels(6)),
        (x, layer.weight.detach().requires_grad_()),
        atol=1e-4,
    )


def test_a_softmax_is_ga_softmax_with_the_cosine():
    one, other = make("a"), make("ga cosine")
    other.settings = AngularLinear(6, 5, head="ga-softmax", operator="cosine", margin=4).settings
    x = normal(16, 6)
    assert torch.equal(criterion(one)(one(x), labels()), criterion(other)(other(x), labels()))


@pytest.mark.parametrize(("operator", "k"), [("cosine", None), ("linear", None), ("sigmoid", 0.3)])
def test_margin_one_is_w_softmax(operator, k):
    torch.manual_seed(0)
    one = AngularLinear(6, 5, head="ga-softmax", operator=operator, k=k, margin=1)
    other = AngularLinear(6, 5, head="w-softmax", operator=operator, k=k)
    other.weight = one.weight
    x = normal(16, 6).float()
    assert torch.equal(criterion(one)(one(x), labels()), criterion(other)(other(x), labels()))


@pytest.mark.parametrize("name", HEADS)
def test_evaluation_is_plain_cross_entropy(name):
    layer, x = make(name).eval(), normal(16, 6)
    loss_of = criterion(layer)
    with torch.no_grad():
        assert_close(loss_of(layer(x), labels()), F.cross_entropy(layer(x), labels()))
    assert_close(loss_of.eval()(layer(x), labels()), F.cross_entropy(layer(x), labels()))


@pytest.mark.parametrize("name", ["a", "ga linear", "ga sigmoid", "cosface", "arcface", "v1", "v2"])
def test_the_margin_makes_the_loss_larger(name):
    layer, x = make(name), normal(16, 6)
    assert criterion(layer)(layer(x), labels()) > F.cross_entropy(layer(x)[:, :5], labels())


def test_label_smoothing_is_torchs_on_the_logits_with_the_margin():
    layer, x = make("cosface", scale=4.0), normal(16, 6)
    margined = layer(x) - 0.35 * 4.0 * F.one_hot(labels(), 5)
    expected = F.cross_entropy(margined, labels(), label_smoothing=0.1)
    assert_close(criterion(layer, label_smoothing=0.1)(layer(x), labels()), expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_ignored_labels(reduction):
    layer, x = make("ga linear"), normal(6, 6)
    y = torch.tensor([0, -100, 2, 3, -100, 1])
    kept = y != -100
    loss = criterion(layer, reduction=reduction)(layer(x), y)
    expected = criterion(layer, reduction=reduction)(layer(x[kept]), y[kept])
    if reduction == "none":
        assert loss[~kept].eq(0).all()
        loss = loss[kept]
    assert_close(loss, expected)


def test_labels_of_any_integer_type_will_do():
    layer, x = make("ga linear"), normal(16, 6)
    expected = criterion(layer)(layer(x), labels())
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert torch.equal(criterion(layer)(layer(x), labels().to(dtype)), expected)


# ---------------------------------------------------------------------------------------------- surroundings


def test_a_mean_over_positions_keeps_the_response_in_its_range():
    head = AngularConv2d(6, 5, dtype=torch.float64)
    out = head(normal(4, 6, 3, 3)).mean((2, 3))
    response = out[:, :5] / (out[:, 5:] / -64)
    assert response.abs().max() <= 1
    assert criterion(head)(out, labels(4)).isfinite()


def test_dense_prediction_is_the_mean_over_pixels():
    head = AngularConv2d(6, 5, dtype=torch.float64)
    x, y = normal(2, 6, 3, 4), torch.arange(24).view(2, 3, 4) % 5
    flat = AngularLinear(6, 5, dtype=torch.float64)
    flat.weight.data = head.weight.data.flatten(1)
    expected = criterion(flat)(flat(x.movedim(1, -1).reshape(-1, 6)), y.flatten())
    assert_close(criterion(head)(head(x), y), expected)


@pytest.mark.parametrize(
    "kind", [tuple, list, lambda pair: {"out": pair[0], "aux": pair[1]}], ids=["tuple", "list", "dict"]
)
def test_several_outputs_give_the_mean_of_their_losses(kind):
    layer, x = make("ga linear"), normal(16, 6)
    loss_of = criterion(layer)
    one, two = loss_of(layer(x), labels()), loss_of(layer(2 * x), labels())
    assert_close(loss_of(kind([layer(x), layer(2 * x)]), labels()), (one + two) / 2)


def test_the_mean_of_two_heads_is_one_output():
    layer, x = make("ga linear"), normal(16, 6)
    assert_close(criterion(layer)((layer(x) + layer(x)) / 2, labels()), criterion(layer)(layer(x), labels()))


@pytest.mark.parametrize("name", ["a", "ga linear", "ga sigmoid", "arcface", "v2"])
def test_compiled_autocast_and_checkpointed_training_gives_the_same_loss(name):
    layer, x = make(name).float(), normal(16, 6).float().requires_grad_()
    loss_of = criterion(layer, schedule="sphereface")
    expected = loss_of(layer(x), labels())
    again = loss_of(checkpoint(layer, x, use_reentrant=False), labels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss_of(layer(x), labels())
    assert torch.equal(again, expected)
    assert torch.equal(cast, expected)


def test_compilation_breaks_nowhere_and_steps_compile_nothing_anew():
    layer = make("ga linear").float()
    loss_of = criterion(layer, schedule="sphereface")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(lambda x, y: loss_of(layer(x), y), backend=counter, fullgraph=True)
    x = normal(16, 6).float()
    for _ in range(3):
        expected = loss_of(layer(x), labels())
        assert_close(run(x, labels()), expected)
        loss_of.step()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_step_is_saved_and_resumed():
    layer = make("ga linear")
    one = criterion(layer, schedule="sphereface")
    for _ in range(7):
        one.step()
    two = criterion(layer, schedule="sphereface")
    two.load_state_dict(one.state_dict())
    assert two.share.item() == one.share.item() == pytest.approx(1 / (1 + 1000 / (1 + 0.12 * 7)))
    assert copy.deepcopy(one).steps.item() == 7


def test_training_draws_features_to_their_classes():
    torch.manual_seed(0)
    x = normal(200, 8, seed=3).float()
    y = (x[:, :4]).argmax(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), AngularLinear(32, 4, margin=3))
    loss_of = criterion(model, schedule=MarginSchedule(base=10.0, gamma=0.2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        loss_of.step()
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.9


# ---------------------------------------------------------------------------------------------- refusals

WRONG_LABELS = {
    "too large": (
        torch.full((16,), 5),
        r"^a label is out of range for 5 classes: 5; give 0 to 4, or -100 to leave one",
    ),
    "negative": (torch.full((16,), -1), r"^a label is out of range for 5 classes: -1;"),
    "soft": (
        torch.full((16, 5), 0.2),
        r"^soft labels .* and a margin exclude each other: the margin needs the one right",
    ),
    "bool": (torch.ones(16, dtype=torch.bool), r"^labels of type torch\.bool are no class numbers; give integers"),
    "shape": (
        torch.zeros(8).long(),
        r"^labels of shape \(8,\) do not fit logits of shape \(16, 6\); give shape \(16,\)\.$",
    ),
    "one-hot": (torch.zeros(16, 5).long(), r"^labels of shape \(16, 5\) do not fit logits of shape \(16, 6\)"),
}


@pytest.mark.parametrize(("y", "message"), WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_wrong_labels_are_refused_in_one_line(y, message):
    layer = make("ga linear")
    with pytest.raises(OptionError, match=message):
        criterion(layer)(layer(normal(16, 6)), y)


def test_float_class_numbers_are_refused_without_a_margin_too():
    layer = make("w cosine")
    with pytest.raises(OptionError, match=r"^labels of type torch\.float32 are no class numbers; give integers"):
        criterion(layer)(layer(normal(16, 6)), labels().float())


def test_soft_labels_are_refused_where_a_scaled_head_has_a_margin_and_taken_where_there_is_none():
    soft = torch.full((16, 5), 0.2, dtype=torch.float64)
    layer = make("arcface")
    with pytest.raises(OptionError, match=r"^soft labels"):
        criterion(layer)(layer(normal(16, 6)), soft)
    plain = make("w cosine")
    out = plain(normal(16, 6))
    assert_close(criterion(plain)(out, soft), F.cross_entropy(out, soft))


def test_wrong_outputs_are_refused_in_one_line():
    loss_of = criterion(make("ga linear"))
    with pytest.raises(OptionError, match=r"^logits of shape \(16, 7\) do not have the 5 classes of this criterion"):
        loss_of(normal(16, 7), labels())
    with pytest.raises(OptionError, match=r"^the output is a NoneType without a tensor; give the model's logits\.$"):
        loss_of(None, labels())
    with pytest.raises(
        OptionError, match=r"^an output of type torch\.int64 and shape \(16, 5\) holds no logits; give what"
    ):
        loss_of(torch.zeros(16, 5).long(), labels())
    with pytest.raises(OptionError, match=r"^logits of shape \(16, 6\) do not have the 5 classes"):
        criterion(make("arcface"))(normal(16, 6), labels())


def test_wrong_arguments_are_refused():
    layer = make("ga linear")
    with pytest.raises(OptionError, match=r"^label_smoothing=1\.5 is out of range; choose a number in \[0, 1\)\.$"):
        criterion(layer, label_smoothing=1.5)
    with pytest.raises(OptionError, match=r"^reduction 'max' is unknown; choose one of: mean, sum, none\.$"):
        criterion(layer, reduction="max")
    with pytest.raises(OptionError, match=r"^num_classes is missing; give the number of logits of the head\.$"):
        AngularLoss(layer.settings)
    with pytest.raises(
        OptionError, match=r"^schedule='sphereface': AngularLinear has a w-softmax head, without a margin"
    ):
        criterion(make("w cosine"), schedule="sphereface")
    with pytest.raises(OptionError, match=r"^schedule='warmup': Linear has a plain classifier, without a margin"):
        criterion(nn.Linear(3, 2), schedule="warmup")
    assert "warmup" in SCHEDULES


def test_a_plain_model_gets_torchs_loss():
    model, x = nn.Linear(6, 5), normal(16, 6).float()
    assert_close(
        criterion(model, label_smoothing=0.1)(model(x), labels()),
        F.cross_entropy(model(x), labels(), label_smoothing=0.1),
    )
    soft = torch.full((16, 5), 0.2)
    assert_close(criterion(model)(model(x), soft), F.cross_entropy(model(x), soft))


def test_heads_that_differ_have_no_common_loss():
    with pytest.raises(ModelError, match=r"^the heads 0 and 1 differ in kind or size; make an AngularLoss for each\.$"):
        criterion(nn.Sequential(AngularLinear(4, 4), AngularLinear(4, 4, margin=2)))


def test_a_head_that_was_replaced_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    setattr(model, HEADS_OF_MODEL, ("1",))
    with pytest.raises(ModelError, match=r"^1 was converted to an angular head and is a Linear now, without a margin;"):
        criterion(nn.Sequential(model))


def test_wrapped_for_distributed_training_it_is_found_and_trains(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(make("ga linear").float())
        out = model(normal(16, 6).float())
        assert out.shape == (16, 6)
        loss = criterion(model)(out, labels())
        loss.backward()
        assert loss.item() == pytest.approx(reference(make("ga linear"), normal(16, 6), labels()), abs=1e-4)
    finally:
        torch.distributed.destroy_process_group()
