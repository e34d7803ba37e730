"""The sphere operators under autocast, torch.func, torch.compile, meta tensors, memory formats, and their memory."""

import pytest
import reference
import torch
import torch.nn.functional as F
from angular_samples import OPERATORS, PLAIN_CONVS, SPHERE_CONVS, normal, options_of
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spherify.functional import sphere_conv2d, sphere_linear

GROUPS_AND_FILTERS = [(1, 6), (2, 6), (4, 4), (4, 8)]
each_operator = pytest.mark.parametrize("name", OPERATORS)
each_grouping = pytest.mark.parametrize(("groups", "filters"), GROUPS_AND_FILTERS)


def image_and_filters(groups: int = 1, filters: int = 6, dtype: torch.dtype = torch.float32):
    return normal(3, 4, 8, 7, dtype=dtype), normal(filters, 4 // groups, 3, 3, seed=1, dtype=dtype)


# Memory formats


@each_grouping
@each_operator
def test_channels_last_changes_no_value_and_stays(name, groups, filters):
    x, weight = image_and_filters(groups, filters)
    options = dict(options_of(name, filters, x.dtype), groups=groups, padding=1, bias=normal(filters).float())
    out = sphere_conv2d(x.to(memory_format=torch.channels_last), weight, **options)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, sphere_conv2d(x, weight, **options), rtol=1e-5, atol=1e-6)


