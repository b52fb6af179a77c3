"""The pooling branch against float64 autograd of norm, pooling, scales and shortcut: result and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from hf_poolformer import fused_operations, ops


V1 = {"weight": True, "layer_scale": True}
V2 = {"weight": True, "res_scale": True}
ALL = {"weight": True, "layer_scale": True, "res_scale": True}


def make(shape, dtype, device, scales, mask):
    x = (torch.randn(shape, device=device) * 2 + 3).to(dtype)
    scales = {name: torch.randn(shape[1], device=device) for name in scales}
    mask = torch.tensor([1.25, 0.0, 1.25], device=device)[torch.arange(shape[0]) % 3] if mask else None
    return x, scales, mask, torch.randn(shape, device=device).to(dtype)


def exact(x, scales, mask, grad, pool_size, eps):
    """y and the gradients of x and the scales, in float64, by the plain formula with a norm that has a bias."""
    x = x.double().requires_grad_()
    scales = {name: scale.double().requires_grad_() for name, scale in scales.items()}
    bias = torch.linspace(-1, 1, x.shape[1], device=x.device, dtype=torch.float64)
    normed = F.group_norm(x, 1, scales.get("weight"), bias, eps)
    branch = F.avg_pool2d(normed, pool_size, 1, pool_size // 2, count_include_pad=False) - normed
    if mask is not None:
        branch = branch * mask.double()[:, None, None, None]
    if "layer_scale" in scales:
        branch = branch * scales["layer_scale"][:, None, None]
    y = branch + (x * scales["res_scale"][:, None, None] if "res_scale" in scales else x)
    y.backward(grad.double())
    return y, x.grad, {name: scale.grad for name, scale in scales.items()}


def check(shape, dtype, device, scales, mask, pool_size, eps, relative_error, tolerance, memory_format):
    x, scales, mask, grad = make(shape, dtype, device, scales, mask)
    y_exact, dx_exact, dscales_exact = exact(x, scales, mask, grad, pool_size, eps)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    scales = {name: scale.requires_grad_() for name, scale in scales.items()}
    y, statistics = fused_operations.pool_mixer(
        x, pool_size=pool_size, eps=eps, mask=mask, **scales, with_statistics=True, backend="triton"
    )
    y.backward(grad)
    assert y.dtype == dtype and x.grad.dtype == dtype
    assert not statistics.requires_grad
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, y_exact) < tolerance[dtype]
    assert relative_error(statistics, ops.sample_statistics(y.double())) < 1e-5
    assert relative_error(x.grad, dx_exact) < tolerance[dtype]
    for name, scale in scales.items():
        # Sums of exact products of inputs, in float32 for every dtype.
        if dscales_exact[name].norm() > 0:
            assert relative_error(scale.grad, dscales_exact[name]) < tolerance[torch.float32], name
        else:
            assert scale.grad.norm() == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape, scales, mask, pool_size, eps",
    [
        ((3, 20, 7, 5), V1, True, 3, 1e-5),
        ((2, 17, 6, 9), V2, False, 3, 1e-6),
        ((1, 33, 1, 1), ALL, False, 3, 1e-5),
    ],
)
def test_result_and_gradients(shape, scales, mask, pool_size, eps, dtype, device, poisoned, relative_error, tolerance):
    format = torch.channels_last
    check(shape, dtype, device, scales, mask, pool_size, eps, relative_error, tolerance, format)


@pytest.mark.parametrize("pool_size", [1, 5, 7])
@pytest.mark.parametrize("scales", [{}, ALL])
def test_other_pool_sizes_and_memory_formats(pool_size, scales, device, poisoned, relative_error, tolerance):
    # Windows larger than the image, x in the default memory format, and no parameters at all.
    arguments = (scales, True, pool_size, 1e-5, relative_error, tolerance, torch.contiguous_format)
    check((2, 5, 5, 3), torch.float32, device, *arguments)


def test_known_statistics_change_nothing(device, poisoned):
    x, scales, mask, grad = make((2, 20, 7, 5), torch.float32, device, ALL, True)
    known = ops.sample_statistics(x)
    results = []
    for statistics in (None, known):
        x = x.detach().requires_grad_()
        y, _ = fused_operations.pool_mixer(
            x, pool_size=3, eps=1e-5, mask=mask, statistics=statistics, **scales, backend="triton"
        )
        y.backward(grad)
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_statistics_of_a_mean_far_from_zero(scale, device, relative_error):
    """Deviations are taken from what the mean is about to be: a sum of squares would have lost the variance."""
    x = torch.randn(2, 20, 7, 5, device=device) + 3000
    res_scale = None if scale is None else torch.full((20,), scale, device=device)
    weight = torch.randn(20, device=device)
    y, statistics = fused_operations.pool_mixer(
        x, pool_size=3, eps=1e-5, weight=weight, res_scale=res_scale, with_statistics=True, backend="triton"
    )
    # float32 has 2^-24 of 3000 for each entry, 2e-4 of its deviation.
    assert relative_error(statistics[:, 1], ops.sample_statistics(y.double())[:, 1]) < 1e-4


def test_one_result_every_time(device):
    x, scales, _, grad = make((2, 20, 5, 6), torch.bfloat16, device, ALL, False)
    results = []
    for _ in range(2):
        x = x.detach().requires_grad_()
        weight = scales["weight"].detach().requires_grad_()
        y, _ = fused_operations.pool_mixer(x, pool_size=3, eps=1e-5, weight=weight, backend="triton")
        y.backward(grad)
        results.append((y, x.grad, weight.grad))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


# Most of their time is the compiler's: every stage's shape in two dtypes, and either family's scales.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, dtype, scales, eps",
    [
        ((8, 64, 56, 56), torch.bfloat16, V1, 1e-5),
        ((8, 64, 56, 56), torch.float32, V2, 1e-6),
        ((8, 128, 28, 28), torch.bfloat16, V2, 1e-6),
        ((8, 128, 28, 28), torch.float16, V1, 1e-5),
        ((9, 320, 14, 14), torch.bfloat16, V1, 1e-5),
        ((9, 320, 14, 14), torch.float32, V1, 1e-5),
        ((8, 512, 7, 7), torch.bfloat16, V1, 1e-5),
        ((8, 512, 7, 7), torch.float16, V2, 1e-6),
        ((1, 96, 129, 65), torch.bfloat16, V2, 1e-6),
        ((1, 96, 129, 65), torch.float32, V1, 1e-5),
    ],
)
def test_at_real_sizes(shape, dtype, scales, eps, device, poisoned, relative_error, tolerance):
    tolerance[torch.float32] = 1e-5  # of sums over 25 thousand tokens
    check(shape, dtype, device, scales, True, 3, eps, relative_error, tolerance, torch.channels_last)
