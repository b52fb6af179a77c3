"""What a model's modules must be for a fused operation to compute them: exactly what the operation was written for.

A fused operation passes modules by. So it is taken only where that cannot be noticed: each module it stands for is of
a class in `FUSIBLE` (no subclass, which is also how parametrizations, adapters and quantisation show), its forward is
the one that class was defined with, no hook waits for it, and its attributes are those of the formula. Whoever is
anything else runs as it is, in plain PyTorch.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules import module as hooks
from transformers import activations


# Class -> its forward, and the names of methods that it may call, none of which an instance may have replaced.
FUSIBLE: dict[type[nn.Module], tuple[Callable, frozenset[str]]] = {}


# What `nn.Module.__call__` goes through.
CALLING = {"_wrapped_call_impl", "_compiled_call_impl", "_call_impl", "_slow_forward"}


def fusible(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: modules of this very class may be computed by a fused operation."""
    own = [name for parent in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(parent)]
    methods = {name for name in own if not name.startswith("__") and callable(getattr(kind, name))}
    FUSIBLE[kind] = kind.forward, frozenset(methods | CALLING)
    return kind


for _kind in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.AvgPool2d, nn.GELU, nn.ReLU, nn.SiLU):
    fusible(_kind)
# transformers' own, which `hidden_act` makes.
for _kind in (activations.GELUActivation, activations.SiLUActivation, activations.ReLUSquaredActivation):
    fusible(_kind)


ACTIVATION_NAMES = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.ReLUSquaredActivation: "squared_relu",
}


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs its forward and nothing else: no hooks of its own, nor hooks of all modules."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """
    Whether `module` is of one of these very classes (of any in `FUSIBLE`, if none is given), and nobody has changed
    what calling it does.
    """
    kind = type(module)
    if kind not in FUSIBLE or (kinds and kind not in kinds):
        return False
    forward, methods = FUSIBLE[kind]
    own = vars(module)
    # A loop, which torch.compile can follow and so guard.
    for name in methods:
        if name in own:
            return False
    return kind.forward is forward and is_unhooked(module)


def is_valid_average(pool: nn.Module) -> bool:
    """Whether a pool averages, with stride 1, over those tokens of an odd window that lie in the image."""
    return (
        is_plain(pool, nn.AvgPool2d)
        and type(pool.kernel_size) is int
        and pool.kernel_size % 2 == 1
        and pool.stride == 1
        and pool.padding == pool.kernel_size // 2
        and pool.count_include_pad is False
        and pool.ceil_mode is False
        and pool.divisor_override is None
    )


def is_pointwise(conv: nn.Module) -> bool:
    """Whether a convolution is a matrix product over channels; of its weight, the shape remains to be looked at."""
    return is_plain(conv, nn.Conv2d) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def activation_name(act: nn.Module) -> str | None:
    """The name in `ops.ACTIVATIONS` of what a module computes; None where there is no such, or somebody changed it."""
    kind = type(act)
    if not is_plain(act):
        return None
    if kind is activations.GELUActivation:
        return "gelu" if act.act is nn.functional.gelu else None
    if kind is nn.GELU:
        return "gelu" if act.approximate == "none" else None
    return ACTIVATION_NAMES.get(kind) or getattr(kind, "fused_activation", None)


def fit(like: torch.Tensor, shapes: Iterable[tuple[torch.Tensor | None, tuple[int, ...]]]) -> bool:
    """Whether tensors have these shapes, and the dtype of the input `like`, which only autocast would give them."""
    dtype = None if torch.is_autocast_enabled(like.device.type) else like.dtype
    for tensor, shape in shapes:
        if tensor is not None and (tensor.shape != shape or (dtype is not None and tensor.dtype != dtype)):
            return False
    return True
