"""The MLP branch against float64 autograd of norm, convolutions, activation, scales and shortcut."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

from hf_poolformer import backends, ops


V1 = ("norm_weight", "norm_bias", "bias1", "bias2", "layer_scale")
V2 = ("norm_weight", "res_scale")
ALL = (*V1, "res_scale")
OPERATIONS = {
    "triton": lambda *args, **settings: backends.channel_mlp(*args, **settings, backend="triton")[0],
    "reference": ops.channel_mlp,
}


def make(shape, inner, dtype, parameter_dtype, device, names, activation, mask):
    dim = shape[1]
    x = (torch.randn(shape, device=device) * 2 + 3).to(dtype)
    sizes = {"weight1": (inner, dim, 1, 1), "weight2": (dim, inner, 1, 1)}
    sizes |= {name: (inner if name == "bias1" else dim,) for name in names}
    if activation == "star_relu":
        sizes |= {"act_scale": (1,), "act_bias": (1,)}
    parameters = {name: 0.3 * torch.randn(size, device=device) for name, size in sizes.items()}
    for name in ("norm_weight", "res_scale", "act_scale"):
        if name in parameters:
            parameters[name] += 1
    for name, size in (("weight1", dim), ("weight2", inner)):
        parameters[name] *= 3 / size**0.5
    parameters = {name: parameter.to(parameter_dtype) for name, parameter in parameters.items()}
    mask = torch.tensor([1.25, 0.0, 1.25], device=device)[torch.arange(shape[0]) % 3] if mask else None
    return x, parameters, mask, torch.randn(shape, device=device).to(dtype)


def exact(x, parameters, mask, grad, activation, eps):
    """y and the gradients of x and the parameters, in float64, by the plain formula."""
    x = x.double().requires_grad_()
    p = {name: parameter.double().requires_grad_() for name, parameter in parameters.items()}
    hidden = F.conv2d(F.group_norm(x, 1, p.get("norm_weight"), p.get("norm_bias"), eps), p["weight1"], p.get("bias1"))
    hidden = {
        "gelu": F.gelu,
        "silu": F.silu,
        "relu": F.relu,
        "squared_relu": lambda z: F.relu(z) ** 2,
        "star_relu": lambda z: p["act_scale"] * F.relu(z) ** 2 + p["act_bias"],
    }[activation](hidden)
    branch = F.conv2d(hidden, p["weight2"], p.get("bias2"))
    if mask is not None:
        branch = branch * mask.double()[:, None, None, None]
    if "layer_scale" in p:
        branch = branch * p["layer_scale"][:, None, None]
    y = branch + (x * p["res_scale"][:, None, None] if "res_scale" in p else x)
    y.backward(grad.double())
    return y, x.grad, {name: parameter.grad for name, parameter in p.items()}


def check(
    shape,
    names,
    activation,
    relative_error,
    tolerance,
    *,
    device,
    dtype=torch.float32,
    parameter_dtype=None,
    autocast=None,
    inner=None,
    mask=True,
    eps=1e-5,
    memory_format=torch.channels_last,
):
    parameter_dtype = parameter_dtype or dtype
    inner = inner or 2 * shape[1] + 3
    x, parameters, mask, grad = make(shape, inner, dtype, parameter_dtype, device, names, activation, mask)
    y_exact, dx_exact, exact_grads = exact(x, parameters, mask, grad, activation, eps)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    parameters = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
    rest = {name: parameter for name, parameter in parameters.items() if name not in ("weight1", "weight2")}
    context = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with context:
        y, statistics = backends.channel_mlp(
            x,
            parameters["weight1"],
            parameters["weight2"],
            activation=activation,
            eps=eps,
            mask=mask,
            with_statistics=True,
            backend="triton",
            **rest,
        )
    y.backward(grad)
    bound = tolerance[autocast or dtype]
    assert y.dtype == dtype and x.grad.dtype == dtype
    assert not statistics.requires_grad
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, y_exact) < bound
    assert relative_error(statistics, ops.sample_statistics(y.double())) < 1e-5
    assert relative_error(x.grad, dx_exact) < bound
    for name, parameter in parameters.items():
        assert parameter.grad.dtype == parameter_dtype
        assert relative_error(parameter.grad, exact_grads[name]) < bound, name
    with torch.no_grad(), context:
        alone, none = backends.channel_mlp(
            x,
            parameters["weight1"],
            parameters["weight2"],
            activation=activation,
            eps=eps,
            mask=mask,
            backend="triton",
            **rest,
        )
    assert none is None
    assert torch.equal(alone, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape, names, activation, eps", [((3, 20, 7, 5), V1, "gelu", 1e-5), ((2, 17, 5, 3), V2, "star_relu", 1e-6)]
)
def test_result_and_gradients(shape, names, activation, eps, dtype, device, poisoned, relative_error, tolerance):
    check(shape, names, activation, relative_error, tolerance, device=device, dtype=dtype, eps=eps)


@pytest.mark.parametrize("activation", ["relu", "silu", "squared_relu", "star_relu"])
@pytest.mark.parametrize("names", [(), ALL])
def test_activations(activation, names, device, poisoned, relative_error, tolerance):
    # In one tile or less, once in the default memory format; a kinked derivative would need float32 anyway.
    format = torch.channels_last if names else torch.contiguous_format
    shape = (2, 5, 2, 3)
    check(shape, names, activation, relative_error, tolerance, device=device, mask=False, memory_format=format)


@pytest.mark.parametrize("shape, inner", [((1, 1, 1, 1), 1), ((2, 33, 1, 1), 16), ((1, 16, 4, 4), 32)])
def test_odd_and_even_sizes(shape, inner, device, poisoned, relative_error, tolerance):
    if shape[1] == 1:  # its norm is zero, and so are gradients that pass through it: nothing to divide by
        x = torch.ones(shape, device=device)
        weight1, weight2 = torch.ones(inner, 1, device=device), torch.ones(1, inner, device=device)
        y, _ = backends.channel_mlp(x, weight1, weight2, activation="gelu", eps=1e-5, backend="triton")
        assert y.item() == 1
        return
    check(shape, ALL, "gelu", relative_error, tolerance, device=device, inner=inner)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [V1, V2])
def test_autocast_keeps_float32_around_the_products(autocast, names, device, poisoned, relative_error, tolerance):
    activation = "gelu" if names is V1 else "silu"
    check((2, 20, 5, 7), names, activation, relative_error, tolerance, device=device, autocast=autocast)


def test_bfloat16_activations_with_float32_parameters(device, poisoned, relative_error, tolerance):
    check(
        (2, 20, 5, 3),
        ALL,
        "gelu",
        relative_error,
        tolerance,
        device=device,
        dtype=torch.bfloat16,
        parameter_dtype=torch.float32,
    )


def test_a_mean_far_from_zero_costs_float32_accuracy_only(device, poisoned, relative_error):
    # r (x F^T) and r mu u are a thousand times their difference, which is what they cost of 24 bits.
    torch.manual_seed(0)
    x = torch.randn(2, 20, 5, 3, device=device) + 1000
    weight1, weight2 = torch.randn(40, 20, device=device) / 4, torch.randn(20, 40, device=device) / 6
    y, _ = backends.channel_mlp(x, weight1, weight2, activation="gelu", eps=1e-5, backend="triton")
    hidden = F.gelu(F.conv2d(F.group_norm(x.double(), 1), weight1.double()[..., None, None]))
    branch = F.conv2d(hidden, weight2.double()[..., None, None])
    assert relative_error(y.double() - x.double(), branch) < 1e-3


def test_a_layer_scale_of_zero_still_learns(device, poisoned, relative_error):
    x = torch.randn(2, 6, 3, 3, device=device)
    weight1, weight2 = torch.randn(12, 6, device=device), torch.randn(6, 12, device=device)
    grads = {}
    for backend, operation in OPERATIONS.items():
        layer_scale = torch.zeros(6, device=device, requires_grad=True)
        y = operation(x, weight1, weight2, activation="gelu", eps=1e-5, layer_scale=layer_scale)
        y.square().sum().backward()
        grads[backend] = layer_scale.grad
    assert relative_error(grads["triton"], grads["reference"]) < 1e-5


def test_frozen_parameters_get_no_gradient(device, poisoned, relative_error):
    # As in fine-tuning of norms alone: the two large products of the weights' gradients are not computed.
    x = torch.randn(2, 6, 3, 3, device=device, requires_grad=True)
    weight1, weight2 = torch.randn(12, 6, device=device), torch.randn(6, 12, device=device)
    bias2 = torch.randn(6, device=device, requires_grad=True)
    grads = {}
    for backend, operation in OPERATIONS.items():
        x.grad = bias2.grad = None
        y = operation(x, weight1, weight2, activation="gelu", eps=1e-5, bias2=bias2)
        y.square().sum().backward()
        grads[backend] = (x.grad, bias2.grad)
    assert weight1.grad is None
    for result, expected in zip(*grads.values(), strict=True):
        assert relative_error(result, expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names, activation, eps", [(V1, "gelu", 1e-5), (V2, "star_relu", 1e-6)])
@pytest.mark.parametrize(
    "shape", [(8, 64, 56, 56), (8, 128, 28, 28), (9, 320, 14, 14), (8, 512, 7, 7), (1, 96, 65, 33)]
)
def test_at_real_sizes(shape, names, activation, eps, dtype, device, poisoned, relative_error, tolerance):
    tolerance[torch.float32] = 1e-5  # of sums over 25 thousand tokens
    check(shape, names, activation, relative_error, tolerance, device=device, dtype=dtype, eps=eps, inner=4 * shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (8, 512, 7, 7)])
def test_autocast_at_real_sizes(shape, device, poisoned, relative_error, tolerance):
    autocast = torch.bfloat16
    check(shape, V1, "gelu", relative_error, tolerance, device=device, autocast=autocast, inner=4 * shape[1])
