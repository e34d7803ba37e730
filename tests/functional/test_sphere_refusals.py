"""What the sphere operators refuse, and what they say then."""

import math

import pytest
import torch
from angular_samples import SPHERE_CONVS, normal

from spherify.errors import OptionError
from spherify.functional import sphere_conv2d, sphere_linear


def call(**options):
    return sphere_conv2d(normal(1, 3, 5, 5), normal(4, 3, 3, 3), **options)


@pytest.mark.parametrize("function", [call, lambda **o: sphere_linear(normal(2, 5), normal(4, 5), **o)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(operator="relu"), "operator 'relu' is unknown; choose one of: cosine, linear, sigmoid, learnable"),
        (dict(operator="sigmoid"), "operator 'sigmoid' needs a k; give a number or a tensor"),
        (dict(operator="learnable"), "operator 'learnable' needs a k; give a number or a tensor"),
        (dict(operator="sigmoid", k=2e3), r"k=2000.0 is out of range; choose a number in \[0.001, 1000\]"),
        (dict(operator="cosine", k=0.3), "operator 'cosine' has no k; leave k out"),
        (dict(operator="linear", k=torch.ones(4)), "operator 'linear' has no k; leave k out"),
        (dict(eps=0.0), "eps=0.0 is no positive number; without it a patch of zeros has no cosine"),
        (dict(eps=-1e-4), "eps=-0.0001 is no positive number"),
        (dict(eps=math.nan), "eps=nan is no positive number"),
        (dict(operator="sigmoid", k=torch.ones(3)), "k has 3 numbers; give one, or one for each of the 4 filters"),
        (dict(gain=torch.ones(5)), "gain has 5 numbers; give one, or one for each of the 4 filters"),
        (dict(bias=torch.ones(2)), "bias has 2 numbers; give one, or one for each of the 4 filters"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_wrong_option_is_refused_with_what_to_do(function, options, message):
    with pytest.raises(OptionError, match=message):
        function(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(padding="full"), "padding 'full' is unknown; choose 'same', 'valid' or numbers"),
        (dict(padding="same", stride=2), r"padding 'same' needs stride 1, and stride is \(2, 2\)"),
        (dict(stride=(1, 2, 3)), r"stride=\(1, 2, 3\): give one number, or 2 of them"),
        (dict(dilation=(1, 2, 3)), r"dilation=\(1, 2, 3\): give one number, or 2 of them"),
        (dict(padding=(1, 2, 3)), r"padding=\(1, 2, 3\): give one number, or 2 of them"),
    ],
)
def test_a_wrong_window_is_refused_with_what_to_do(options, message):
    with pytest.raises(OptionError, match=message):
        call(**options)


@pytest.mark.parametrize(("dims", "given"), [(1, 4), (2, 3), (2, 5), (3, 4)])
def test_a_weight_of_the_wrong_dimensions_is_refused(dims, given):
    with pytest.raises(OptionError, match=f"sphere_conv{dims}d: the weight has {given} dimensions, not {dims + 2}"):
        SPHERE_CONVS[dims](normal(1, 3, *[5] * dims), normal(*[3] * given))


def test_a_wrong_option_is_a_value_error_too():
    with pytest.raises(ValueError, match="is unknown"):
        call(operator="relu")
