"""LayerNorm over channels and the addition to the shortcut against float64 autograd of their formulas."""

import pytest
import torch

from hf_poolformer import ops
from hf_poolformer.kernels import token_norm as kernels


EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative. One rounding of each result, beside float32 sums over a row; half precision rounds to 2^-11 and 2^-8.
# The interpreter cuts bits off bfloat16 instead of rounding to nearest.
ROUNDING = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}


@pytest.fixture
def bounds(device):
    return {**ROUNDING, torch.bfloat16: ROUNDING[torch.bfloat16] * (2 if device == "cpu" else 1)}


def nhwc(shape, device, dtype, mean=0.0):
    values = (2 * torch.randn(shape, device=device) + mean).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def vector(size, device, dtype, there=True):
    return (torch.randn(size, device=device) + 0.5).to(dtype).requires_grad_() if there else None


def doubled(*tensors):
    return [None if each is None else each.detach().double().requires_grad_(each.requires_grad) for each in tensors]


def check_gradients(tensors, exact, bound, relative_error):
    for index, (tensor, wanted) in enumerate(zip(tensors, exact, strict=True)):
        if tensor is not None and tensor.requires_grad:
            assert tensor.grad.dtype == tensor.dtype
            assert relative_error(tensor.grad, wanted.grad) < bound, index
        else:
            assert tensor is None or tensor.grad is None


def check_norm(
    shape, relative_error, bounds, *, device, dtype=torch.float32, out=None, affine=(True, True), mean=1.0, factor=1
):
    out = out or dtype
    x = nhwc(shape, device, dtype, mean).requires_grad_()
    weight, bias = (vector(shape[1], device, dtype, there) for there in affine)
    exact = doubled(x, weight, bias)
    wanted = ops.normalise(exact[0], "channel", *exact[1:], EPS)
    normed = kernels.token_norm(x, weight, bias, EPS, out)
    assert normed.dtype == out and normed.is_contiguous(memory_format=torch.channels_last)
    bound = factor * max(bounds[dtype], bounds[out])
    assert relative_error(normed, wanted) < bound
    g = nhwc(shape, device, out)
    normed.backward(g)
    wanted.backward(g.double())
    # r of a row that is nearly constant multiplies what float32 leaves over of q - mean q.
    check_gradients((x, weight, bias), exact, 4 * bound, relative_error)
    with torch.no_grad():
        assert torch.equal(kernels.token_norm(x, weight, bias, EPS, out), normed)


# Not a power of two, more rows than all programs take at once, one token.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (3, 20, 7, 9), (1, 32, 1, 1)])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
def test_result_and_gradients(shape, affine, dtype, device, poisoned, relative_error, bounds):
    check_norm(shape, relative_error, bounds, device=device, dtype=dtype, affine=affine)


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_a_result_in_lower_precision(out, device, poisoned, relative_error, bounds):
    check_norm((2, 6, 3, 5), relative_error, bounds, device=device, out=out)


def test_a_result_in_higher_precision(device, poisoned, relative_error, bounds):
    check_norm((2, 6, 3, 5), relative_error, bounds, device=device, dtype=torch.bfloat16, out=torch.float32)


def test_a_mean_far_from_zero(device, poisoned, relative_error, bounds):
    # |mean| / std * 2^-24 = 3e-5, where E[x^2] - mean^2 would be off by a hundredth.
    check_norm((2, 20, 3, 5), relative_error, bounds, device=device, mean=1e3, factor=100)


