"""The statistics kernel against float64, where E[x^2] - mean^2 would fail as well."""

import pytest
import torch

from hf_poolformer import backends, ops


SHAPES = [(1, 1, 1, 1), (3, 5, 7, 5), (2, 20, 14, 13)]
GPU_SHAPES = [(8, 64, 56, 56), (3, 512, 7, 7), (1, 96, 129, 65)]


def check(shape, dtype, device, offset, relative_error, bound=2e-6):
    x = (torch.randn(shape, device=device) + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    backends.why_not_triton(x)  # registers the operations
    statistics = torch.ops.hf_poolformer.sample_statistics(x)
    exact = ops.sample_statistics(x.double())
    assert statistics.dtype == torch.float32
    assert relative_error(statistics[:, 0], exact[:, 0]) < 1e-6
    assert relative_error(statistics[:, 1], exact[:, 1]) < bound or x[0].numel() == 1
    return statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_variance(shape, dtype, device, poisoned, relative_error):
    check(shape, dtype, device, 0.5, relative_error)


@pytest.mark.parametrize("offset, bound", [(1e3, 2e-5), (-1e4, 2e-4)])
def test_a_mean_far_from_zero(offset, bound, device, poisoned, relative_error):
    # |mean| / std * 2^-24 = 6e-5 and 6e-4 at worst. E[x^2] - mean^2 would be off by 0.06 and 6 for a variance of 1.
    check((2, 20, 14, 13), torch.float32, device, offset, relative_error, bound)


def test_a_constant_sample_has_no_variance(device, poisoned):
    x = torch.full((2, 5, 7, 3), 1234.5, device=device).contiguous(memory_format=torch.channels_last)
    assert backends.why_not_triton(x) is None
    assert torch.ops.hf_poolformer.sample_statistics(x).tolist() == [[1234.5, 0.0]] * 2


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_variance_of_tokens(shape, device, poisoned, relative_error):
    x = (torch.randn(shape, device=device) + 50).contiguous(memory_format=torch.channels_last)
    assert backends.why_not_triton(x) is None
    statistics = torch.ops.hf_poolformer.token_statistics(x)
    variance, mean = torch.var_mean(x.double().permute(0, 2, 3, 1).reshape(-1, shape[1]), dim=1, correction=0)
    assert statistics.dtype == torch.float32
    assert relative_error(statistics[:, 0], mean) < 1e-6
    # |mean| / std * 2^-24 = 3e-6.
    assert relative_error(statistics[:, 1], variance) < 1e-5 or shape[1] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_at_real_sizes(shape, dtype, device, poisoned, relative_error):
    first = check(shape, dtype, device, 3.0, relative_error)
    assert first.isfinite().all()
