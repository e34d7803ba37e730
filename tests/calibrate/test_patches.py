"""Rows at sampled positions: a product with the filters must be what the convolution answers there."""

import pytest
import torch
import torch.nn.functional as F

from spherify.calibrate.patches import Call, output_rows, patch_maps, patch_rows, sampled, unit_rows

WINDOWS = [
    (F.conv2d, (2, 6, 9, 7), (4, 6, 3, 3), dict(padding=1)),
    (F.conv2d, (2, 6, 9, 7), (6, 2, 3, 2), dict(stride=(2, 1), dilation=(1, 2), groups=3)),
    (F.conv2d, (2, 6, 9, 7), (6, 1, 3, 3), dict(padding="same", groups=6)),
    (F.conv2d, (6, 9, 7), (4, 6, 1, 1), dict(stride=2)),
    (F.conv1d, (3, 4, 11), (5, 4, 4), dict(stride=3, padding=2)),
    (F.conv3d, (2, 3, 5, 6, 4), (4, 3, 2, 3, 1), dict(padding=(1, 0, 2), stride=(1, 2, 3))),
]


@pytest.mark.parametrize(("function", "shape", "filters", "window"), WINDOWS)
def test_rows_times_filters_are_the_convolution(function, shape, filters, window):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).double(), torch.randn(filters).double()
    expected = function(x, weight, **window)
    expected = output_rows(expected if x.dim() == weight.dim() else expected[None], True)
    positions = torch.randperm(len(expected))[: len(expected) // 2]
    call = Call.of(function, (x, weight), window)
    rows = patch_rows(call, positions)
    groups = window.get("groups", 1)
    answers = rows @ weight.flatten(1).unflatten(0, (groups, -1)).mT  # (G, R, O/G)
    torch.testing.assert_close(answers.transpose(0, 1).flatten(1), expected[positions])


@pytest.mark.parametrize(("function", "shape", "filters", "window"), WINDOWS)
def test_maps_are_the_rows_image_by_image(function, shape, filters, window):
    torch.manual_seed(0)
    call = Call.of(function, (torch.randn(shape), torch.randn(filters)), window)
    maps = patch_maps(call)
    if function is not F.conv2d or len(shape) < 4:
        assert maps is None
        return
    rows = patch_rows(call, torch.arange(maps.shape[0] * maps.shape[2]))
    torch.testing.assert_close(maps.transpose(0, 1).flatten(1, 2), rows)


def test_rows_of_a_linear_layer_are_its_inputs():
    x, weight = torch.randn(2, 5, 4), torch.randn(3, 4)
    rows = patch_rows(Call.of(F.linear, (x, weight, None), {}), torch.tensor([7, 0]))
    torch.testing.assert_close(rows @ weight.T, output_rows(F.linear(x, weight), False)[[7, 0]][None])


def test_unit_rows_have_length_one_and_zero_rows_stay_zero():
    rows = unit_rows(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), 1e-12)
    torch.testing.assert_close(rows, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))


@pytest.mark.parametrize(("count", "wanted"), [(10, 20), (10, 10), (10, 7), (10_000, 9)])
def test_a_sample_has_no_position_twice_and_none_out_of_range(count, wanted):
    drawn = sampled(count, wanted, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert len(drawn.unique()) == len(drawn) == min(count, wanted)
    assert drawn.min() >= 0
    assert drawn.max() < count
