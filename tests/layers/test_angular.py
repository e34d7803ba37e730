"""What every angular layer adds to its twin: k within its range, a gain that keeps the scale, and learning."""

import math

import pytest
import torch
from angular_samples import normal
from torch import nn
from torch.testing import assert_close

from spherify.functional.learned_k import k_from_logit, k_to_logit
from spherify.functional.responses import K_MAX, K_MIN, K_SHARED, checked_k
from spherify.layers import SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear

OPERATORS = ["cosine", "linear", "sigmoid", "learnable"]
LAYERS = {
    "conv1d": lambda **options: SphereConv1d(32, 48, 3, **options),
    "conv2d": lambda **options: SphereConv2d(16, 48, 3, **options),
    "conv3d": lambda **options: SphereConv3d(8, 48, 2, **options),
    "linear": lambda **options: SphereLinear(64, 48, **options),
}
INPUTS = {"conv1d": (16, 32, 40), "conv2d": (8, 16, 10, 10), "conv3d": (8, 8, 5, 5, 5), "linear": (512, 64)}
each_layer = pytest.mark.parametrize("layer", LAYERS)
each_operator = pytest.mark.parametrize("operator", OPERATORS)


def is_within_its_range(k: torch.Tensor) -> bool:
    return all(K_MIN <= number <= K_MAX for number in k.flatten().tolist())


# k


@each_layer
def test_a_fixed_k_is_0_3_unless_given(layer):
    assert LAYERS[layer](operator="sigmoid").k == 0.3
    assert LAYERS[layer](operator="sigmoid", k=0.7).k == 0.7


@each_layer
def test_a_learned_k_starts_at_0_5_unless_given(layer):
    assert_close(LAYERS[layer](operator="learnable").k, torch.full((48,), 0.5))
    assert_close(LAYERS[layer](operator="learnable", k=2.0).k, torch.full((48,), 2.0))


@pytest.mark.parametrize("operator", ["cosine", "linear"])
def test_an_operator_without_k_has_none(operator):
    assert SphereLinear(5, 4, operator=operator).k is None


@pytest.mark.parametrize(("k_shared", "count"), [("filter", 48), ("layer", 1), ("network", 1)])
@each_layer
def test_one_k_stands_for_what_shares_it(layer, k_shared, count):
    sphere = LAYERS[layer](operator="learnable", k_shared=k_shared)
    assert sphere.k_logit.shape == (count,)
    assert sphere(normal(*INPUTS[layer], dtype=torch.float32)).isfinite().all()


def test_every_way_of_sharing_is_tried_above():
    assert K_SHARED == ("filter", "layer", "network")


@pytest.mark.parametrize("k", [2e-3, 0.05, 0.3, 0.5, 1.0, 30.0, 500.0])
def test_k_comes_back_from_its_logit(k):
    assert k_from_logit(torch.tensor(k_to_logit(k), dtype=torch.float64)).item() == pytest.approx(k, rel=1e-9)


@pytest.mark.parametrize("k", [K_MIN, K_MAX])
def test_the_ends_of_the_range_come_back_nearly(k):
    # They lie at infinite logits; the millionth of the range that is left out is 1.4e-5 of k.
    assert k_from_logit(torch.tensor(k_to_logit(k))).item() == pytest.approx(k, rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-1e30, -1e4, -100.0, -17.0, 0.0, 17.0, 100.0, 1e4, 1e30])
def test_no_logit_takes_k_out_of_its_range(logit, dtype):
    logits = torch.tensor([logit], dtype=dtype)
    assert is_within_its_range(k_from_logit(logits))
    assert checked_k("sigmoid", k_from_logit(logits).item())  # what was learned can be given as a number


@pytest.mark.parametrize("logit", [-1e30, -100.0, 100.0, 1e30])
@each_layer
def test_a_logit_set_by_hand_leaves_every_value_and_gradient_finite(layer, logit):
    sphere, x = LAYERS[layer](operator="learnable"), normal(*INPUTS[layer], dtype=torch.float32).requires_grad_()
    with torch.no_grad():
        sphere.k_logit.fill_(logit)
    out = sphere(x)
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in [x, *sphere.parameters()])


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(
    "optimiser",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=1e6),
        lambda parameters: torch.optim.Adam(parameters, lr=10.0),
        lambda parameters: torch.optim.SGD(parameters, lr=1.0, weight_decay=100.0),
    ],
    ids=["sgd", "adam", "decay"],
)
@each_layer
def test_no_step_of_an_optimiser_takes_k_out_of_its_range(layer, optimiser, direction):
    torch.manual_seed(0)
    sphere, x = LAYERS[layer](operator="learnable"), normal(*INPUTS[layer], dtype=torch.float32)
    start, steps = sphere.k.detach().clone(), optimiser([sphere.k_logit])
    for _ in range(10):
        steps.zero_grad()
        (direction * sphere(x).square().mean()).backward()
        assert sphere.k_logit.grad.isfinite().all()
        steps.step()
        assert is_within_its_range(sphere.k)
    assert not torch.equal(sphere.k, start)
    assert sphere(x).isfinite().all()


