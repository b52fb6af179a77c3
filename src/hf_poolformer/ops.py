"""The fused operations of the MetaFormer block: their definition in plain PyTorch, and who computes them.

    pool_mixer   res_scale * x + layer_scale * mask * (pool(n(x)) - n(x))
    channel_mlp  res_scale * x + layer_scale * mask * (W2 act(W1 n(x) + b1) + b2)

n is GroupNorm with one group, whose mean and variance are the `statistics` of each sample. The functions ending in
`_reference` are the definition. Kernels compute the same function with fewer passes over memory. Who computes is said
by the argument `backend`, else by the environment variable HF_POOLFORMER_KERNELS, else by the configuration's
`kernels`, else it is auto:

    auto       kernels where they can run and have been measured to be faster: today "cpu", without gradients
    cpu        oneDNN on the CPU, or RuntimeError with the reason why not
    triton     Triton on a GPU, or RuntimeError with the reason why not; with TRITON_INTERPRET=1 on the CPU, slowly
    reference  plain PyTorch

`why_not_cpu` and `why_not_triton` tell the reason for one input. Kernels have no double backward, forward-mode
derivative or vmap rule, and an export would need this package to run: under torch.func, forward-mode differentiation
and export, auto takes the reference. So it does, and so do the modules of a model whatever is asked for, where a mode
looks at every operation (FlopCounterMode, FakeTensorMode). A compiled function keeps the choice that held when it was
compiled. No weight is kept in another form from one call to the next: it may change in between in ways that nothing
tells (fused optimisers, `.data`, merged adapters).

Autocast: products run in autocast's dtype; statistics, sums and all that scales a channel are float32, and so is the
result, as it is when PyTorch's own operations compute the branch under autocast.
"""

import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .backends import is_plain


BACKENDS = ("auto", "cpu", "triton", "reference")
VARIABLE = "HF_POOLFORMER_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the registered operations; kernels of another number have other arguments.
INTERFACE = 1


def sample_statistics(x: torch.Tensor) -> torch.Tensor:
    """Mean and biased variance (B, 2) of each sample of x (B, C, H, W), in float32 (float64 for float64)."""
    variance, mean = torch.var_mean(_at_least_float32(x), dim=(1, 2, 3), correction=0)
    return torch.stack((mean, variance), dim=1)


def pool_mixer_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    pool_size: int,
    eps: float,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """`pool_mixer` in plain PyTorch. The norm's mean and bias cancel, since pooling leaves a constant as it is."""
    if statistics is None:
        statistics = sample_statistics(x)
    factor = torch.rsqrt(statistics[:, 1] + eps)  # (B,)
    if mask is not None:
        factor = factor * mask
    factor = factor[:, None]
    for scale in (weight, layer_scale):
        if scale is not None:
            factor = factor * scale
    branch = F.avg_pool2d(x, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False) - x
    return torch.addcmul(_scaled(x, res_scale), branch, _per_channel(factor, x))


def channel_mlp_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    weight1: torch.Tensor,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    act_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    res_scale: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: str,
    eps: float,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """`channel_mlp` in plain PyTorch."""
    if statistics is None:
        statistics = sample_statistics(x)
    mean, variance = statistics[:, :1], statistics[:, 1:]  # (B, 1)
    factor = torch.rsqrt(variance + eps)
    if norm_weight is not None:
        factor = factor * norm_weight
    shift = -mean * factor
    if norm_bias is not None:
        shift = shift + norm_bias
    # In float32 also for half precision, since shift may be much larger than the result.
    normed = torch.addcmul(
        shift.expand(-1, x.shape[1])[..., None, None],
        _at_least_float32(x),
        factor.expand(-1, x.shape[1])[..., None, None],
    ).to(x.dtype)
    hidden = F.conv2d(normed, weight1[..., None, None], bias1)
    hidden = activate(hidden, activation, act_scale, act_bias)
    branch = F.conv2d(hidden, weight2[..., None, None], bias2)
    if layer_scale is None and mask is None:
        return _scaled(x, res_scale) + branch
    factor = branch.new_ones((), dtype=statistics.dtype)
    if mask is not None:
        factor = factor * mask[:, None]
    if layer_scale is not None:
        factor = factor * layer_scale
    return torch.addcmul(_scaled(x, res_scale), branch.to(x.dtype), _per_channel(factor, x))


