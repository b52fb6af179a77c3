"""Activations of kernels, their derivatives, and what is made of the sums for learned ones.

GELU. float32 takes the exact distribution of the normal, by erf. Half precision takes 1/2 + tanh(f(z)) / 2, where f is
the odd polynomial nearest to atanh(erf(z / sqrt 2)) for |z| <= 4.5: off by 4e-5, and one instruction on NVIDIA's GPUs
(off by 2^-11), where erf costs more than the product around it.
"""

import functools

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED
from .parts import scalar, store_if_wanted


@triton.jit
def positive(z):
    """relu(z); as torch's, it keeps NaN."""
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def normal_distribution(z, GELU: tl.constexpr):
    if GELU == "gelu":
        p = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        near = tl.minimum(tl.maximum(z, -4.5), 4.5)
        square = near * near
        odd = near * (0.797703686 + square * (0.0368205252 + square * -0.000320909514))
        if GELU == "gelu_tanh":
            p = 0.5 + 0.5 * tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [odd], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            p = tl.sigmoid(2.0 * odd)
    return p


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z) before its scale and shift, and its derivative, which costs nothing where nobody takes it."""
    if ACT == "silu":
        gate = tl.sigmoid(z)
        h = z * gate
        d = gate * (1.0 + z * (1.0 - gate))
    elif ACT == "relu":
        h = positive(z)
        d = tl.where(z > 0.0, 1.0, 0.0)
    elif ACT == "squared_relu" or ACT == "star_relu":
        h = positive(z) * positive(z)
        d = 2.0 * positive(z)
    else:
        p = normal_distribution(z, ACT)
        h = z * p
        d = p + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    return h, d


@triton.jit
def affine(h, act_scale, act_bias):
    """Learned scale and shift of an activation."""
    if act_scale is not None:
        h *= scalar(act_scale, 1.0)
    if act_bias is not None:
        h += scalar(act_bias, 0.0)
    return h


@triton.jit
def store_activation_gradients(parts, count, dact_scale, dact_bias, BLOCK: tl.constexpr):
    """Sums of parts (count, 2), where there is room for them; of no parts nothing."""
    lanes = tl.arange(0, BLOCK)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + lanes < count
        scale_sum += tl.load(parts + 2 * (start + lanes), mask=inside, other=0.0)
        bias_sum += tl.load(parts + 2 * (start + lanes) + 1, mask=inside, other=0.0)
    store_if_wanted(dact_scale, 0, tl.sum(scale_sum, 0), count > 0)
    store_if_wanted(dact_bias, 0, tl.sum(bias_sum, 0), count > 0)


def activation_of(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """The kernels' name of an activation: GELU as the precision and the device have it."""
    if name != "gelu" or dtype == torch.float32:
        return name
    return "gelu_tanh" if has_tanh(device) else "gelu_sigmoid"


@functools.cache
def has_tanh(device: torch.device) -> bool:
    """Whether there is an instruction for it: from compute capability 7.5 on."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (7, 5)
