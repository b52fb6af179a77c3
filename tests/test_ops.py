"""The formulas of a block's branches, against its modules, and the algebra that kernels make use of."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_poolformer import MetaFormerConfig, MetaFormerModel, ops


EPS = 1e-5


def gradients(y, *inputs):
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, inputs, grad, retain_graph=True)


@pytest.mark.parametrize("pool_size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 4, 7, 5), (3, 5, 1, 1), (1, 6, 2, 9)])
def test_the_pooling_branch_collapses_exactly(shape, pool_size):
    """The norm's mean and bias cancel, since pooling leaves a constant as it is: only the variance is needed."""
    x = (torch.randn(shape, dtype=torch.float64) + 2).requires_grad_()
    weight, bias, layer_scale, res_scale = (
        torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(4)
    )
    mask = torch.tensor([1.25, 0.0, 1.25], dtype=torch.float64)[: shape[0]]
    factor = torch.rsqrt(ops.sample_statistics(x)[:, 1] + EPS) * mask
    factor = factor[:, None] * weight * layer_scale
    branch = F.avg_pool2d(x, pool_size, 1, pool_size // 2, count_include_pad=False) - x
    collapsed = res_scale[:, None, None] * x + factor[..., None, None] * branch
    scales = {"weight": weight, "layer_scale": layer_scale, "res_scale": res_scale}
    y = ops.pool_mixer(x, pool_size=pool_size, eps=EPS, bias=bias, mask=mask, **scales)
    torch.testing.assert_close(y, collapsed)
    inputs = (x, weight, layer_scale, res_scale)
    torch.testing.assert_close(gradients(y, *inputs), gradients(collapsed, *inputs))
    (dbias,) = gradients(y, bias)
    assert dbias.abs().max() < 1e-12, "the norm's bias has no part in it"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "star_relu"])