def activate(
    z: torch.Tensor, activation: str, act_scale: torch.Tensor | None = None, act_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The activations of `ACTIVATIONS`; act_scale and act_bias (1,) are star_relu's."""
    result = ACTIVATIONS[activation](z)
    if act_scale is not None:
        result = act_scale * result
    if act_bias is not None:
        result = result + act_bias
    return result


def _squared_relu(z: torch.Tensor) -> torch.Tensor:
    return F.relu(z).square()


ACTIVATIONS = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": _squared_relu,
    "star_relu": _squared_relu,
}


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scaled(x: torch.Tensor, res_scale: torch.Tensor | None) -> torch.Tensor:
    return x if res_scale is None else x * res_scale[:, None, None].to(x.dtype)


def _per_channel(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, C), (B, 1) or (C,) as a factor of x (B, C, H, W), in its dtype."""
    return factor[..., None, None].to(x.dtype)


def pool_mixer(
    x: torch.Tensor,
    *,
    pool_size: int,
    eps: float,
    weight: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    with_statistics: bool = False,
    backend: str | None = None,
    preferred: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `res_scale * x + layer_scale * mask * (pool(n(x)) - n(x))`, n GroupNorm(1) with `weight`, any bias, and `eps`.

    Args:
        x: (B, C, H, W). Kernels work in channels_last memory, to which they bring it.
        pool_size: odd; the average is over the tokens of the window that lie in the image.
        weight, layer_scale, res_scale: (C,), or None for 1.
        mask: (B,), a factor of each sample's branch: 0 or 1 / (1 - rate) for DropPath. It gets no gradient.
        statistics: (B, 2) of x as an operation before this one returned them, which saves a pass. The gradient
            accounts for their dependence on x; they themselves get none.
        with_statistics: also return the statistics of the result, where that costs no pass of its own.
        backend: one of `BACKENDS`; None takes HF_POOLFORMER_KERNELS, or else `preferred`.

    Returns:
        The result, like x, and its statistics (B, 2), or None.
    """
    if pool_size < 1 or pool_size % 2 == 0:
        raise ValueError(f"pool_size must be odd and positive but is {pool_size}")
    x, _ = _autocast(x)
    parameters = (weight, layer_scale, res_scale, mask)
    backend = choose_backend(x, *parameters, backend=backend, preferred=preferred)
    if backend == "reference":
        known = _usable(statistics, x, parameters)
        return pool_mixer_reference(x, weight, layer_scale, res_scale, mask, pool_size, eps, known), None
    x = x.contiguous(memory_format=torch.channels_last)
    if backend == "cpu":
        return torch.ops.hf_poolformer.cpu_pool_mixer(x, *_contiguous(*parameters), pool_size, eps)[0], None
    y, statistics = torch.ops.hf_poolformer.pool_mixer(
        x,
        _known_statistics(x, statistics),
        *_contiguous(weight, layer_scale, res_scale, mask),
        pool_size,
        eps,
        with_statistics,
    )
    return y, statistics if with_statistics else None


