"""The MLP branch against float64 autograd of norm, convolutions, activation, scales and shortcut."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from hf_poolformer import fused_operations, ops


V1 = ("norm_weight", "norm_bias", "bias1", "bias2", "layer_scale")
V2 = ("norm_weight", "res_scale")
ALL = (*V1, "res_scale")
OPERATIONS = {
    "triton": lambda *args, **settings: fused_operations.channel_mlp(*args, **settings, backend="triton")[0],
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


def exact(x, parameters, mask, grad, activation, eps, norm):
    """
    y and the gradients of x and the parameters, in float64, by the plain formula; then the norms of the gradients.

    A learned scalar's gradient is one sum over everything, of which nearly all may cancel. What is rounded are its
    terms, so it counts as no smaller than the root of the sum of their squares: what it comes to if signs are random.
    """
    x = x.double().requires_grad_()
    p = {name: parameter.double().requires_grad_() for name, parameter in parameters.items()}
    affine = (p.get("norm_weight"), p.get("norm_bias"), eps)
    if norm == "group":
        normed = F.group_norm(x, 1, *affine)
    else:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *affine).permute(0, 3, 1, 2)
    z = F.conv2d(normed, p["weight1"], p.get("bias1"))
    hidden = {
        "gelu": F.gelu,
        "silu": F.silu,
        "relu": F.relu,
        "squared_relu": lambda z: F.relu(z) ** 2,
        "star_relu": lambda z: p["act_scale"] * F.relu(z) ** 2 + p["act_bias"],
    }[activation](z)
    hidden.retain_grad()
    branch = F.conv2d(hidden, p["weight2"], p.get("bias2"))
    if mask is not None:
        branch = branch * mask.double()[:, None, None, None]
    if "layer_scale" in p:
        branch = branch * p["layer_scale"][:, None, None]
    y = branch + (x * p["res_scale"][:, None, None] if "res_scale" in p else x)
    y.backward(grad.double())
    grads = {name: parameter.grad for name, parameter in p.items()}
    sizes = {name: each.norm().item() for name, each in grads.items()}
    if activation == "star_relu":
        for name, terms in (("act_scale", hidden.grad * F.relu(z) ** 2), ("act_bias", hidden.grad)):
            sizes[name] = max(sizes[name], terms.norm().item())
    return y, x.grad, grads, sizes


def token_statistics(x):
    variance, mean = torch.var_mean(x.permute(0, 2, 3, 1).flatten(0, 2), dim=1, correction=0)
    return torch.stack((mean, variance), dim=1)


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
    norm="group",
):
    parameter_dtype = parameter_dtype or dtype
    inner = inner or 2 * shape[1] + 3
    x, parameters, mask, grad = make(shape, inner, dtype, parameter_dtype, device, names, activation, mask)
    y_exact, dx_exact, exact_grads, sizes = exact(x, parameters, mask, grad, activation, eps, norm)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    parameters = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
    rest = {name: parameter for name, parameter in parameters.items() if name not in ("weight1", "weight2")}
    context = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with context:
        y, statistics = fused_operations.channel_mlp(
            x,
            parameters["weight1"],
            parameters["weight2"],
            activation=activation,
            eps=eps,
            norm=norm,
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
    wanted = ops.sample_statistics(y.double()) if norm == "group" else token_statistics(y.double())
    assert statistics.shape == wanted.shape
    # Of a token's few channels the mean may nearly cancel.
    assert relative_error(statistics, wanted) < 1e-5
    assert relative_error(x.grad, dx_exact) < bound
    for name, parameter in parameters.items():
        assert parameter.grad.dtype == parameter_dtype
        assert (parameter.grad - exact_grads[name]).norm() < bound * sizes[name], name
    with torch.no_grad(), context:
        alone, none = fused_operations.channel_mlp(
            x,
            parameters["weight1"],
            parameters["weight2"],
            activation=activation,
            eps=eps,
            norm=norm,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm, names, activation", [("group", ALL, "gelu"), ("channel", V2, "squared_relu")])
def test_more_channels_than_one_kernel_takes(
    norm, names, activation, dtype, device, poisoned, relative_error, tolerance
):
    settings = {"device": device, "dtype": dtype, "inner": 24, "norm": norm}
    check((2, 137, 3, 3), names, activation, relative_error, tolerance, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names, activation", [(V2, "star_relu"), (ALL, "gelu")])
def test_layer_norm_over_channels(names, activation, dtype, device, poisoned, relative_error, tolerance):
    check((2, 20, 5, 3), names, activation, relative_error, tolerance, device=device, dtype=dtype, norm="channel")


@pytest.mark.parametrize("dim", [20, 137])
def test_layer_norm_over_channels_under_autocast(dim, device, poisoned, relative_error, tolerance):
    settings = {"device": device, "autocast": torch.bfloat16, "inner": 24, "norm": "channel"}
    check((2, dim, 3, 2), V2, "star_relu", relative_error, tolerance, **settings)


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
        y, _ = fused_operations.channel_mlp(x, weight1, weight2, activation="gelu", eps=1e-5, backend="triton")
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
    y, _ = fused_operations.channel_mlp(x, weight1, weight2, activation="gelu", eps=1e-5, backend="triton")
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


@pytest.mark.parametrize(
    "trained", [("bias1", "bias2"), ("norm_bias",), ("layer_scale",), ("act_bias",), ("weight2",)]
)
def test_each_parameter_learns_without_the_others(trained, device, poisoned):
    activation = "star_relu" if trained == ("act_bias",) else "gelu"
    x, parameters, mask, grad = make((2, 6, 3, 3), 12, torch.float32, torch.float32, device, V1, activation, True)
    _, _, expected, sizes = exact(x, parameters, mask, grad, activation, 1e-5, "group")
    for name in trained:
        parameters[name].requires_grad_()
    y, _ = fused_operations.channel_mlp(x, **parameters, activation=activation, eps=1e-5, mask=mask, backend="triton")
    y.backward(grad)
    for name, parameter in parameters.items():
        assert (parameter.grad is not None) == (name in trained)
        if name in trained:
            assert (parameter.grad - expected[name]).norm() < 2e-6 * sizes[name], name


def test_gelu_of_half_precision():
    # Over all numbers that bfloat16 and float16 have. GELU is z times this, so it is off by 3e-4 |z| at most: a
    # seventh of what bfloat16 rounds z by.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    z = torch.cat([numbers.view(dtype).double() for dtype in (torch.bfloat16, torch.float16)]).numpy()
    z = np.unique(z[np.isfinite(z) & (np.abs(z) < 1e4)])
    exact = 0.5 * np.array([math.erfc(-value / math.sqrt(2)) for value in z])
    near = np.clip(z, -4.5, 4.5)
    odd = 0.797703686 * near + 0.0368205252 * near**3 - 0.000320909514 * near**5
    polynomial = 0.5 + 0.5 * np.tanh(odd)
    assert np.abs(polynomial - exact).max() < 5e-5
    for error in (-(2.0**-11), 2.0**-11):  # of the instruction, relative
        distribution = 0.5 + 0.5 * np.clip(np.tanh(odd) * (1 + error), -1, 1)
        assert np.abs(distribution - exact).max() < 3e-4


VIEWS = {"alias", "as_strided", "detach", "expand", "flatten", "narrow", "permute", "reshape", "select", "slice", "t"}
VIEWS |= {"transpose", "unsqueeze", "view", "_unsafe_view"}
CHECKS = {"contiguous", "is_pinned", "lift_fresh", "resolve_conj", "resolve_neg", "set_", "to"}
FREE = VIEWS | CHECKS | {"empty", "empty_like", "empty_strided", "new_empty"}


class Launches:
    """Counts what a GPU would be asked to do: kernels of Triton, and operations of PyTorch that compute or copy."""

    def __init__(self, monkeypatch):
        self.kernels = []
        executor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
        original = executor.__call__

        def call(executor, *args, **kwargs):
            # What the interpreter itself asks of PyTorch does not count.
            self.kernels.append(executor.fn.__name__)
            with torch.profiler.record_function("interpreter"):
                return original(executor, *args, **kwargs)

        monkeypatch.setattr(executor, "__call__", call)

    def of(self, run):
        self.kernels.clear()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            run()
        return self.kernels + [event.name for event in recorded.events() if self._counts(event)]

    def _counts(self, event):
        if not event.name.startswith("aten::") or event.name.removeprefix("aten::") in FREE:
            return False
        parent = event.cpu_parent
        while parent is not None:
            if parent.name == "interpreter" or self._counts(parent):
                return False
            parent = parent.cpu_parent
        return True


@pytest.mark.parametrize("names, activation, bound", [(V1, "gelu", 9), (V2, "star_relu", 15)])
@pytest.mark.parametrize("dim", [20, 137])
def test_backward_takes_a_handful_of_launches(names, activation, bound, dim, device, monkeypatch):
    if device != "cpu":
        pytest.skip("counted in the interpreter")
    launches = Launches(monkeypatch)
    settings = (torch.float32, torch.float32, device, names, activation, True)
    x, parameters, mask, grad = make((2, dim, 2, 2), 24, *settings)
    grad = grad.contiguous(memory_format=torch.channels_last)
    tensors = [x.requires_grad_(), *(parameter.requires_grad_() for parameter in parameters.values())]
    y, _ = fused_operations.channel_mlp(x, **parameters, activation=activation, eps=1e-5, mask=mask, backend="triton")
    found = launches.of(lambda: torch.autograd.grad(y, tensors, grad))
    assert "expand_backward_kernel" in found
    assert len(found) <= bound, found


# Most of their time is the compiler's: every stage's shape, every kernel in every dtype, but not each with each.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape, dtype, names, norm",
    [
        ((8, 64, 56, 56), torch.bfloat16, V1, "group"),
        ((8, 64, 56, 56), torch.float16, V2, "channel"),
        ((8, 128, 28, 28), torch.float32, V1, "group"),
        ((8, 128, 28, 28), torch.bfloat16, V2, "channel"),
        ((9, 320, 14, 14), torch.bfloat16, V1, "group"),
        ((9, 320, 14, 14), torch.float16, V2, "group"),
        ((8, 512, 7, 7), torch.bfloat16, V2, "channel"),
        ((8, 512, 7, 7), torch.float32, V2, "channel"),
        ((8, 512, 7, 7), torch.float16, V1, "group"),
        ((1, 96, 65, 33), torch.float32, V2, "group"),
        ((1, 96, 65, 33), torch.bfloat16, V1, "channel"),
    ],
)
def test_at_real_sizes(shape, dtype, names, norm, device, poisoned, relative_error, tolerance):
    tolerance[torch.float32] = 1e-5  # of sums over 25 thousand tokens
    activation, eps = ("gelu", 1e-5) if names is V1 else ("star_relu", 1e-6)
    settings = {"device": device, "dtype": dtype, "eps": eps, "inner": 4 * shape[1], "norm": norm}
    check(shape, names, activation, relative_error, tolerance, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (8, 512, 7, 7)])
def test_autocast_at_real_sizes(shape, device, poisoned, relative_error, tolerance):
    autocast = torch.bfloat16
    check(shape, V1, "gelu", relative_error, tolerance, device=device, autocast=autocast, inner=4 * shape[1])
