"""How far student and donor are apart: over the first images, batch by batch, each network recorded once a size."""

from collections import Counter

import pytest
import torch
from networks import Residual, image

from spherify import calibrate, spherify
from spherify.calibrate import recorded as recorded_file
from spherify.calibrate import report as report_file
from spherify.calibrate.report import compared, products

IMAGES = image(60, 3, 16, 16)


@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_products_are_those_of_float64(apart):
    theirs = image(3, 100_000)
    own = theirs + apart * image(3, 100_000, seed=1)
    mine, both, donors = products(own, theirs).tolist()
    wide, other = own.double().flatten(), theirs.double().flatten()
    assert mine == pytest.approx(float(wide @ wide), rel=1e-6)
    assert donors == pytest.approx(float(other @ other), rel=1e-6)
    assert mine - 2 * both + donors == pytest.approx(float((wide - other).square().sum()), rel=1e-5)


def test_errors_are_those_of_the_models_own_outputs():
    donor = Residual().eval()
    model = spherify(donor, example_input=IMAGES[:2]).eval()
    with torch.no_grad():
        own, theirs = model(IMAGES), donor(IMAGES)
    error, cosine = compared(model, donor, IMAGES.split(25))[""]
    assert error == pytest.approx(float((own - theirs).norm() / theirs.norm()), rel=1e-4)
    assert cosine == pytest.approx(float((own * theirs).sum() / own.norm() / theirs.norm()), rel=1e-4)


def test_of_large_networks_fewer_images_are_compared(monkeypatch):
    donor = Residual().eval()
    model = spherify(donor, example_input=IMAGES[:2])
    all_of_them, first = compared(model, donor, IMAGES.split(20)), compared(model, donor, [IMAGES[:20]])
    monkeypatch.setattr(report_file, "PRODUCTS_COMPARED", 1.0)
    assert compared(model, donor, IMAGES.split(20)) == first != all_of_them


def test_each_network_is_recorded_once_for_each_size_of_batch(monkeypatch):
    runs = Counter()
    record = recorded_file.graph_of

    def counted(model, inputs):
        runs[id(model), len(inputs)] += 1
        return record(model, inputs)

    monkeypatch.setattr(recorded_file, "graph_of", counted)
    donor = Residual().eval()
    calibrate(spherify(donor, example_input=IMAGES[:2]), IMAGES, donor=donor)
    sizes = {size for _, size in runs}
    assert {8, 60, 20} <= sizes  # played at both ends, all of them, and a third of them to solve
    assert set(runs.values()) == {1}
    assert len(runs) == 2 * len(sizes)


def test_a_branch_of_which_the_donor_makes_nothing_is_said_to_be_one():
    some = report_file.LayerFit(name="conv1", error_before=0.9, cosine_before=0.5, error=0.125, cosine=0.75)
    nothing = dict.fromkeys(("error_before", "cosine_before", "error", "cosine"), float("nan"))
    none = report_file.LayerFit(name="conv2", **nothing)
    told = str(report_file.Report(method="transplant", images=60, seconds=1.0, layers=(some, none)))
    assert [line.split() for line in told.splitlines()][1:3] == [
        ["conv1", "0.900", "0.125", "0.5000", "0.7500"],
        ["conv2", "-", "-", "-", "-"],
    ]
    assert "-: there the donor answers 0 alone, as behind a norm whose weights are 0." in told
    assert "nan" not in told
    assert "-:" not in str(report_file.Report(method="transplant", images=60, seconds=1.0, layers=(some,)))