def channel_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    *,
    activation: str,
    eps: float,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    act_scale: torch.Tensor | None = None,
    act_bias: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    with_statistics: bool = False,
    backend: str | None = None,
    preferred: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `res_scale * x + layer_scale * mask * (weight2 act(weight1 n(x) + bias1) + bias2)`, n GroupNorm(1).

    Args:
        x: (B, C, H, W). Kernels work in channels_last memory, to which they bring it.
        weight1, weight2: (R, C) and (C, R), or as 1x1 convolutions have them, (R, C, 1, 1) and (C, R, 1, 1).
        activation: one of `ACTIVATIONS`; act_scale and act_bias, (1,), are what star_relu learns.
        norm_weight, norm_bias, bias2, layer_scale, res_scale: (C,), bias1 (R,), or None for 1 or 0.
        mask, statistics, with_statistics, backend, preferred: as in `pool_mixer`.

    Returns:
        The result, like x, and its statistics (B, 2), or None.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}: not one of {', '.join(ACTIVATIONS)}")
    x, dtype = _autocast(x)
    weight1, weight2 = weight1.flatten(1), weight2.flatten(1)
    vectors = (norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias)
    vectors = (*vectors, layer_scale, res_scale, mask)
    backend = choose_backend(x, *vectors, backend=backend, preferred=preferred, product_dtype=dtype)
    if backend == "reference":
        known = _usable(statistics, x, vectors)
        return channel_mlp_reference(x, *vectors, activation, eps, known), None
    x = x.contiguous(memory_format=torch.channels_last)
    if backend == "cpu":
        needs_gradient = _needs_gradient(x, vectors)
        return torch.ops.hf_poolformer.cpu_channel_mlp(
            x, *_contiguous(*vectors), activation, eps, dtype, needs_gradient
        )[0], None
    y, statistics, _, _ = torch.ops.hf_poolformer.channel_mlp(
        x,
        _known_statistics(x, statistics),
        *_contiguous(*vectors),
        activation,
        eps,
        dtype,
        _needs_gradient(x, vectors),
        with_statistics,
    )
    return y, statistics if with_statistics else None


def infer_blocks(
    x: torch.Tensor, blocks: list[tuple[dict, dict]], preferred: str | None = None
) -> torch.Tensor | None:
    """
    Blocks in sequence, each the arguments of `pool_mixer` and of `channel_mlp`, without gradients and on the CPU.

    A few samples at a time go through all blocks, which keeps them in the caches. None where this does not apply:
    gradients are wanted, the graph is compiled or watched, or another backend is to compute.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not blocks or is_watched():
        return None
    x, dtype = _autocast(x)
    tensors = [value for block in blocks for each in block for value in each.values() if torch.is_tensor(value)]
    if choose_backend(x, *tensors, preferred=preferred, product_dtype=dtype) != "cpu":
        return None
    cpu = _cpu_kernels()
    mixers = [
        cpu.Mixer(
            cpu.product(mixer["weight"], mixer["layer_scale"]), mixer["res_scale"], mixer["pool_size"], mixer["eps"]
        )
        for mixer, _ in blocks
    ]
    return cpu.infer(x, mixers, [_prepared_mlp(mlp, dtype) for _, mlp in blocks])


def _prepared_mlp(mlp: dict, dtype: torch.dtype) -> NamedTuple:
    """The arguments of `channel_mlp` as the CPU's kernels take them, products in `dtype`."""
    cpu = _cpu_kernels()
    weight1, weight2 = mlp["weight1"].flatten(1).contiguous(), mlp["weight2"].flatten(1).contiguous()
    weight1, bias1, weight2, bias2 = cpu.cast(dtype, weight1, mlp["bias1"], weight2, mlp["bias2"])
    hidden = cpu.Hidden(mlp["activation"], mlp["act_scale"], mlp["act_bias"])
    norm = mlp["norm_weight"], mlp["norm_bias"]
    scales = mlp["layer_scale"], mlp["res_scale"]
    return cpu.MLP(*norm, weight1, bias1, weight2, bias2, *scales, hidden, mlp["eps"], dtype)


def _autocast(x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """x as autocast's rules have it, and the dtype of products."""
    device = x.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return x, x.dtype
    return x.float(), torch.get_autocast_dtype(device)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _needs_gradient(x: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *parameters))


def _usable(
    statistics: torch.Tensor | None, x: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]
) -> torch.Tensor | None:
    """Known statistics for the reference, which has to compute them itself where it differentiates through them."""
    return None if _needs_gradient(x, parameters) else statistics


