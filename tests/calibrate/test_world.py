"""A recorded run played step by step gives what the model gives, keeps no more than is needed, and finds its blocks."""

import pytest
import torch
import torch.nn.functional as F
from networks import FromFunction, Residual, image, small_net, timm_model

from spherify.calibrate.blocks import blocks_of, cuts_of
from spherify.calibrate.chain import bounds_after, norm_after, sum_after
from spherify.calibrate.parts import in_working_order, parts_of
from spherify.calibrate.recorded import Recorded
from spherify.calibrate.world import World


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (small_net, (3, 16, 16)),
        (lambda: timm_model("test_resnet"), (3, 64, 64)),
        (lambda: timm_model("test_vit"), (3, 160, 160)),
    ],
)
def test_it_gives_what_the_model_gives_for_every_size_of_batch(model, shape):
    model = model().eval()
    batches = [image(3, *shape), image(2, *shape, seed=1)]
    recorded = Recorded(model, batches[0])
    recorded.prepare(batches[1])
    world = World(recorded, batches)
    world.want([len(recorded.nodes) - 1])
    answers = []
    with torch.no_grad():
        world.advance(recorded.outputs, lambda number, values: answers.append(values[0]))
        for batch, answer in zip(batches, answers, strict=True):
            torch.testing.assert_close(answer, model(batch), rtol=1e-4, atol=1e-5)


def test_values_that_nothing_needs_any_more_are_dropped():
    model = small_net()
    recorded = Recorded(model, image(2, 3, 16, 16))
    world = World(recorded, [image(2, 3, 16, 16)])
    world.want([len(recorded.nodes) - 1])
    call = recorded.layer_calls()[1]
    source = recorded.position[recorded.flow.sources(recorded.nodes[call])[0]]
    with torch.no_grad():
        world.advance([source])
    assert set(world.values[0]) == {source}


@pytest.mark.parametrize("function", [lambda x: F.relu(x, inplace=True), lambda x: x.add_(1.0)])
def test_a_function_in_place_does_not_write_into_values_that_wait(function):
    model = FromFunction(lambda m, x: function(m.conv(x)), conv=torch.nn.Conv2d(3, 4, 3)).eval()
    recorded = Recorded(model, image(2, 3, 16, 16))
    world = World(recorded, [image(2, 3, 16, 16)])
    world.want([len(recorded.nodes) - 1])
    call = recorded.layer_calls()[0]
    with torch.no_grad():
        world.advance([call])
        before = world.values[0][call].clone()
        answer = world.call(0, recorded.outputs[0])
    assert torch.equal(world.values[0][call], before)
    assert torch.equal(answer, function(before))
    assert not torch.equal(answer, world.values[0][call])


def test_what_follows_a_layer():
    recorded = Recorded(Residual().eval(), image(2, 3, 16, 16))
    one, two, short = recorded.layer_calls()
    assert bounds_after(recorded, norm_after(recorded, one)) == (0.0, None)
    assert sum_after(recorded, norm_after(recorded, one)) is None
    total, other = sum_after(recorded, norm_after(recorded, two))
    assert other == norm_after(recorded, short)
    assert bounds_after(recorded, total) == (0.0, None)


def test_the_larger_branch_makes_up_for_the_shorter_which_is_fitted_first():
    recorded = Recorded(Residual().eval(), image(2, 3, 16, 16))
    parts = parts_of(recorded, kept=True)
    assert [part.name for part in parts] == ["one.0", "two.0", "projection.0"]
    assert [part.sums[0] is not None for part in parts] == [False, True, False]
    assert [part.name for part in in_working_order(recorded, parts)] == ["one.0", "projection.0", "two.0"]


def test_a_residual_block_is_one_block():
    model = torch.nn.Sequential(Residual(3, 4), Residual(4, 4)).eval()
    recorded = Recorded(model, image(2, 3, 16, 16))
    blocks = blocks_of(recorded, parts_of(recorded, kept=True))
    # plain layers alone ask for no block of their own; the last one ends at the output
    assert [part.name for block in blocks for part in block.parts][:3] == ["0.one.0", "0.two.0", "0.projection.0"]
    assert cuts_of(recorded)[0] == 0
    assert cuts_of(recorded)[-1] == recorded.outputs[0]