@each_grouping
def test_channels_last_stays_in_three_dimensions(groups, filters):
    # In float64 torch's own conv3d returns the plain format.
    x = normal(2, 4, 4, 5, 6, dtype=torch.float32)
    weight = normal(filters, 4 // groups, 3, 2, 3, seed=1, dtype=torch.float32)
    out = SPHERE_CONVS[3](x.to(memory_format=torch.channels_last_3d), weight, groups=groups)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(out, SPHERE_CONVS[3](x, weight, groups=groups), rtol=1e-5, atol=1e-6)


@each_grouping
@each_operator
def test_strides_of_the_memory_do_not_matter(name, groups, filters):
    x, weight = image_and_filters(groups, filters, torch.float64)
    options = dict(options_of(name, filters), groups=groups, padding=1)
    apart = torch.zeros(3, 4, 16, 14, dtype=x.dtype)[..., ::2, 1::2].copy_(x)
    turned = weight.transpose(2, 3).contiguous().transpose(2, 3)
    assert not (apart.is_contiguous() or turned.is_contiguous())
    assert_close(sphere_conv2d(apart, turned, **options), sphere_conv2d(x, weight, **options))


@each_operator
def test_an_expanded_vector_is_what_its_copy_is(name):
    x, weight = normal(5).expand(3, 5), normal(4, 5, seed=1)
    options = options_of(name, 4)
    assert_close(sphere_linear(x, weight, **options), sphere_linear(x.contiguous(), weight, **options))


# Autocast


@pytest.mark.parametrize(("half", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@each_grouping
@each_operator
def test_autocast_gives_the_type_of_the_plain_convolution_and_nearly_its_values(name, groups, filters, half, error):
    x, weight = image_and_filters(groups, filters)
    options = dict(options_of(name, filters, x.dtype), groups=groups, bias=normal(filters).float())
    with torch.autocast("cpu", dtype=half):
        out, plain = sphere_conv2d(x, weight, **options), F.conv2d(x, weight, groups=groups)
    steepness = 5 if name == "sigmoid-0.1" else 1.7  # the slopes at the equator for k = 0.1 and 0.3
    assert out.dtype == plain.dtype == half
    assert_close(out.float(), sphere_conv2d(x, weight, **options), rtol=error, atol=error * steepness)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each_operator
def test_autocast_gives_the_type_of_the_plain_fully_connected_layer(name, half):
    x, weight = normal(3, 5, dtype=torch.float32), normal(4, 5, seed=1, dtype=torch.float32)
    options = options_of(name, 4, x.dtype)
    with torch.autocast("cpu", dtype=half):
        out, plain = sphere_linear(x, weight, **options), F.linear(x, weight)
    assert out.dtype == plain.dtype == half
    assert_close(out.float(), sphere_linear(x, weight, **options), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each_operator
def test_no_norm_overflows_under_autocast(name, half):
    x, weight = image_and_filters()
    options = options_of(name, 6, x.dtype)
    with torch.autocast("cpu", dtype=half):
        large, small = sphere_conv2d(8192 * x, weight, **options), sphere_conv2d(x, weight, **options)
    assert_close(large, small, rtol=0.02, atol=0.02)  # 36 squares of 8192 are 2e9, and the largest float16 65504


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each_operator
def test_gradients_under_autocast_are_finite_and_in_the_type_of_the_leaf(name, half):
    x, weight = (tensor.requires_grad_() for tensor in image_and_filters())
    with torch.autocast("cpu", dtype=half):
        loss = sphere_conv2d(x, weight, **options_of(name, 6, x.dtype)).float().square().mean()
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


# torch.func


@each_grouping
@each_operator
def test_vmap_over_images_is_the_batch(name, groups, filters):
    x, weight = image_and_filters(groups, filters, torch.float64)
    options = dict(options_of(name, filters), groups=groups, padding=1)
    out = torch.func.vmap(lambda image: sphere_conv2d(image, weight, **options))(x)
    assert_close(out, sphere_conv2d(x, weight, **options))


@each_grouping
@each_operator
def test_vmap_over_filters_is_one_after_the_other(name, groups, filters):
    x, _ = image_and_filters(groups, filters, torch.float64)
    weights = normal(2, filters, 4 // groups, 3, 3, seed=1)
    options = dict(options_of(name, filters), groups=groups)
    out = torch.func.vmap(lambda weight: sphere_conv2d(x, weight, **options))(weights)
    assert_close(out, torch.stack([sphere_conv2d(x, weight, **options) for weight in weights]))


@each_operator
def test_vmap_over_vectors_is_the_batch(name):
    x, weight, options = normal(3, 5), normal(4, 5, seed=1), options_of(name, 4)
    out = torch.func.vmap(lambda vector: sphere_linear(vector, weight, **options))(x)
    assert_close(out, sphere_linear(x, weight, **options))


@each_operator
def test_the_functional_gradient_is_that_of_autograd(name):
    x, weight = image_and_filters(dtype=torch.float64)
    options = options_of(name, 6)

    def loss(weight):
        return sphere_conv2d(x, weight, **options).square().sum()

    leaf = weight.clone().requires_grad_()
    assert_close(torch.func.grad(loss)(weight), torch.autograd.grad(loss(leaf), leaf)[0])


@each_grouping
@each_operator
def test_gradients_image_by_image_are_those_of_each_image_alone(name, groups, filters):
    x, weight = image_and_filters(groups, filters, torch.float64)
    options = dict(options_of(name, filters), groups=groups)

    def loss(weight, image):
        return sphere_conv2d(image, weight, **options).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    assert_close(together, torch.stack([torch.func.grad(loss)(weight, image) for image in x]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's forward mode, at its first use
@each_operator
def test_forward_mode_agrees_with_reverse_mode(name):
    x, weight, options = normal(3), normal(2, 3, seed=1), options_of(name, 2)

    def run(x):
        return sphere_linear(x, weight, **options)

    assert_close(torch.func.jacfwd(run)(x), torch.func.jacrev(run)(x))


# torch.compile


def compiled(function, **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, **options)


@each_operator
def test_the_whole_operator_compiles_with_its_gradient(name):
    x, weight = (tensor.requires_grad_() for tensor in image_and_filters(2, 6))
    options = dict(options_of(name, 6, x.dtype), groups=2, padding=1, bias=normal(6).float())

    def run(x, weight):
        return sphere_conv2d(x, weight, **options)

    fast, plain = compiled(run, backend="aot_eager")(x, weight), run(x, weight)
    assert_close(fast, plain)
    gradients = zip(
        torch.autograd.grad(fast.sum(), (x, weight)), torch.autograd.grad(plain.sum(), (x, weight)), strict=True
    )
    for fast_gradient, plain_gradient in gradients:
        assert_close(fast_gradient, plain_gradient, rtol=1e-4, atol=1e-5)


@each_operator
def test_the_fully_connected_operator_compiles(name):
    x, weight = normal(3, 5), normal(4, 5, seed=1)
    options = options_of(name, 4)
    fast = compiled(lambda x, weight: sphere_linear(x, weight, **options), backend="aot_eager")
    assert_close(fast(x, weight), sphere_linear(x, weight, **options))


@pytest.mark.parametrize(("padding", "stride"), [(1, 2), ("same", 1)])
def test_one_compilation_serves_every_image_size(padding, stride):
    weight = normal(6, 2, 3, 3)

    def run(x):
        return sphere_conv2d(x, weight, groups=2, padding=padding, stride=stride, operator="linear")

    fast = compiled(run, backend="aot_eager", dynamic=True)
    fast(normal(5, 4, 9, 8))  # no two sizes are equal: torch would take them for the same size for ever
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in [(7, 4, 12, 11), (3, 4, 6, 10)]:
            assert_close(fast(normal(*shape)), run(normal(*shape)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_the_default_compiler_takes_the_whole_operator():
    x, weight = image_and_filters(2, 6)

    def run(x, weight):
        return sphere_conv2d(x, weight, groups=2, padding=1, operator="sigmoid", k=0.3)

    assert_close(compiled(run)(x, weight), run(x, weight), rtol=1e-5, atol=1e-6)


# Meta tensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [1, "valid"])
@each_grouping
@pytest.mark.parametrize("dims", SPHERE_CONVS)
def test_on_meta_the_shape_and_type_are_those_of_the_plain_convolution(dims, groups, filters, padding, dtype):
    x = torch.empty(2, 4, *(9, 8, 7)[:dims], device="meta", dtype=dtype)
    weight = torch.empty(filters, 4 // groups, *(3, 2, 3)[:dims], device="meta", dtype=dtype)
    window = dict(stride=2, padding=padding, groups=groups)
    out, plain = SPHERE_CONVS[dims](x, weight, **window), PLAIN_CONVS[dims](x, weight, **window)
    assert (out.shape, out.dtype, out.device) == (plain.shape, dtype, plain.device)


def test_on_meta_every_operator_gives_the_shape_of_the_plain_fully_connected_layer():
    x, weight = torch.empty(2, 3, 5, device="meta"), torch.empty(4, 5, device="meta")
    for operator, k in [("cosine", None), ("linear", None), ("sigmoid", 0.3), ("learnable", weight[:, 0])]:
        assert sphere_linear(x, weight, operator=operator, k=k).shape == (2, 3, 4)


# Memory


class Recorder(TorchDispatchMode):
    """Keeps a copy of every tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [leaf.detach().clone() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out


@pytest.mark.parametrize("groups", [1, 4, 64])
@pytest.mark.parametrize("window", [dict(padding=1), dict(padding=2, dilation=2), dict(padding=1, stride=2)], ids=str)
@each_operator
def test_the_operator_makes_nothing_larger_than_its_input_or_output(name, window, groups):
    x, weight = normal(2, 64, 16, 16, dtype=torch.float32), normal(64, 64 // groups, 3, 3, dtype=torch.float32)
    options = options_of(name, 64, torch.float32)
    with Recorder() as recorder:
        out = sphere_conv2d(x, weight, groups=groups, **window, **options)
    limit = max(2 * 64 * (16 + 2 * window["padding"]) ** 2, out.numel())
    assert recorder.made
    assert max(tensor.numel() for tensor in recorder.made) <= limit  # im2col would be 9 times the input


@pytest.mark.parametrize("groups", [1, 4, 64])
def test_the_operator_makes_no_filter_of_ones(groups):
    x, weight = normal(2, 64, 8, 8, dtype=torch.float32), normal(64, 64 // groups, 3, 3, dtype=torch.float32)
    with Recorder() as recorder:
        sphere_conv2d(x, weight, groups=groups, padding=1)
    filters = [tensor for tensor in recorder.made if tensor.dim() == 4 and tensor.shape[2:] == (3, 3)]
    assert filters  # the unit filters are seen, and they are the only ones
    assert all(tensor.shape == weight.shape and tensor.std() > 0 for tensor in filters)


@each_grouping
def test_the_slow_twin_would_be_caught_by_the_recorder(groups, filters):
    x, weight = image_and_filters(groups, filters)
    with Recorder() as recorder:
        reference.sphere_conv(x, weight, groups=groups, padding=1)
    assert max(tensor.numel() for tensor in recorder.made) > max(x.numel() * 2, 3 * filters * 56)


@pytest.mark.parametrize("operator", ["cosine", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_without_data_has_the_shape_and_type_of_one_with_data(operator, dtype):
    x, weight, k = torch.rand(2, 4, 9, 9, dtype=dtype), torch.rand(6, 2, 3, 3, dtype=dtype), 0.3
    window = dict(stride=2, padding=1, groups=2, operator=operator, k=k if operator == "sigmoid" else None)
    with torch.no_grad():
        out = sphere_conv2d(x, weight, **window)
        hollow = sphere_conv2d(x.to("meta"), weight.to("meta"), **window)
    trained = sphere_conv2d(x.to("meta"), weight.to("meta").requires_grad_(), **window)
    assert (hollow.shape, hollow.dtype) == (trained.shape, trained.dtype) == (out.shape, out.dtype)
    assert hollow.grad_fn is None
    assert trained.grad_fn is not None
