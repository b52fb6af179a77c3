"""The branch with a separable convolution against float64 autograd of the modules that it stands for."""

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from hf_poolformer import MetaFormerConfig
from hf_poolformer.kernels import separable_conv as kernels
from hf_poolformer.modeling_poolformer import MetaFormerBlock
from hf_poolformer.token_mixers import SeparableConv


EPS = 1e-6
SCALES = ("layer_scale", "res_scale")


def branch(dim: int, scales: tuple[str, ...], window: int = 3) -> MetaFormerBlock:
    """
    A block whose first branch is ConvFormer's, parameters far from their initial values.

    ConvFormer's window is 7; for the interpreter, which takes a millisecond per multiply-add, 3 shows as much.
    """
    config = MetaFormerConfig(
        hidden_sizes=(dim,) * 4,
        token_mixers=("separable_conv",) * 4,
        norm_layer="layer_norm",
        norm_bias=False,
        norm_eps=EPS,
        use_mlp=False,
        use_layer_scale="layer_scale" in scales,
        layer_scale_init_value=1.0,
        res_scale_init_values=(1.0 if "res_scale" in scales else None,) * 4,
    )
    block = MetaFormerBlock(config, 0, token_mixer=SeparableConv(config, 0))
    block.token_mixer.dwconv = nn.Conv2d(2 * dim, 2 * dim, window, padding=window // 2, groups=2 * dim, bias=False)
    with torch.no_grad():
        for parameter in block.parameters():
            spread = 2 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3
            parameter.mul_(parameter.ndim == 1).add_(spread * torch.randn_like(parameter))
    return block


def tensors(block: MetaFormerBlock) -> dict[str, torch.Tensor | None]:
    mixer = block.token_mixer
    return {
        "norm_weight": block.before_norm.weight,
        "weight1": mixer.pwconv1.weight,
        "act_scale": mixer.act.scale,
        "act_bias": mixer.act.bias,
        "depthwise_weight": mixer.dwconv.weight,
        "weight2": mixer.pwconv2.weight,
        "layer_scale": block.layer_scale_1,
        "res_scale": block.res_scale_1,
    }


def separable_conv(x, named, mask, dtype=None, needs_gradient=True, run=kernels.separable_conv):
    return run(x, *named.values(), mask, EPS, dtype or x.dtype, needs_gradient)


def exact(block, x, mask, grad):
    """
    The branch and the gradients of x and of all parameters, by the modules in float64; then the gradients' norms.

    That of a learned scalar's is of the terms it sums, unless it is larger itself: see `exact` in test_channel_mlp.py.
    """
    block, x = block.double(), x.double().requires_grad_()
    seen = {}
    block.token_mixer.act.register_forward_hook(lambda act, inputs, output: seen.update(z=inputs[0], out=output))
    result = block.token_mixer(block.before_norm(x))
    seen["out"].retain_grad()
    if mask is not None:
        result = result * mask.double()[:, None, None, None]
    result = block.merge(x, result, block.layer_scale_1, block.res_scale_1)
    result.backward(grad.double())
    grads = {name: p.grad for name, p in tensors(block).items() if p is not None}
    sizes = {name: each.norm().item() for name, each in grads.items()}
    by_output = seen["out"].grad
    for name, terms in (("act_scale", by_output * seen["z"].relu() ** 2), ("act_bias", by_output)):
        sizes[name] = max(sizes[name], terms.norm().item())
    return result, x.grad, grads, sizes


def check(
    shape,
    scales,
    relative_error,
    tolerance,
    *,
    device,
    dtype=torch.float32,
    parameter_dtype=None,
    product_dtype=None,
    mask=True,
    mean=1.0,
    window=3,
):
    parameter_dtype = parameter_dtype or dtype
    block = branch(shape[1], scales, window).to(device, parameter_dtype)
    x = (2 * torch.randn(shape, device=device) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(shape, device=device).to(dtype)
    mask = torch.tensor([1.25, 0.0, 1.25], device=device)[torch.arange(shape[0]) % 3] if mask else None
    named = {name: None if p is None else p.detach().clone().requires_grad_() for name, p in tensors(block).items()}
    y_exact, dx_exact, exact_grads, sizes = exact(block, x, mask, grad)
    x.requires_grad_()
    y, _ = separable_conv(x, named, mask, product_dtype)
    y.backward(grad)
    bound = tolerance[product_dtype or dtype]
    assert y.dtype == dtype and x.grad.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, y_exact) < bound
    assert relative_error(x.grad, dx_exact) < bound
    for name, parameter in named.items():
        if parameter is not None:
            assert parameter.grad.dtype == parameter_dtype
            assert (parameter.grad - exact_grads[name]).norm() < bound * sizes[name], name
    with torch.no_grad():
        alone, kept = separable_conv(x, named, mask, product_dtype, needs_gradient=False)
    assert kept is None
    assert torch.equal(alone, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, scales", [((2, 6, 3, 5), SCALES), ((1, 10, 4, 3), ())])
def test_result_and_gradients(shape, scales, dtype, device, poisoned, relative_error, tolerance):
    check(shape, scales, relative_error, tolerance, device=device, dtype=dtype, mask=bool(scales))


# One token, one row, one column and more samples than a program has strips, two blocks of channels and a bit.
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 1, 5), (5, 3, 4, 1), (1, 17, 2, 2)])
def test_odd_sizes(shape, device, poisoned, relative_error, tolerance):
    check(shape, ("res_scale",), relative_error, tolerance, device=device, mask=False)