def test_the_formulas_are_what_the_modules_of_a_block_compute(activation, autocast, scramble):
    """To the bit, and so are the gradients: the definition is what runs where no kernels do."""
    config = MetaFormerConfig(
        depths=(2, 1, 1, 1),
        hidden_sizes=(6, 8, 8, 8),
        hidden_act=activation,
        drop_path_rate=0.5,
        layer_scale_init_value=0.5,
        res_scale_init_values=(1.0, None, None, None),
        pool_size=5,
        kernels="reference",
    )
    block = scramble(MetaFormerModel(config)).encoder.block[0][1].train()
    x = (torch.randn(4, 6, 7, 5) + 2).requires_grad_()
    same = {"eps": block.before_norm.eps}
    norms, mlp, star = (block.before_norm, block.after_norm), block.output, {}
    if activation == "star_relu":
        star = {"act_scale": mlp.act_fn.scale, "act_bias": mlp.act_fn.bias}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(0)
        wanted = block(x)
        torch.manual_seed(0)
        y = ops.pool_mixer(
            x,
            pool_size=5,
            weight=norms[0].weight,
            bias=norms[0].bias,
            layer_scale=block.layer_scale_1,
            res_scale=block.res_scale_1,
            mask=block.drop_path.mask(x),
            **same,
        )
        y = ops.channel_mlp(
            y,
            mlp.conv1.weight,
            mlp.conv2.weight,
            activation=activation,
            norm_weight=norms[1].weight,
            norm_bias=norms[1].bias,
            bias1=mlp.conv1.bias,
            bias2=mlp.conv2.bias,
            layer_scale=block.layer_scale_2,
            res_scale=block.res_scale_2,
            mask=block.drop_path.mask(y.bfloat16() if autocast else y),  # as the branch is
            **star,
            **same,
        )
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, wanted, rtol=0, atol=0)
    inputs = (x, *block.parameters())
    torch.testing.assert_close(gradients(y, *inputs), gradients(wanted, *inputs), rtol=0, atol=0)


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
    y = ops.channel_mlp(
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


@pytest.mark.parametrize("autocast", [False, True])
def test_the_formulas_are_what_a_block_of_convformer_computes(autocast, scramble):
    """To the bit, and so are the gradients."""
    config = MetaFormerConfig.from_variant(
        "convformer_s18",
        depths=(2, 1, 1, 1),
        hidden_sizes=(6, 8, 8, 8),
        drop_path_rate=0.5,
        res_scale_init_values=(1.0, None, None, None),
        kernels="reference",
    )
    block = scramble(MetaFormerModel(config)).encoder.block[0][1].train()
    x = (torch.randn(4, 6, 9, 5) + 2).requires_grad_()
    mixer, mlp = block.token_mixer, block.output
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(0)
        wanted = block(x)
        torch.manual_seed(0)
        branch_dtype = torch.bfloat16 if autocast else x.dtype  # of the mask, too
        y = ops.separable_conv(
            x,
            mixer.pwconv1.weight,
            mixer.dwconv.weight,
            mixer.pwconv2.weight,
            eps=block.before_norm.eps,
            norm_weight=block.before_norm.weight,
            act_scale=mixer.act.scale,
            act_bias=mixer.act.bias,
            res_scale=block.res_scale_1,
            mask=block.drop_path.mask(x.to(branch_dtype)),
        )
        y = ops.channel_mlp(
            y,
            mlp.conv1.weight,
            mlp.conv2.weight,
            activation="star_relu",
            norm="channel",
            eps=block.after_norm.eps,
            norm_weight=block.after_norm.weight,
            act_scale=mlp.act_fn.scale,
            act_bias=mlp.act_fn.bias,
            res_scale=block.res_scale_2,
            mask=block.drop_path.mask(y.to(branch_dtype)),
        )
    torch.testing.assert_close(y, wanted, rtol=0, atol=0)
    inputs = (x, *block.parameters())
    torch.testing.assert_close(gradients(y, *inputs), gradients(wanted, *inputs), rtol=0, atol=0)


def test_star_relu_is_the_papers():
    from hf_poolformer.token_mixers import StarReLU

    star, z = StarReLU(), torch.randn(50)
    torch.testing.assert_close(star(z), 0.8944 * F.relu(z) ** 2 - 0.4472)
    torch.testing.assert_close(ops.activate(z, "star_relu", star.scale, star.bias), star(z))


def test_nothing_but_the_shortcut_and_branch_is_required():
    x = torch.randn(2, 4, 5, 3)
    y = ops.pool_mixer(x, pool_size=3, eps=EPS)
    normed = F.group_norm(x, 1, eps=EPS)
    torch.testing.assert_close(y, x + F.avg_pool2d(normed, 3, 1, 1, count_include_pad=False) - normed)
    weight1, weight2 = torch.randn(6, 4), torch.randn(4, 6)
    y = ops.channel_mlp(x, weight1, weight2, activation="relu", eps=EPS)
    hidden = F.relu(F.conv2d(normed, weight1[..., None, None]))
    torch.testing.assert_close(y, x + F.conv2d(hidden, weight2[..., None, None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_whatever_the_input(dtype):
    x = (torch.randn(2, 8, 16, 16) * 0.1 + 30).to(dtype)
    statistics = ops.sample_statistics(x)
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics, ops.sample_statistics(x.double()).float(), rtol=1e-4, atol=0)
    # Half precision rounds pool(x), pool(x) - x and the product: a few units of its last place of x.
    y = ops.pool_mixer(x, pool_size=3, eps=EPS)
    assert y.dtype == dtype
    exact = ops.pool_mixer(x.double(), pool_size=3, eps=EPS)
    error = (y.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_autocast_runs_products_low():
    x = torch.randn(2, 4, 5, 3)
    weight1, weight2 = torch.randn(6, 4), torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.channel_mlp(x, weight1, weight2, activation="gelu", eps=EPS)
        z = ops.pool_mixer(x, pool_size=3, eps=EPS)
    assert y.dtype == z.dtype == torch.float32
    exact = ops.channel_mlp(x.double(), weight1.double(), weight2.double(), activation="gelu", eps=EPS)
    error = (y.double() - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2, "products in bfloat16, and nothing worse"


def test_memory_format_is_kept():
    x = torch.randn(2, 8, 5, 3).contiguous(memory_format=torch.channels_last)
    y = ops.pool_mixer(x, pool_size=3, eps=EPS, layer_scale=torch.ones(8))
    z = ops.channel_mlp(x, torch.randn(16, 8), torch.randn(8, 16), activation="gelu", eps=EPS)
    assert all(result.is_contiguous(memory_format=torch.channels_last) for result in (y, z))


def test_wrong_arguments():
    x = torch.randn(1, 2, 3, 3)
    for pool_size in (0, 2, -1):
        with pytest.raises(ValueError, match="odd and positive"):
            ops.pool_mixer(x, pool_size=pool_size, eps=EPS)
    with pytest.raises(ValueError, match="Unknown activation 'tanh': not one of gelu"):
        ops.channel_mlp(x, torch.ones(4, 2), torch.ones(2, 4), activation="tanh", eps=EPS)
    with pytest.raises(ValueError, match="Unknown norm 'batch': neither group nor channel"):
        ops.channel_mlp(x, torch.ones(4, 2), torch.ones(2, 4), activation="relu", norm="batch", eps=EPS)
