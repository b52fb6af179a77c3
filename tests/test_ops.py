"""The definition of the fused operations, against the modules they stand for, and the choice of who computes them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_poolformer import ops


SCALES = ("weight", "layer_scale", "res_scale")
EPS = 1e-5


def plain_mixer(x, pool_size, eps, weight, bias, layer_scale, res_scale, mask):
    normed = F.group_norm(x, 1, weight, bias, eps)
    branch = F.avg_pool2d(normed, pool_size, 1, pool_size // 2, count_include_pad=False) - normed
    branch = branch * mask[:, None, None, None] * layer_scale[:, None, None]
    return res_scale[:, None, None] * x + branch


def gradients(y, *inputs):
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, inputs, grad, retain_graph=True)


@pytest.mark.parametrize("pool_size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 4, 7, 5), (3, 5, 1, 1), (1, 6, 2, 9)])
def test_the_pooling_branch_collapses_exactly(shape, pool_size):
    x = (torch.randn(shape, dtype=torch.float64) + 2).requires_grad_()
    weight, bias, layer_scale, res_scale = (
        torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(4)
    )
    mask = torch.tensor([1.25, 0.0, 1.25], dtype=torch.float64)[: shape[0]]
    expected = plain_mixer(x, pool_size, EPS, weight, bias, layer_scale, res_scale, mask)
    scales = {"weight": weight, "layer_scale": layer_scale, "res_scale": res_scale}
    y, _ = ops.pool_mixer(x, pool_size=pool_size, eps=EPS, mask=mask, **scales)
    torch.testing.assert_close(y, expected)
    inputs = (x, weight, layer_scale, res_scale)
    torch.testing.assert_close(gradients(y, *inputs), gradients(expected, *inputs))
    (dbias,) = gradients(expected, bias)
    assert dbias.abs().max() < 1e-12, "the norm's bias has no part in it"


@pytest.mark.parametrize("activation", list(ops.ACTIVATIONS))
def test_the_mlp_branch_is_norm_mlp_and_scales(activation):
    x = (torch.randn(2, 4, 5, 3, dtype=torch.float64) + 2).requires_grad_()
    conv1, conv2 = nn.Conv2d(4, 6, 1).double(), nn.Conv2d(6, 4, 1).double()
    norm = nn.GroupNorm(1, 4, eps=EPS).double()
    layer_scale, res_scale = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([0.0, 1.25], dtype=torch.float64)
    star = {}
    if activation == "star_relu":
        star = {name: torch.randn(1, dtype=torch.float64, requires_grad=True) for name in ("act_scale", "act_bias")}
    hidden = ops.activate(conv1(norm(x)), activation, **star)
    branch = conv2(hidden) * mask[:, None, None, None] * layer_scale[:, None, None]
    expected = res_scale[:, None, None] * x + branch
    y, _ = ops.channel_mlp(
        x,
        conv1.weight,
        conv2.weight,
        activation=activation,
        eps=EPS,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        bias1=conv1.bias,
        bias2=conv2.bias,
        layer_scale=layer_scale,
        res_scale=res_scale,
        mask=mask,
        **star,
    )
    torch.testing.assert_close(y, expected)
    inputs = (x, *conv1.parameters(), *conv2.parameters(), *norm.parameters(), layer_scale, res_scale)
    inputs += tuple(star.values())
    torch.testing.assert_close(gradients(y, *inputs), gradients(expected, *inputs))


def test_star_relu_is_the_models_activation():
    from hf_poolformer.token_mixers import StarReLU

    star, z = StarReLU(), torch.randn(50)
    torch.testing.assert_close(ops.activate(z, "star_relu", star.scale, star.bias), star(z))


def test_nothing_but_the_shortcut_and_branch_is_required():
    x = torch.randn(2, 4, 5, 3)
    y, _ = ops.pool_mixer(x, pool_size=3, eps=EPS)
    one = torch.ones(4)
    torch.testing.assert_close(y, plain_mixer(x, 3, EPS, one, None, one, one, torch.ones(2)))
    weight1, weight2 = torch.randn(6, 4), torch.randn(4, 6)
    y, _ = ops.channel_mlp(x, weight1, weight2, activation="relu", eps=EPS)
    hidden = F.relu(F.conv2d(F.group_norm(x, 1, eps=EPS), weight1[..., None, None]))
    torch.testing.assert_close(y, x + F.conv2d(hidden, weight2[..., None, None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_whatever_the_input(dtype):
    x = (torch.randn(2, 8, 16, 16) * 0.1 + 30).to(dtype)
    statistics = ops.sample_statistics(x)
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics, ops.sample_statistics(x.double()).float(), rtol=1e-4, atol=0)
    # Half precision rounds pool(x), pool(x) - x and the product: a few units of its last place of x.
    y, _ = ops.pool_mixer(x, pool_size=3, eps=EPS)
    assert y.dtype == dtype
    exact, _ = ops.pool_mixer(x.double(), pool_size=3, eps=EPS)
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_known_statistics_are_used_where_nothing_differentiates_through_them():
    x = torch.randn(2, 4, 5, 3)
    wrong = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    y, _ = ops.pool_mixer(x, pool_size=3, eps=0.0, statistics=wrong, backend="reference")
    pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(y, x + 0.5 * (pooled - x))
    known = ops.sample_statistics(x)
    leaf = x.clone().requires_grad_()
    first = gradients(ops.pool_mixer(leaf, pool_size=3, eps=EPS, statistics=known, backend="reference")[0], leaf)
    second = gradients(ops.pool_mixer(leaf, pool_size=3, eps=EPS, backend="reference")[0], leaf)
    torch.testing.assert_close(first, second)


def test_autocast_runs_products_low_and_returns_float32():
    x = torch.randn(2, 4, 5, 3, dtype=torch.bfloat16)
    weight1, weight2 = torch.randn(6, 4), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = ops.channel_mlp(x, weight1, weight2, activation="gelu", eps=EPS)
        z, _ = ops.pool_mixer(x, pool_size=3, eps=EPS)
    assert y.dtype == z.dtype == torch.float32
    exact, _ = ops.channel_mlp(x.double(), weight1.double(), weight2.double(), activation="gelu", eps=EPS)
    error = (y.double() - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2, "products in bfloat16, and nothing worse"


def test_memory_format_is_kept_by_the_reference():
    x = torch.randn(2, 8, 5, 3).contiguous(memory_format=torch.channels_last)
    y, _ = ops.pool_mixer(x, pool_size=3, eps=EPS, layer_scale=torch.ones(8))
    z, _ = ops.channel_mlp(x, torch.randn(16, 8), torch.randn(8, 16), activation="gelu", eps=EPS)
    assert all(result.is_contiguous(memory_format=torch.channels_last) for result in (y, z))


def test_compiles_into_one_graph():
    weight1, weight2 = torch.randn(16, 8), torch.randn(8, 16)

    def block(x):
        x, statistics = ops.pool_mixer(x, pool_size=3, eps=EPS, with_statistics=True)
        return ops.channel_mlp(x, weight1, weight2, activation="gelu", eps=EPS, statistics=statistics)[0]

    x = torch.randn(2, 8, 5, 3)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_the_choice_of_a_backend(monkeypatch):
    x = torch.randn(1, 2, 3, 3)
    monkeypatch.delenv("HF_POOLFORMER_KERNELS", raising=False)
    fastest = "cpu" if ops.why_not_cpu(x) is None else "reference"
    with torch.no_grad():
        assert ops.choose_backend(x) == fastest
        assert ops.choose_backend(x, preferred="reference") == "reference"
        monkeypatch.setenv("HF_POOLFORMER_KERNELS", "auto")
        assert ops.choose_backend(x, preferred="reference") == fastest
    assert ops.choose_backend(x) == "reference", "with gradients the CPU's kernels are not the fastest"
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="auto, cpu, triton, reference but is 'nonsense'"):
        ops.pool_mixer(x, pool_size=3, eps=EPS)
    ops.pool_mixer(x, pool_size=3, eps=EPS, backend="reference")  # the argument wins
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "triton")
    monkeypatch.setattr(ops, "_why_no_kernels", lambda device, index: "there is no Triton")
    with pytest.raises(RuntimeError, match=r"cannot run: there is no Triton.*HF_POOLFORMER_KERNELS=auto"):
        ops.pool_mixer(x, pool_size=3, eps=EPS)
    monkeypatch.setenv("HF_POOLFORMER_KERNELS", "")
    ops.pool_mixer(x, pool_size=3, eps=EPS)  # empty is unset


@pytest.mark.parametrize(
    "x, parameter, reason",
    [
        (torch.ones(1, 2, 3, 3, dtype=torch.float64), None, "x is torch.float64"),
        (torch.ones(2, 3, 3), None, "not \\(batch, channels, height, width\\)"),
        (torch.ones(0, 2, 3, 3), None, "x is empty"),
        (torch.ones(1, 2, 3, 3), torch.ones(2, dtype=torch.int64), "a parameter is torch.int64"),
        (torch.ones(1, 2, 3, 3), torch.ones(2, device="meta"), "a parameter on meta"),
    ],
)
def test_what_kernels_do_not_support_has_a_reason(x, parameter, reason, monkeypatch):
    monkeypatch.setattr(ops, "_why_no_kernels", lambda device, index: None)
    with pytest.raises(RuntimeError, match=reason):
        ops.choose_backend(x, parameter, backend="triton")
    with torch.no_grad():
        assert ops.choose_backend(x, parameter, backend="auto") == "reference"
    assert ops.why_not_triton(torch.ones(1, 2, 3, 3), torch.ones(2), None) is None


def test_unsupported_devices_have_a_reason():
    assert "CUDA GPUs only" in ops.why_not_triton(torch.ones(1, 2, 3, 3, device="meta"))


def test_without_triton_or_this_package_the_reference_works(run_python):
    code = """