def _known_statistics(x: torch.Tensor, statistics: torch.Tensor | None) -> torch.Tensor:
    if statistics is not None:
        return statistics.detach()
    return torch.ops.hf_poolformer.sample_statistics(x.detach())


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def choose_backend(
    x: torch.Tensor,
    *parameters: torch.Tensor | None,
    backend: str | None = None,
    preferred: str | None = None,
    product_dtype: torch.dtype | None = None,
) -> str:
    """
    Who computes an operation on x (B, C, H, W) with these parameters: "cpu", "triton" or "reference".

    `preferred` counts where neither `backend` nor HF_POOLFORMER_KERNELS says anything. `product_dtype` is autocast's.
    """
    backend = _wanted_backend(backend, preferred)
    if backend == "auto":
        # In training the CPU's kernels save a quarter of the memory, but are 5 % slower than plain PyTorch.
        faster = not torch.is_grad_enabled() and _suits_cpu(x, *parameters, product_dtype=product_dtype)
        return "cpu" if faster else "reference"
    if backend == "reference":
        return backend
    reason = why_not_triton(x, *parameters)
    if backend == "cpu":
        reason = why_not_cpu(x, *parameters, product_dtype=product_dtype)
    if reason is not None:
        raise RuntimeError(f"The kernels cannot run: {reason}. {VARIABLE}=auto uses them only where they can.")
    return backend


def lay_out(x: torch.Tensor, preferred: str | None = None) -> torch.Tensor:
    """
    x (B, C, H, W), the input of a model, in the memory format that is the fastest for all operations to come.

    That is channels_last for kernels, and for plain PyTorch on the CPU, training included, unless the backend is
    "reference": that one leaves x as it is, and computes what the model built into transformers does to the bit.
    """
    if _wanted_backend(None, preferred) == "auto":
        if not _suits_cpu(x):
            return x
        if not torch.compiler.is_compiling():
            _cpu_kernels().settle_allocator()
    elif choose_backend(x, preferred=preferred) == "reference":
        return x
    # Here it costs least: three channels, and convolutions keep to it.
    return x.contiguous(memory_format=torch.channels_last)


def _wanted_backend(backend: str | None, preferred: str | None) -> str:
    backend = backend or _default_backend() or preferred or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"{VARIABLE} (or kernels, backend) must be one of {', '.join(BACKENDS)} but is {backend!r}")
    return backend


def _suits_cpu(x: torch.Tensor, *parameters: torch.Tensor | None, product_dtype: torch.dtype | None = None) -> bool:
    usable = x.device.type == "cpu" and not _is_transformed() and not is_watched()
    return usable and why_not_cpu(x, *parameters, product_dtype=product_dtype) is None


@torch.compiler.assume_constant_result
def _default_backend() -> str | None:
    return os.environ.get(VARIABLE) or None


def _is_transformed() -> bool:
    """Whether something is going on that kernels have no rule for: an export, torch.func, forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    if torch.jit.is_tracing() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_watched() -> bool:
    """Whether a mode looks at every operation: a counter, a tracer, fake tensors. It is to see PyTorch's own."""
    if torch.compiler.is_compiling():
        return False
    # `torch.set_default_device` and `with torch.device(...)` are modes, too, which look at factory functions only.
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    watching = any(type(mode) is not torch.utils._device.DeviceContext for mode in modes)
    return watching or torch._C._len_torch_dispatch_stack() > 0


def takes_contiguous(x: torch.Tensor, conv: nn.Module) -> bool:
    """
    Whether a convolution of x (B, C, H, W), channels_last, on the CPU is faster if x is brought to the default format.

    PyTorch reorders a contiguous weight in every call for a channels_last input, which for one image takes longer than
    the convolution where the weight is the larger of the two.
    """
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _is_transformed()
        and not is_watched()
        and isinstance(conv, nn.Conv2d)
        and is_plain(conv)
        and not x.is_contiguous()
        and conv.weight.is_contiguous()
        and conv.weight.numel() > x.numel()
    )