def test_one_channel_is_its_own_mean(device, poisoned):
    x = nhwc((2, 1, 3, 2), device, torch.float32, 5.0).requires_grad_()
    weight, bias = vector(1, device, torch.float32), vector(1, device, torch.float32)
    normed = kernels.token_norm(x, weight, bias, EPS, torch.float32)
    normed.sum().backward()
    assert torch.equal(normed, bias.detach().expand_as(normed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert not x.grad.any() and not weight.grad.any() and bias.grad.item() == 12


def test_nan_and_infinity_stay_in_their_token(device):
    x = nhwc((1, 6, 2, 3), device, torch.float32)
    x[0, 2, 1, 1], x[0, 4, 0, 2] = float("nan"), float("inf")
    normed = kernels.token_norm(x, None, None, EPS, torch.float32)
    bad = normed.isnan()
    assert bad[0, :, 1, 1].all() and bad[0, :, 0, 2].all() and bad.sum() == 12


def check_branch(
    shape,
    relative_error,
    bounds,
    *,
    device,
    dtype=torch.float32,
    branch_dtype=None,
    out=None,
    layer=True,
    res=True,
    mask=True,
):
    """Norm, a mixer and the addition, as a block has them."""
    out, branch_dtype = out or dtype, branch_dtype or dtype
    x = nhwc(shape, device, dtype, 1.0).requires_grad_()
    parameters = [vector(shape[1], device, dtype, there) for there in (True, True, layer, res)]
    weight, bias, layer_scale, res_scale = parameters
    mask = torch.tensor([1.25, 0.0, 1.25], device=device)[torch.arange(shape[0]) % 3] if mask else None
    exact = doubled(x, *parameters)
    mixed = 2 * ops.normalise(exact[0], "channel", *exact[1:3], EPS)
    wanted = ops.residual(exact[0], ops.drop(mixed, None if mask is None else mask.double()), *exact[3:])

    normed, shortcut = kernels.norm_and_shortcut(x, weight, bias, res_scale, EPS, branch_dtype)
    y, statistics = kernels.merge(shortcut, 2 * normed, layer_scale, res_scale, mask, out, True)
    assert y.dtype == out and y.is_contiguous(memory_format=torch.channels_last)
    bound = 2 * max(bounds[dtype], bounds[branch_dtype], bounds[out])
    assert relative_error(y, wanted) < bound
    variance, mean = torch.var_mean(y.detach().double(), dim=1, correction=0)
    assert statistics.dtype == torch.float32 and not statistics.requires_grad
    assert relative_error(statistics[:, 0], mean.flatten()) < 1e-6
    assert relative_error(statistics[:, 1], variance.flatten()) < 1e-6
    g = nhwc(shape, device, out)
    y.backward(g)
    wanted.backward(g.double())
    check_gradients((x, *parameters), exact, 4 * bound, relative_error)
    with torch.no_grad():
        again, none = kernels.merge(shortcut, 2 * normed, layer_scale, res_scale, mask, out, False)
    assert torch.equal(again, y) and none is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [(True, True, True), (False, True, False), (False, False, False)])
def test_a_branch_around_a_mixer(scales, dtype, device, poisoned, relative_error, bounds):
    layer, res, mask = scales
    check_branch((3, 20, 4, 5), relative_error, bounds, device=device, dtype=dtype, layer=layer, res=res, mask=mask)


@pytest.mark.parametrize("scales", [(True, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_in_lower_precision(dtype, scales, device, poisoned, relative_error, bounds):
    """As under autocast, in which a convolution gave x and products gave the branch."""
    dtypes = {"dtype": dtype, "branch_dtype": torch.bfloat16, "out": torch.float32}
    check_branch((2, 6, 3, 5), relative_error, bounds, device=device, **dtypes, layer=scales[0], mask=scales[1])


@pytest.mark.parametrize("trained", ["weight", "bias", "res_scale", "layer_scale", "x"])
def test_what_is_frozen_gets_no_gradient(trained, device, poisoned, relative_error):
    x = nhwc((2, 6, 3, 5), device, torch.float32)
    named = {name: vector(6, device, torch.float32) for name in ("weight", "bias", "layer_scale", "res_scale")}
    named = {"x": x, **named}
    exact = dict(zip(named, doubled(*named.values()), strict=True))
    for values in (named, exact):
        for name, tensor in values.items():
            tensor.requires_grad_(name == trained)
    normed, shortcut = kernels.norm_and_shortcut(x, named["weight"], named["bias"], named["res_scale"], EPS, x.dtype)
    scales = named["layer_scale"], named["res_scale"]
    kernels.merge(shortcut, normed, *scales, None, x.dtype, False)[0].square().sum().backward()
    normed = ops.normalise(exact["x"], "channel", exact["weight"], exact["bias"], EPS)
    ops.residual(exact["x"], normed, exact["layer_scale"], exact["res_scale"]).square().sum().backward()
    for name, tensor in named.items():
        assert (tensor.grad is not None) == (name == trained), name
    assert relative_error(named[trained].grad, exact[trained].grad) < 1e-5


@pytest.mark.parametrize("used", ["norm", "shortcut"])
def test_only_one_of_the_two_is_used(used, device, poisoned, relative_error):
    """A mixer may ignore its input, a branch its shortcut."""
    x = nhwc((2, 6, 3, 5), device, torch.float32).requires_grad_()
    weight, res_scale = vector(6, device, torch.float32), vector(6, device, torch.float32)
    exact = doubled(x, weight, res_scale)
    normed, shortcut = kernels.norm_and_shortcut(x, weight, None, res_scale, EPS, x.dtype)
    if used == "norm":
        normed.square().sum().backward()
        ops.normalise(exact[0], "channel", exact[1], None, EPS).square().sum().backward()
        assert res_scale.grad is None
        check_gradients((x, weight), exact[:2], 1e-5, relative_error)
    else:
        branch = torch.randn_like(x)
        kernels.merge(shortcut, branch, None, res_scale, None, x.dtype, False)[0].square().sum().backward()
        ops.residual(exact[0], branch.double(), None, exact[2]).square().sum().backward()
        assert not weight.grad.any()
        check_gradients((x, res_scale), exact[::2], 1e-5, relative_error)


def test_gradients_of_gradients_are_refused(device):
    x = nhwc((1, 4, 2, 2), device, torch.float32).requires_grad_()
    normed = kernels.token_norm(x, None, None, EPS, x.dtype)
    (gradient,) = torch.autograd.grad(normed.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (9, 320, 14, 14), (8, 512, 7, 7), (1, 96, 65, 33)])
def test_at_real_sizes(shape, dtype, device, poisoned, relative_error, bounds):
    check_norm(shape, relative_error, bounds, device=device, dtype=dtype)
    check_branch(shape, relative_error, bounds, device=device, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (8, 512, 7, 7)])
def test_lower_precision_at_real_sizes(shape, device, poisoned, relative_error, bounds):
    check_branch(shape, relative_error, bounds, device=device, branch_dtype=torch.bfloat16)