import sys, torch
from hf_poolformer import ops

x = torch.ones(1, 2, 3, 3)
for missing in ("hf_poolformer.kernels", "triton"):
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or "hf_poolformer.kernels" in name]:
        del sys.modules[name]
    sys.modules[missing] = None
    print(ops.why_not_triton(x), tuple(ops.pool_mixer(x, pool_size=3, eps=1e-5)[0].shape))
"""
    first, second = run_python(code).stdout.splitlines()
    assert first.startswith("hf_poolformer.kernels") and "is not installed" in first and "(1, 2, 3, 3)" in first
    assert "triton is not installed" in second and "(1, 2, 3, 3)" in second


def test_kernels_of_another_interface_are_left_alone(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "INTERFACE", ops.INTERFACE + 1)
    assert "has kernels of interface" in ops.why_not_triton(torch.ones(1, 2, 3, 3))


def test_wrong_arguments():
    x = torch.randn(1, 2, 3, 3)
    for pool_size in (0, 2, -1):
        with pytest.raises(ValueError, match="odd and positive"):
            ops.pool_mixer(x, pool_size=pool_size, eps=EPS)
    with pytest.raises(ValueError, match="Unknown activation 'tanh': not one of gelu"):
        ops.channel_mlp(x, torch.ones(4, 2), torch.ones(2, 4), activation="tanh", eps=EPS)
