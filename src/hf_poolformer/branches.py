"""The branches of a block: which operation computes one, and with what arguments.

Without gradients the CPU computes branches of the second paper's families, too, by plain functions
(`fused_operations.infer_branches`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .backends import (
    DTYPES,
    Decision,
    computes_channel_norm,
    computes_token_norm,
    infers,
    is_autocast,
    is_transformed,
    product_dtype,
    takes,
    triton_kernels,
    unfit,
)
from .fused_operations import LARGEST_WINDOW, Branch, contiguous
from .plain_modules import (
    CLASSES,
    FUSIBLE,
    activation_name,
    fit,
    formula,
    is_depthwise,
    is_plain,
    is_pointwise,
    norm_kind,
)


def find_operations(block: nn.Module, x: torch.Tensor, decision: Decision) -> tuple[dict[str, Any] | None, ...]:
    """Arguments of `pool_mixer` or `separable_conv`, and of `channel_mlp`; None for what modules are to compute."""
    mixer = mixer_arguments(block, x, decision)
    separable = separable_arguments(block, x, decision) if mixer is None else None
    return mixer, separable, mlp_arguments(block, x, decision)


def find_branches(stage: nn.ModuleList, x: torch.Tensor, decision: Decision) -> list[Branch] | None:
    """All branches of the blocks of a stage; None if plain PyTorch is to compute one of them."""
    branches: list[Branch | None] = []
    for block in stage:
        if formula(block) != "block":
            return None
        branches.append(find_branch(block, x, decision, MIXERS))
        if block.use_mlp:
            branches.append(find_branch(block, x, decision, MLPS))
        if None in branches:
            return None
    return branches


def find_branch(
    block: nn.Module, x: torch.Tensor, decision: Decision, operations: dict[str, Callable[..., dict[str, Any] | None]]
) -> Branch | None:
    for name, find_arguments in operations.items():
        arguments = find_arguments(block, x, decision)
        if arguments is not None:
            # Which samples are dropped only modules draw.
            return None if block.drop_path.drops else (name, arguments)
    return None


def mixer_arguments(block: nn.Module, x: torch.Tensor, decision: Decision) -> dict[str, Any] | None:
    """Of `pool_mixer`, for the first branch of a block; None where that would compute another function, or cannot."""
    norm = block.before_norm
    pool_size = getattr(block.token_mixer, "fused_pool_size", None)
    scales = {"layer_scale": block.layer_scale_1, "res_scale": block.res_scale_1}
    if pool_size is None or _norm_of_plain_branch(block, "mix_tokens", norm, x, *scales.values()) != "group":
        return None
    if not takes(decision, x, norm.weight, norm.bias, *scales.values()):
        return None
    return {"pool_size": pool_size, "eps": norm.eps, "weight": norm.weight, **scales}


def mlp_arguments(block: nn.Module, x: torch.Tensor, decision: Decision) -> dict[str, Any] | None:
    """The same of `channel_mlp` and the second branch."""
    if not block.use_mlp or formula(block.output) != "channel_mlp":
        return None
    norm, conv1, act, conv2 = block.after_norm, block.output.conv1, block.output.act_fn, block.output.conv2
    activation = activation_name(act)
    if activation is None or not (is_pointwise(conv1) and is_pointwise(conv2)):
        return None
    scales = {"layer_scale": block.layer_scale_2, "res_scale": block.res_scale_2}
    learned = (act.scale, act.bias) if activation == "star_relu" else (None, None)
    channels, hidden = x.shape[1], conv1.weight.shape[0]
    shapes = [
        (conv1.weight, (hidden, channels, 1, 1)),
        (conv1.bias, (hidden,)),
        (conv2.weight, (channels, hidden, 1, 1)),
        (conv2.bias, (channels,)),
        *((tensor, (1,)) for tensor in learned),
    ]
    kind = _norm_of_plain_branch(block, "mix_channels", norm, x, *scales.values())
    if not (fit(x, shapes) and (kind == "group" or (kind == "channel" and computes_channel_norm(decision)))):
        return None
    tensors = {
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "weight1": conv1.weight,
        "bias1": conv1.bias,
        "weight2": conv2.weight,
        "bias2": conv2.bias,
        "act_scale": learned[0],
        "act_bias": learned[1],
        **scales,
    }
    if not takes(decision, x, *tensors.values()):
        return None
    return {"norm": kind, "activation": activation, "eps": norm.eps, **tensors}


def separable_arguments(block: nn.Module, x: torch.Tensor, decision: Decision) -> dict[str, Any] | None:
    """The same of `separable_conv`, for the first branch."""
    mixer, norm = block.token_mixer, block.before_norm
    if formula(mixer) != "separable_conv" or not computes_channel_norm(decision):
        return None
    conv1, act, depthwise, conv2 = mixer.pwconv1, mixer.act, mixer.dwconv, mixer.pwconv2
    if not (is_pointwise(conv1) and formula(act) == "star_relu" and is_depthwise(depthwise) and is_pointwise(conv2)):
        return None
    scales = {"layer_scale": block.layer_scale_1, "res_scale": block.res_scale_1}
    if _norm_of_plain_branch(block, "mix_tokens", norm, x, *scales.values()) != "channel":
        return None
    channels, hidden = x.shape[1], conv1.weight.shape[0]
    shapes = [
        (conv1.weight, (hidden, channels, 1, 1)),
        (act.scale, (1,)),
        (act.bias, (1,)),
        (depthwise.weight, (hidden, 1, *depthwise.kernel_size)),
        (conv2.weight, (channels, hidden, 1, 1)),
    ]
    if not fit(x, shapes) or any(part.bias is not None for part in (norm, conv1, depthwise, conv2)):
        return None
    if decision.backend == "triton" and depthwise.kernel_size[0] > LARGEST_WINDOW:
        return None
    tensors = {
        "norm_weight": norm.weight,
        "weight1": conv1.weight,
        "act_scale": act.scale,
        "act_bias": act.bias,
        "depthwise_weight": depthwise.weight,
        "weight2": conv2.weight,
        **scales,
    }
    return {"eps": norm.eps, **tensors} if takes(decision, x, *tensors.values()) else None


def attention_arguments(block: nn.Module, x: torch.Tensor, decision: Decision) -> dict[str, Any] | None:
    """The same of attention, for the first branch, of inference; on a GPU with a norm over channels."""
    mixer, norm = block.token_mixer, block.before_norm
    if formula(mixer) != "attention" or not mixer.is_sdpa or is_transformed():
        return None
    if not (infers(decision) or decision.backend == "triton"):
        return None
    qkv, proj = mixer.qkv, mixer.proj
    if not (is_plain(qkv, nn.Linear) and is_plain(proj, nn.Linear)):
        return None
    scales = {"layer_scale": block.layer_scale_1, "res_scale": block.res_scale_1}
    channels, inner = x.shape[1], mixer.num_heads * mixer.head_dim
    shapes = [
        (qkv.weight, (3 * inner, channels)),
        (qkv.bias, (3 * inner,)),
        (proj.weight, (channels, inner)),
        (proj.bias, (channels,)),
    ]
    kind = _norm_of_plain_branch(block, "mix_tokens", norm, x, *scales.values())
    if kind is None or (kind == "group" and decision.backend == "triton") or not fit(x, shapes):
        return None
    tensors = {
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "qkv_weight": qkv.weight,
        "qkv_bias": qkv.bias,
        "weight": proj.weight,
        "bias": proj.bias,
        **scales,
    }
    if not takes(decision, x, *tensors.values()):
        return None
    return {"norm": kind, "heads": mixer.num_heads, "eps": norm.eps, **tensors}


def mixing_arguments(block: nn.Module, x: torch.Tensor, decision: Decision) -> dict[str, Any] | None:
    """The same of a mixer that is a product over the tokens, or nothing at all, of inference on the CPU."""
    norm, computed = block.before_norm, formula(block.token_mixer)
    if computed not in ("identity", "random") or not infers(decision):
        return None
    matrix = block.token_mixer.random_matrix if computed == "random" else None
    scales = {"layer_scale": block.layer_scale_1, "res_scale": block.res_scale_1}
    kind = _norm_of_plain_branch(block, "mix_tokens", norm, x, *scales.values())
    if kind is None or not fit(x, [(matrix, (x[0, 0].numel(),) * 2)]):
        return None
    if matrix is not None and block.token_mixer.resolution != tuple(x.shape[2:]):
        return None
    tensors = {"norm_weight": norm.weight, "norm_bias": norm.bias, "matrix": matrix, **scales}
    return {"norm": kind, "eps": norm.eps, **tensors} if takes(decision, x, *tensors.values()) else None


# Operation of inference -> what finds its arguments.
MIXERS = {
    "pool_mixer": mixer_arguments,
    "separable_conv": separable_arguments,
    "attention": attention_arguments,
    "mixing": mixing_arguments,
}
MLPS = {"channel_mlp": mlp_arguments}


def module_branch(
    block: nn.Module, x: torch.Tensor, decision: Decision
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """
    The first branch of a block, by the module of its mixer, between kernels for its LayerNorm and for what adds it to
    the shortcut.

    Returns:
        The result, like x (B, C, H, W), and the statistics of its tokens (B H W, 2), or None where nobody wants them.
        None alone where another norm or plain PyTorch is to compute.
    """
    norm, mixer, scales = block.before_norm, block.token_mixer, (block.layer_scale_1, block.res_scale_1)
    if (
        not computes_token_norm(decision)
        or _norm_of_plain_branch(block, "mix_tokens", norm, x, *scales) != "channel"
        or not takes(decision, x, norm.weight, norm.bias, *scales)
    ):
        return None
    kernels = triton_kernels().token_norm
    dtype = torch.float32 if is_autocast(x) else x.dtype
    multiplied = formula(mixer) == "attention" and is_plain(mixer.qkv, nn.Linear)
    weight, bias, layer_scale, res_scale = contiguous(norm.weight, norm.bias, *scales)
    normed, shortcut = kernels.norm_and_shortcut(
        x.contiguous(memory_format=torch.channels_last),
        weight,
        bias,
        res_scale,
        norm.eps,
        product_dtype(x) if multiplied else dtype,
    )
    branch = mixer(normed)
    if unfit(branch, ()) or branch.shape != x.shape or branch.device != x.device or branch.dtype not in DTYPES:
        return block.merge(x, branch, *scales), None
    branch = branch.contiguous(memory_format=torch.channels_last)
    mask = block.drop_path.mask(branch)
    return kernels.merge(shortcut, branch, layer_scale, res_scale, mask, dtype, block.use_mlp)


def _norm_of_plain_branch(
    block: nn.Module, method: str, norm: nn.Module, x: torch.Tensor, *scales: torch.Tensor | None
) -> str | None:
    """The kind of a branch's norm, if this and what adds the branch to its shortcut are what the fused operations
    stand for."""
    kind = norm_kind(norm, x.shape[1])
    is_plain_branch = (
        kind is not None
        and block.use_residual is True
        and _is_own(block, method)
        and _is_own(block, "merge")
        and formula(block.drop_path) == "drop_path"
        and fit(x, ((vector, x.shape[1:2]) for vector in (norm.weight, norm.bias, *scales)))
    )
    return kind if is_plain_branch else None


def _is_own(block: nn.Module, method: str) -> bool:
    """Whether a method is what the block's class was defined with, not a subclass's, an instance's or a later one."""
    return method not in vars(block) and getattr(type(block), method) is FUSIBLE[CLASSES["block"]][method]
