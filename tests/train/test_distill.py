"""Annealing and distillation as a recipe drives them: what is computed, resumed, and refused."""

import copy

import pytest
import timm
import torch
from training_samples import CLASSES, QUIET, angular_net, are_equal, batches, data_set, difference, net, recipe, weights

from spherify.calibrate.anneal import Annealing, divergence_at
from spherify.convert import spherify
from spherify.errors import FileError, OptionError
from spherify.export.folder import save
from spherify.models.resolve import resolve
from spherify.train.begin import begin
from spherify.train.conduct import Conduct
from spherify.train.distill import Distilled, donor_for
from spherify.train.fit import fit

EXAMPLE = torch.zeros(2, 1, 8, 8)


def converted(**options):
    return spherify(net(norm=True), example_input=EXAMPLE, gain="none", **options)


@pytest.mark.parametrize("schedule", ["together", "progressive"])
def test_annealing_by_a_recipe_is_annealing_in_a_loop_of_ones_own(schedule):
    train, model = batches(), converted()
    twin = copy.deepcopy(model)
    fit(model, (train, None), recipe(anneal=schedule, anneal_until=0.5), conduct=QUIET)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    with Annealing(twin, schedule=schedule, until=0.5) as annealing:
        for step in range(12):
            annealing.on_step(step, 12)
            x, y = train[step % 6]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(twin(x), y).backward()
            optimizer.step()
    assert difference(weights(model), weights(twin)) < 1e-5
    assert not any(layer._forward_hooks for layer in model.modules())


def test_an_annealed_run_begins_as_the_donor():
    donor, answers = net(norm=True).train(), []
    model = converted()
    model.register_forward_hook(lambda module, inputs, output: answers.append(output.detach()))
    train = batches(2)
    fit(model, (train, None), recipe(steps=2, anneal="together"), conduct=QUIET)
    torch.testing.assert_close(answers[0], donor(train[0][0]), rtol=1e-3, atol=1e-3)


def test_an_annealed_and_distilled_run_that_was_cut_off_ends_with_the_same_weights(tmp_path):
    class Stop(Exception):
        pass

    def run(output=None, stop_at=None, resume=None):
        def cut(step, total):
            if step == stop_at:
                raise Stop

        chosen = recipe(anneal="progressive", distill=0.5, epochs=2)
        conduct = Conduct(quiet=True, checkpoint_steps=2)
        model = converted()
        fit(
            model,
            (batches(), batches(1)),
            chosen,
            output=output,
            resume=resume,
            on_step=[cut],
            conduct=conduct,
            donor=net(norm=True, seed=3),
        )
        return weights(model)

    with pytest.raises(Stop):
        run(tmp_path, stop_at=7)
    assert are_equal(run(tmp_path, resume="auto"), run())


def test_distillation_alone_never_looks_at_labels():
    train, donor = batches(), net(norm=True, seed=3)
    other = [(x, (y + 1) % CLASSES) for x, y in train]
    results = []
    for data in (train, other):
        model = angular_net(norm=True)
        fit(model, (data, None), recipe(distill=1.0), conduct=QUIET, donor=donor)
        results.append(weights(model))
    assert are_equal(*results)


def test_distillation_brings_the_answers_near_the_donors():
    train, donor = batches(), net(norm=True, seed=3).eval()
    model = angular_net(norm=True)

    def distance() -> float:
        with torch.no_grad():
            return sum(divergence_at(1.0, model.eval()(x), donor(x)).item() for x, _ in train)

    before = distance()
    model.train()
    fit(model, (train, None), recipe(distill=1.0, epochs=10), conduct=QUIET, donor=donor)
    assert distance() < 0.5 * before


def test_the_loss_is_the_share_of_both():
    donor, (x, y) = net(seed=3), batches(1)[0]
    logits = torch.randn(len(x), CLASSES)
    mixed = Distilled(torch.nn.CrossEntropyLoss(), donor, share=0.25, temperature=3.0)
    mixed.see(x)
    labels = torch.nn.functional.cross_entropy(logits, y)
    wanted = 0.75 * labels + 0.25 * divergence_at(3.0, logits, donor.eval()(x))
    torch.testing.assert_close(mixed(logits, y), wanted)
    assert not mixed.state_dict()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(OptionError, match="anneal must be one of: none, together, progressive"):
        recipe(anneal="slowly")
    with pytest.raises(OptionError, match="anneal_until must be between 0 and 1"):
        recipe(anneal_until=1.0)
    with pytest.raises(OptionError, match="anneal and torchcompile exclude each other"):
        recipe(anneal="together", torchcompile=True)
    with pytest.raises(OptionError, match="distill must be from 0 to 1"):
        recipe(distill=2.0)
    with pytest.raises(OptionError, match="distill needs the donor; give"):
        fit(net(), (batches(), None), recipe(distill=0.5), conduct=QUIET)
    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    with pytest.raises(OptionError, match="the donor answers for 5 classes and the model for 3"):
        fit(net(), (batches(), None), recipe(distill=0.5), conduct=QUIET, donor=wide)
    with pytest.raises(OptionError, match="no converted layer to anneal"):
        fit(net(), (batches(), None), recipe(anneal="together"), conduct=QUIET)


def options() -> dict:
    return {"operator": "cosine", "num_classes": None}


def test_the_command_rebuilds_the_donor_from_its_weights(tmp_path):
    torch.manual_seed(5)
    trained = timm.create_model("test_resnet", num_classes=3).eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    chosen = recipe(distill=0.5, img_size=32)
    start = begin("test_resnet", data_set(), chosen, options(), False, tmp_path / "trained.pth")
    assert are_equal(weights(start.donor), weights(trained))
    assert begin("test_resnet", data_set(), recipe(), options(), False, tmp_path / "trained.pth").donor is None


def test_a_folder_is_distilled_from_the_weights_it_was_converted_from(tmp_path):
    torch.manual_seed(5)
    trained = timm.create_model("test_resnet", num_classes=3).eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    save(spherify("test_resnet", num_classes=3, checkpoint=tmp_path / "trained.pth"), tmp_path / "converted")
    chosen = recipe(distill=0.5, img_size=32)
    start = begin(str(tmp_path / "converted"), data_set(), chosen, options(), False, tmp_path / "trained.pth")
    assert are_equal(weights(start.donor), weights(trained))
    with pytest.raises(OptionError, match="pretrained or checkpoint goes with a model's name"):
        begin(str(tmp_path / "converted"), data_set(), recipe(), options(), False, tmp_path / "trained.pth")


def test_a_donor_that_cannot_be_had_is_refused(tmp_path):
    source = resolve("test_resnet", {"num_classes": 3})
    with pytest.raises(OptionError, match="distill needs the donor's weights; give --checkpoint FILE or --pretrained"):
        donor_for(source, pretrained=False, checkpoint=None, classes=3, seed=0)
    with pytest.raises(OptionError, match="this model is your own"):
        donor_for(None, pretrained=True, checkpoint=None, classes=3, seed=0)
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "other.pth")
    with pytest.raises(FileError, match="the donor needs weights with a classifier for 3 classes"):
        donor_for(source, pretrained=False, checkpoint=tmp_path / "other.pth", classes=3, seed=0)
