"""The parts of the cosine: box sums, energies, unit filters, and the cosine itself."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from angular_samples import PLAIN_CONVS, normal
from torch.testing import assert_close

from spherify.errors import OptionError
from spherify.functional import box_sum, conv_cosine, cosine, linear_cosine, patch_energy, unit_filters
from spherify.functional.cosine import padding_at_both_ends, per_axis

BOXES = [  # window, stride, dilation
    ((3,), (1,), (1,)),
    ((4,), (3,), (2,)),
    ((1,), (2,), (1,)),
    ((1, 1), (1, 1), (1, 1)),
    ((1, 1), (2, 2), (1, 1)),
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1)),
    ((2, 3), (2, 1), (1, 2)),
    ((3, 2), (3, 2), (2, 3)),
    ((5, 1), (1, 2), (1, 1)),
    ((2, 3, 1), (2, 1, 2), (1, 2, 1)),
    ((3, 3, 3), (1, 2, 3), (2, 1, 1)),
]
SIZES = (11, 12, 9)


@pytest.mark.parametrize(("window", "stride", "dilation"), BOXES)
def test_a_box_sum_is_a_convolution_with_ones(window, stride, dilation):
    x = normal(2, 3, *SIZES[: len(window)])
    ones = torch.ones(3, 1, *window, dtype=x.dtype)
    truth = PLAIN_CONVS[len(window)](x, ones, stride=stride, dilation=dilation, groups=3)
    assert reference.relative_error(box_sum(x, window, stride, dilation), truth) < 1e-14


@pytest.mark.parametrize(("window", "stride"), [((3, 3), (1, 1)), ((2, 4), (2, 3))])
def test_a_box_sum_is_average_pooling_times_the_area(window, stride):
    x = normal(2, 3, 11, 12)
    truth = F.avg_pool2d(x, window, stride) * math.prod(window)
    assert reference.relative_error(box_sum(x, window, stride, (1, 1)), truth) < 1e-14


def test_a_box_sum_leaves_its_argument_alone():
    x = normal(1, 1, 6, 6)
    before = x.clone()
    box_sum(x, (3, 3), (1, 1), (1, 1))
    assert torch.equal(x, before)


def test_what_lies_outside_a_window_never_reaches_its_sum():
    x = torch.ones(1, 1, 8)
    x[..., 4] = math.inf
    assert box_sum(x, (2,), (1,), (3,)).isinf().flatten().tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_the_energy_is_the_sum_of_squares_of_each_group(groups):
    x = normal(2, 6, 4, 5)
    truth = torch.stack([(part**2).sum(1) for part in x.chunk(groups, dim=1)], dim=1)
    assert_close(patch_energy(x, groups), truth)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_energy_is_taken_in_float32_or_wider(dtype, wide, groups):
    energy = patch_energy(torch.full((1, 4, 2, 2), 1e4, dtype=dtype), groups)
    assert energy.dtype == wide
    assert energy.isfinite().all()  # 1e8 is beyond float16


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (4, 3, 3, 3), (4, 64, 3, 3), (4, 7), (4, 5, 3), (4, 2, 3, 2, 2)])
def test_the_length_of_a_unit_filter_is_one_over_the_power(shape):
    unit, power = unit_filters(normal(*shape), eps=1e-20)
    assert_close(unit.flatten(1).norm(dim=1) * power, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("fan_in", [1, 2, 9, 27, 576, 577, 4608])
def test_the_power_is_a_power_of_two_and_no_less_than_the_root_of_the_fan_in(fan_in):
    _, power = unit_filters(normal(1, fan_in))
    assert math.log2(power).is_integer()
    assert math.sqrt(fan_in) <= power < 2 * math.sqrt(fan_in)


def test_the_power_changes_no_bit_of_a_unit_filter_in_float32():
    weight = normal(8, 5, 3, 3, dtype=torch.float32)
    unit, power = unit_filters(weight, eps=1e-4)
    length = torch.rsqrt((weight.flatten(1) * weight.flatten(1)).sum(1) + 1e-4)
    assert power > 1
    assert torch.equal(unit * power, weight * length.view(-1, 1, 1, 1))


def test_the_power_changes_no_bit_of_a_convolution_in_float32():
    x, weight = normal(2, 5, 8, 8, dtype=torch.float32), normal(8, 5, 3, 3, dtype=torch.float32)
    unit, power = unit_filters(weight)
    assert torch.equal(F.conv2d(x, unit) * power, F.conv2d(x, unit * power))


def test_the_product_of_the_largest_float16_patch_and_a_parallel_filter_does_not_overflow():
    weight = torch.ones(1, 64, 3, 3, dtype=torch.float16)
    x = torch.full((1, 64, 3, 3), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert_close(conv_cosine(x, weight), torch.ones(1, 1, 1, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_filters_stay_in_the_type_of_the_weight_and_the_cosine_is_wide(dtype):
    x, weight = normal(1, 3, 5, 5, dtype=dtype), normal(4, 3, 3, 3, dtype=dtype)
    assert unit_filters(weight)[0].dtype == dtype
    assert conv_cosine(x, weight).dtype == torch.promote_types(dtype, torch.float32)


def test_the_conv_cosine_is_the_slow_one():
    x, weight = normal(2, 4, 7, 6), normal(6, 2, 3, 2, seed=1)
    window = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    truth = reference.conv_cosine(x, weight, **window, eps=1e-3)
    assert reference.relative_error(conv_cosine(x, weight, **window, eps=1e-3), truth) < 1e-12


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_the_linear_cosine_is_the_slow_one(shape):
    x, weight = normal(*shape), normal(4, 5, seed=1)
    truth = reference.linear_cosine(x, weight, eps=1e-3)
    assert reference.relative_error(linear_cosine(x, weight, eps=1e-3), truth) < 1e-12


def test_the_linear_cosine_is_torchs_where_eps_is_nothing():
    x, weight = normal(6, 5), normal(4, 5, seed=1)
    assert_close(cosine(x, weight, eps=1e-20), F.cosine_similarity(x[:, None], weight[None], dim=-1))


def test_padded_zeros_count_in_no_norm():
    x, weight = torch.ones(1, 1, 4), torch.tensor([[[0.0, 1.0, 1.0]]])
    # The patch at the border is (0, 1, 1), as the filter: its cosine is 1, not 2 / sqrt(6).
    assert_close(conv_cosine(x, weight, padding=1, eps=1e-12)[0, 0, 0], torch.tensor(1.0))


def test_one_number_stands_for_every_axis():
    assert per_axis(2, 3, "stride") == per_axis([2], 3, "stride") == (2, 2, 2)


def test_a_wrong_count_of_numbers_is_refused_with_the_right_one():
    with pytest.raises(OptionError, match=r"stride=\(1, 2, 3\): give one number, or 2 of them"):
        conv_cosine(normal(1, 3, 5, 5), normal(4, 3, 3, 3), stride=(1, 2, 3))


def test_an_unknown_word_for_padding_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match="padding 'full' is unknown; choose 'same', 'valid' or numbers"):
        conv_cosine(normal(1, 3, 5, 5), normal(4, 3, 3, 3), padding="full")


def test_same_padding_with_a_stride_is_refused():
    with pytest.raises(OptionError, match=r"padding 'same' needs stride 1, and stride is \(1, 2\)"):
        conv_cosine(normal(1, 3, 5, 5), normal(4, 3, 3, 3), padding="same", stride=(1, 2))


def test_same_padding_puts_the_odd_pixel_of_an_even_kernel_last():
    assert padding_at_both_ends("same", (2, 3), (1, 1), (1, 2)) == [(0, 1), (2, 2)]