def test_the_gradient_reaches_k_of_each_filter_from_its_own_channel():
    sphere = SphereConv2d(4, 6, 3, operator="learnable")
    sphere(normal(2, 4, 6, 6, dtype=torch.float32))[:, 2].sum().backward()
    assert sphere.k_logit.grad.nonzero().flatten().tolist() == [2]


# Gain


@each_operator
@each_layer
def test_the_gain_gives_the_output_the_scale_of_the_twin(layer, operator):
    torch.manual_seed(0)
    sphere = LAYERS[layer](operator=operator, gain=True, bias=False)
    plain = LAYERS[layer](operator="identity", bias=False)
    plain.weight = sphere.weight
    x = normal(*INPUTS[layer], dtype=torch.float32)
    ratio = (sphere(x).std() / plain(x).std()).item()
    assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("channels", [1, 3, 64])
@pytest.mark.parametrize("k", [1e-3, 1e-2, 0.1, 0.3, 10.0])
def test_the_gain_holds_for_responses_steep_and_flat_and_for_every_fan_in(k, channels):
    torch.manual_seed(0)
    sphere = SphereConv2d(channels, 64, 3, operator="sigmoid", k=k, gain=True, bias=False)
    plain = SphereConv2d(channels, 64, 3, operator="identity", bias=False)
    plain.weight = sphere.weight
    x = normal(32, channels, 12, 12, dtype=torch.float32)
    assert (sphere(x).std() / plain(x).std()).item() == pytest.approx(1, abs=0.03)


@each_operator
def test_the_gain_does_not_depend_on_the_length_of_the_filters_before_it(operator):
    plain = nn.Conv2d(16, 8, 3, bias=False)
    with torch.no_grad():
        plain.weight *= torch.logspace(-1, 2, 8).view(-1, 1, 1, 1)
    x = normal(8, 16, 10, 10, dtype=torch.float32)
    sphere = SphereConv2d.from_conv(plain, operator=operator, gain=True)
    ratio = sphere(x).std((0, 2, 3)) / plain(x).std((0, 2, 3))
    assert_close(ratio, torch.ones(8), rtol=0, atol=0.05)


def test_the_gain_of_a_grouped_convolution_counts_the_channels_of_one_group():
    plain = nn.Conv2d(64, 64, 3, groups=4, bias=False)
    x = normal(4, 64, 8, 8, dtype=torch.float32)
    ratio = SphereConv2d.from_conv(plain, gain=True)(x).std() / plain(x).std()
    assert ratio.item() == pytest.approx(1, abs=0.03)


@each_layer
def test_without_gain_no_response_leaves_the_range(layer):
    x = 100 * normal(*INPUTS[layer], dtype=torch.float32)
    for operator in OPERATORS:
        assert LAYERS[layer](operator=operator, bias=False)(x).abs().max() <= 1


@each_operator
def test_the_whole_layer_compiles(operator):
    torch.compiler.reset()
    sphere, x = SphereConv2d(4, 6, 3, groups=2, operator=operator, gain=True), normal(2, 4, 6, 6).float()
    assert_close(torch.compile(sphere, fullgraph=True, backend="aot_eager")(x), sphere(x))


# Training


@each_operator
@pytest.mark.parametrize("gain", [True, False])
def test_training_a_small_network_lowers_its_loss(operator, gain):
    torch.manual_seed(0)
    options = dict(operator=operator, gain=gain)
    network = nn.Sequential(
        SphereConv2d(3, 8, 3, padding=1, **options),
        nn.ReLU(),
        SphereConv2d(8, 8, 3, stride=2, groups=2, **options),
        nn.ReLU(),
        nn.Flatten(),
        SphereLinear(8 * 3 * 3, 16, **options),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    x, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    x += labels.view(-1, 1, 1, 1) * torch.randn(1, 3, 8, 8)
    optimiser, losses = torch.optim.Adam(network.parameters(), lr=1e-2), []
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(x), labels)
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(4), abs=0.5)  # chance among four classes
    assert losses[-1] < losses[0] / 2
