"""Pure tensor functions: the cosine of a patch, the responses, and the sphere operators.

Shape legend: N batch, C channels in, O filters out, G groups, D features, H W input, P Q output, U V kernel.
Angles are radians.
"""

from spherify.functional.cosine import (
    DEFAULT_EPS,
    box_sum,
    conv_cosine,
    linear_cosine,
    patch_energy,
    unit_filters,
)
from spherify.functional.cosine import linear_cosine as cosine
from spherify.functional.energies import orthogonality_gap, pair_energy
from spherify.functional.margins import MARGINS, Margin, angle_of, psi
from spherify.functional.responses import (
    K_MAX,
    K_MIN,
    RESPONSES,
    Response,
    cosine_response,
    linear_response,
    sigmoid_response,
)
from spherify.functional.sphere import sphere_conv1d, sphere_conv2d, sphere_conv3d, sphere_linear

__all__ = [
    "DEFAULT_EPS",
    "K_MAX",
    "K_MIN",
    "MARGINS",
    "RESPONSES",
    "Margin",
    "Response",
    "angle_of",
    "box_sum",
    "conv_cosine",
    "cosine",
    "cosine_response",
    "linear_cosine",
    "linear_response",
    "orthogonality_gap",
    "pair_energy",
    "patch_energy",
    "psi",
    "sigmoid_response",
    "sphere_conv1d",
    "sphere_conv2d",
    "sphere_conv3d",
    "sphere_linear",
    "unit_filters",
]