def why_not_cpu(
    x: torch.Tensor, *parameters: torch.Tensor | None, product_dtype: torch.dtype | None = None
) -> str | None:
    """Why the CPU's kernels cannot compute an operation on x (B, C, H, W), or None if they can."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    for dtype in {x.dtype, product_dtype or x.dtype}:
        if not _has_onednn(dtype):
            return f"oneDNN has no fast products of {dtype} on this CPU, or is missing"
    return _unfit(x, parameters)


@torch.compiler.assume_constant_result
def _has_onednn(dtype: torch.dtype) -> bool:
    cpu = _cpu_kernels()
    return cpu is not None and cpu.has_onednn(dtype)


def _cpu_kernels() -> ModuleType | None:
    """The CPU's kernels, if this file finds those that it was written for."""
    try:
        import hf_poolformer.kernels.cpu
    except ImportError:  # this file is a copy that travelled with a checkpoint, to a machine without the package
        return None
    return hf_poolformer.kernels.cpu if hf_poolformer.kernels.INTERFACE == INTERFACE else None


def why_not_triton(x: torch.Tensor, *parameters: torch.Tensor | None) -> str | None:
    """Why the kernels cannot compute an operation on x (B, C, H, W) with these parameters, or None if they can."""
    reason = _why_no_kernels(x.device.type, x.device.index)
    if reason is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not one of float32, bfloat16, float16"
    if x.dtype == torch.bfloat16 and x.is_cuda and not _has_bfloat16(x.device.index):
        return "this GPU has no bfloat16"
    return _unfit(x, parameters)


def _unfit(x: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]) -> str | None:
    """What no kernel can take."""
    if type(x) not in (torch.Tensor, nn.Parameter) and not torch.compiler.is_compiling():
        return f"x is a {type(x).__name__}, which may compute in another way"
    if x.ndim != 4:
        return f"x has shape {tuple(x.shape)}, not (batch, channels, height, width)"
    if x.numel() == 0:
        return f"x is empty, {tuple(x.shape)}"
    for parameter in parameters:
        if parameter is None:
            continue
        if type(parameter) not in (torch.Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            return f"a parameter is a {type(parameter).__name__}, which may compute in another way"
        if parameter.device != x.device:
            return f"x is on {x.device} but a parameter on {parameter.device}"
        if parameter.dtype not in DTYPES:
            return f"a parameter is {parameter.dtype}, not one of float32, bfloat16, float16"
    return None


@torch.compiler.assume_constant_result
def _why_no_kernels(device: str, index: int | None) -> str | None:
    """Why there are no kernels for a device, or None."""
    if device not in ("cuda", "cpu"):
        return f"x is on {device}, and there are kernels for CUDA GPUs only"
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    if kernels.INTERFACE != INTERFACE:
        return f"the installed hf_poolformer has kernels of interface {kernels.INTERFACE}, this code needs {INTERFACE}"
    if device == "cpu" and not kernels.launch.INTERPRETED:
        return "x is on the CPU, where kernels run only if TRITON_INTERPRET=1 was set before Triton was imported"
    if device == "cuda" and torch.cuda.get_device_capability(index) < (7, 0) and torch.version.hip is None:
        return "this GPU is older than what Triton supports (compute capability 7.0)"
    return None


@torch.compiler.assume_constant_result
def _has_bfloat16(index: int | None) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


def _kernels() -> ModuleType | str:
    """The package of Triton kernels, whose import registers them, or why it cannot be imported."""
    # Here rather than at the top: half of its time is Triton's, which the CPU does not need. Absolute, because this
    # file may travel to the Hub, where every relative import is taken for a file to copy.
    try:
        import hf_poolformer.kernels.channel_mlp
        import hf_poolformer.kernels.pool_mixer
        import hf_poolformer.kernels.statistics
    except ImportError as error:
        return f"{error.name or 'a module'} is not installed ({error})"
    return hf_poolformer.kernels


__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "channel_mlp",
    "choose_backend",
    "infer_blocks",
    "is_watched",
    "lay_out",
    "pool_mixer",
    "sample_statistics",
    "takes_contiguous",
    "why_not_cpu",
    "why_not_triton",
]
