"""The public function: what it achieves, what it leaves as it was, what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, Residual, conv_bn, image, small_net, timm_model
from torch import nn

from spherify import ModelError, OptionError, RewriteError, calibrate, load, save, spherify

IMAGES = image(48, 3, 16, 16)


@torch.no_grad()
def scrambled(model: nn.Module, images=IMAGES) -> nn.Module:
    """Norms with weights of their own and the statistics of these images, as a trained network has them."""
    generator = torch.Generator().manual_seed(1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
        norm.bias.copy_(torch.rand(norm.bias.shape, generator=generator) - 0.5)
        norm.momentum = 1.0
    model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def residual_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [*conv_bn(3, 8), nn.ReLU(), Residual(8, 8), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 5)]
    return scrambled(nn.Sequential(*layers))


@torch.no_grad()
def distance(model: nn.Module, donor: nn.Module, images=IMAGES) -> float:
    answer, truth = model.eval()(images), donor.eval()(images)
    return float((answer - truth).norm() / truth.norm())


# ---------------------------------------------------------------------------------------------- what it achieves


@pytest.mark.parametrize("operator", ["cosine", "linear", "sigmoid", "learnable"])
def test_each_method_comes_nearer_to_the_donor(operator):
    donor = residual_net()
    errors = {}
    for method in ("statistics", "transplant"):
        model = spherify(donor, operator=operator, example_input=IMAGES[:2])
        swapped = distance(model, donor)
        calibrate(model, IMAGES, method)
        errors[method] = distance(model, donor)
    assert errors["transplant"] < 0.7 * errors["statistics"] < 0.7 * swapped


def test_without_batch_norms_every_channel_gets_the_donors_mean_and_spread():
    donor = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False)).eval()
    model = spherify(donor, include=["*"], head="convert", example_input=IMAGES[:2]).eval()
    calibrate(model, IMAGES, "statistics")
    with torch.no_grad():
        answer, truth = model(IMAGES), donor(IMAGES)
    torch.testing.assert_close(answer.mean((0, 2, 3)), truth.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(answer.std((0, 2, 3)), truth.std((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_batch_norm_statistics_are_those_of_all_images_and_need_no_donor():
    donor = scrambled(nn.Sequential(*conv_bn(3, 4), nn.ReLU()))
    model = spherify(donor, head="convert", example_input=IMAGES[:2])
    model[0].weight.data.mul_(3.0)  # the donor can no longer be taken from it
    report = calibrate(model, IMAGES.split(16), "statistics")
    with torch.no_grad():
        inputs = model[0](IMAGES)
    torch.testing.assert_close(model[1].running_mean, inputs.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, inputs.var((0, 2, 3)), rtol=1e-2, atol=1e-6)
    assert report.layers == ()


def test_a_transplanted_norm_answers_alike_in_train_and_eval_mode():
    donor = residual_net()
    model = spherify(donor, example_input=IMAGES[:2])
    calibrate(model, IMAGES, "transplant")
    with torch.no_grad():
        torch.testing.assert_close(model.train()(IMAGES), model.eval()(IMAGES), rtol=0.1, atol=0.1)


def test_a_layer_called_twice_is_fitted_to_both_calls():
    torch.manual_seed(0)
    donor = FromFunction(lambda m, x: m.conv(F.relu(m.conv(x))), conv=nn.Conv2d(3, 3, 3, padding=1)).eval()
    model = spherify(donor, head="convert", example_input=IMAGES[:2])
    errors = [distance(model, donor)]
    for method in ("statistics", "transplant"):
        calibrate(model, IMAGES, method, donor=donor)
        errors.append(distance(model, donor))
    assert errors[2] < errors[1] < errors[0]


KINDS = [
    "test_efficientnet",
    pytest.param("test_vit", marks=pytest.mark.slow),
    pytest.param("test_convnext", marks=pytest.mark.slow),
    pytest.param("test_nfnet", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_networks(name):
    images = image(16, 3, 64, 64) if name != "test_vit" else image(8, 3, 160, 160)
    donor = scrambled(timm_model(name), images)
    errors = []
    for method in ("statistics", "transplant"):
        model = spherify(donor, example_input=images[:2])
        report = calibrate(model, images, method)
        errors.append(report.logits.error)
    assert errors[1] < errors[0]


def test_attention_with_a_packed_weight():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    donor = nn.Sequential(layer, nn.Flatten(), nn.Linear(96, 4)).eval()
    tokens = image(40, 6, 16)
    errors = []
    for method in ("statistics", "transplant"):
        model = spherify(donor, example_input=tokens[:2])
        calibrate(model, tokens, method, refit_kept=False)
        errors.append(distance(model, donor, tokens))
    assert errors[1] < errors[0]


# ---------------------------------------------------------------------------------------------- what it leaves


@pytest.mark.parametrize("method", ["statistics", "transplant", "reconstruct"])
def test_modes_flags_and_momenta_are_as_before(method):
    model = spherify(residual_net(), example_input=IMAGES[:2]).train()
    model[1].eval()
    model[1].momentum = 0.3
    model[0].weight.requires_grad_(False)
    donor_state = copy.deepcopy(model.state_dict())
    calibrate(model, IMAGES, method)
    assert model.training and not model[1].training and model[3].training
    assert model[1].momentum == 0.3
    assert not model[0].weight.requires_grad and model[3].one[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert donor_state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("method", ["statistics", "transplant", "reconstruct"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(method):
    states = []
    for _ in range(2):
        model = spherify(residual_net(), example_input=IMAGES[:2])
        calibrate(model, IMAGES, method, seed=3)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_labels_are_not_looked_at_and_batches_may_be_any_iterable():
    states = []
    for batches in (IMAGES, iter(IMAGES.split(7)), [(part, "label") for part in IMAGES.split(20)]):
        model = spherify(residual_net(), example_input=IMAGES[:2])
        calibrate(model, batches, "transplant")
        states.append(model[0].weight)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_a_failure_leaves_the_weights_as_they_were():
    model = spherify(residual_net(), example_input=IMAGES[:2])
    before = copy.deepcopy(model.state_dict())

    def stop(name: str) -> None:
        if name != "0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, IMAGES, "transplant", progress=stop)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------- what it refuses


def test_an_unknown_method():
    with pytest.raises(OptionError, match="calibration method 'magic' is unknown; choose one of: statistics"):
        calibrate(spherify(small_net()), IMAGES, "magic")


def test_a_model_that_was_not_converted():
    with pytest.raises(RewriteError, match="is not a converted model"):
        calibrate(small_net(), IMAGES)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (IMAGES[:3], "got 3 images; give at least 8"),
        ([IMAGES, IMAGES[..., :8]], r"several sizes, \(3, 16, 16\) and \(3, 16, 8\)"),
        (["a"], "must be tensors .* got str"),
        (IMAGES * torch.nan, "hold NaN or infinite"),
        ([], "got 0 images"),
    ],
)
def test_images_that_cannot_be_used(batches, message):
    with pytest.raises(OptionError, match=message):
        calibrate(spherify(small_net()), batches)


def test_images_of_a_size_the_model_does_not_take():
    model = spherify(residual_net(), example_input=IMAGES[:2])
    with pytest.raises(ModelError, match=r"does not run on calibration images of shape \(4, 4, 16, 16\)"):
        calibrate(model, image(8, 4, 16, 16))


def test_a_changed_model_needs_its_donor(tmp_path):
    model = spherify(small_net())
    model[0].weight.data.mul_(1.1)
    with pytest.raises(ModelError, match="the donor is needed: this model's weights are not those"):
        calibrate(model, IMAGES)
    other = small_net()
    other[0].weight.data.mul_(1.1)
    loaded = load(save(spherify(small_net()), tmp_path / "saved"), base=other)
    with pytest.raises(ModelError, match="loaded from a folder"):
        calibrate(loaded, IMAGES)
    calibrate(loaded, IMAGES, donor=small_net())


def test_a_donor_that_is_another_network():
    with pytest.raises(RewriteError, match="the donor is not the network that was converted"):
        calibrate(spherify(small_net()), IMAGES, donor=residual_net())


# ---------------------------------------------------------------------------------------------- the report


def test_the_report_prints_draws_and_goes_to_json(tmp_path):
    model = spherify(residual_net(), example_input=IMAGES[:2])
    report = calibrate(model, IMAGES)
    assert [layer.name for layer in report.layers] == ["0", "3.one.0", "3.two.0", "3.projection.0"]
    assert all(layer.error < layer.error_before for layer in report.layers)
    assert "3.projection.0" in str(report) and "transplant: 48 images" in str(report)
    assert report.to_dict()["logits"]["error"] == report.logits.error
    pytest.importorskip("matplotlib")
    assert report.save_picture(tmp_path / "errors.png").stat().st_size > 5000