def test_the_window_of_convformer(device, poisoned, relative_error, tolerance):
    check((1, 4, 4, 5), (), relative_error, tolerance, device=device, mask=False, window=7)


def test_bands_of_rows(device, poisoned, relative_error, tolerance):
    # Few strips, many rows: the image is cut where another program has to read on.
    check((1, 4, 9, 2), ("layer_scale",), relative_error, tolerance, device=device)


@pytest.mark.parametrize("product_dtype", [torch.bfloat16, torch.float16])
def test_products_in_lower_precision(product_dtype, device, poisoned, relative_error, tolerance):
    # As under autocast; a mean far from zero is taken off before anything is rounded.
    check((2, 6, 3, 2), SCALES, relative_error, tolerance, device=device, product_dtype=product_dtype, mean=100.0)


def test_bfloat16_activations_with_float32_parameters(device, poisoned, relative_error, tolerance):
    dtypes = {"dtype": torch.bfloat16, "parameter_dtype": torch.float32}
    check((2, 6, 2, 3), SCALES, relative_error, tolerance, device=device, **dtypes)


def test_frozen_weights_get_no_gradient(device, poisoned, relative_error):
    block = branch(5, SCALES).to(device)
    x = torch.randn(2, 5, 2, 3, device=device).contiguous(memory_format=torch.channels_last)
    trained = ("norm_weight", "act_scale", "res_scale")
    named = {name: p.detach().clone().requires_grad_(name in trained) for name, p in tensors(block).items()}
    y, _ = separable_conv(x, named, None)
    y.square().sum().backward()
    _, _, grads, _ = exact(block, x, None, 2 * y.detach())
    for name, parameter in named.items():
        if name in trained:
            assert relative_error(parameter.grad, grads[name]) < 1e-5, name
        else:
            assert parameter.grad is None


def test_nan_and_infinity_are_not_hidden(device):
    named = {name: None if p is None else p.detach() for name, p in tensors(branch(4, ()).to(device)).items()}
    x = torch.randn(2, 4, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
    x[1, 2, 2, 3] = float("nan")
    y, _ = separable_conv(x, named, None, needs_gradient=False)
    # The window around the token, nothing beyond it, and nothing in the other sample.
    assert y[0].isfinite().all()
    assert y[1, :, 1:4, 2:5].isnan().all()
    assert y[1].isnan().any(0).sum() == 9


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(needs_gradient, device):
    named = tensors(branch(4, SCALES).to(device))
    x = torch.randn(2, 4, 2, 3, device=device).contiguous(memory_format=torch.channels_last)
    mask = torch.tensor([0.0, 1.25], device=device)
    parameters = [p.detach().requires_grad_(needs_gradient) for p in named.values()]
    arguments = (x.requires_grad_(needs_gradient), *parameters, mask, EPS, torch.float32, needs_gradient)
    opcheck(torch.ops.hf_poolformer.separable_conv.default, arguments)


@pytest.mark.parametrize("wanted", [[False] * 8, [True] * 8])
def test_opcheck_of_backward(wanted, device):
    named = tensors(branch(4, SCALES).to(device))
    x = torch.randn(2, 4, 2, 3, device=device).contiguous(memory_format=torch.channels_last)
    parameters = [p.detach() for p in named.values()]
    z, mask = torch.randn(12, 8, device=device), torch.tensor([0.0, 1.25], device=device)
    arguments = (torch.randn_like(x), x, z, *parameters, mask, EPS, wanted)
    opcheck(torch.ops.hf_poolformer.separable_conv_backward.default, arguments)


def test_what_was_not_saved_has_no_backward(device):
    named = tensors(branch(4, ()).to(device))
    x = torch.randn(1, 4, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    y, _ = separable_conv(x, named, None, needs_gradient=False)
    with pytest.raises(RuntimeError, match="needs_gradient=False"):
        y.sum().backward()


def test_operations_are_counted(device):
    named = {name: None if p is None else p.detach() for name, p in tensors(branch(4, ()).to(device)).items()}
    x = torch.randn(2, 4, 2, 3, device=device).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        separable_conv(x, named, None, needs_gradient=False, run=torch.ops.hf_poolformer.separable_conv)
    assert counter.get_total_flops() == 2 * 12 * 8 * (4 + 9 + 4)


# Most of their time is the compiler's: every stage's shape, and every dtype.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((8, 64, 56, 56), torch.bfloat16),
        ((8, 128, 28, 28), torch.float32),
        ((9, 320, 14, 14), torch.bfloat16),
        ((8, 512, 7, 7), torch.float16),
        ((1, 96, 65, 33), torch.float32),
    ],
)
def test_at_real_sizes(shape, dtype, device, poisoned, relative_error, tolerance):
    tolerance[torch.float32] = 1e-5  # of sums over 25 thousand tokens
    check(shape, SCALES, relative_error, tolerance, device=device, dtype=dtype, window=7)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (8, 512, 7, 7)])
def test_products_in_lower_precision_at_real_sizes(shape, device, poisoned, relative_error, tolerance):
    check(shape, SCALES, relative_error, tolerance, device=device, product_dtype=torch.bfloat16, window=7)
