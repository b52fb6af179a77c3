"""What a model's modules must be, so that an operation may compute in their place.

A fused operation passes modules by. So it is taken only where that cannot be noticed: each module it stands for is of
a class in `FUSIBLE` (no subclass, which is also how parametrizations, adapters and quantisation show), its forward and
what that calls are those the class was defined with, no hook waits for it, and its attributes are those of the
formula. Whoever is anything else runs as it is, in plain PyTorch.
"""

from collections.abc import Callable, Iterable
from types import FunctionType

import torch
from torch import nn
from torch.nn.modules import module as hooks
from transformers import activations

from .ops import ACTIVATIONS


# Class -> names of what its forward may call, and what stood there, None where that is not one function. Neither an
# instance nor the class may have replaced any.
FUSIBLE: dict[type[nn.Module], dict[str, FunctionType | None]] = {}
# What `nn.Module.__call__` goes through.
CALLING = {"_wrapped_call_impl", "_compiled_call_impl", "_call_impl", "_slow_forward"}


def fusible(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: modules of this very class may be computed by a fused operation."""
    own = [name for parent in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(parent)]
    methods = {name: getattr(kind, name) for name in own if not name.startswith("__")}
    functions = {
        name: method if type(method) is FunctionType else None for name, method in methods.items() if callable(method)
    }
    FUSIBLE[kind] = functions | dict.fromkeys(CALLING)
    return kind


# Class -> what it computes: "block", its parts "group_norm", "layer_norm", "drop_path" and "channel_mlp", a kind of
# token mixer, or one of `ACTIVATIONS`.
FORMULAS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    # transformers' own, which `hidden_act` makes.
    activations.GELUActivation: "gelu",
    activations.SiLUActivation: "silu",
    activations.ReLUSquaredActivation: "squared_relu",
}
# The other way round, of a model's own classes.
CLASSES: dict[str, type[nn.Module]] = {}
for _kind in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.AvgPool2d, *FORMULAS):
    fusible(_kind)


def computes(formula: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: `fusible`, and what modules of this class compute, a value of `FORMULAS`."""

    def decorate(kind: type[nn.Module]) -> type[nn.Module]:
        FORMULAS[kind], CLASSES[formula] = formula, kind
        return fusible(kind)

    return decorate


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs its forward and nothing else: no hooks of its own, nor hooks of all modules."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_global_hooks()
    )


def has_global_hooks() -> bool:
    return bool(
        hooks._global_forward_hooks
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
    if kind not in FUSIBLE or (kinds and kind not in kinds) or not is_as_defined(kind):
        return False
    own = vars(module)
    # Loops, which torch.compile can follow and so guard.
    for name in FUSIBLE[kind]:
        if name in own:
            return False
    return is_unhooked(module)


def is_as_defined(kind: type[nn.Module]) -> bool:
    """Whether nobody has replaced a method of a class in `FUSIBLE`; others are nobody's business."""
    for name, function in FUSIBLE.get(kind, {}).items():
        if function is not None and getattr(kind, name) is not function:
            return False
    return True


def formula(module: nn.Module) -> str | None:
    """What a module computes, by its entry in `FORMULAS`; None where there is none, or somebody changed it."""
    return FORMULAS.get(type(module)) if is_plain(module) else None


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


def is_depthwise(conv: nn.Module) -> bool:
    """Whether a convolution takes each channel for itself, in an odd square window with zeros around the image."""
    return (
        is_plain(conv, nn.Conv2d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.kernel_size[0] % 2 == 1
        and conv.kernel_size == conv.weight.shape[2:]
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
    )


def norm_kind(norm: nn.Module, channels: int) -> str | None:
    """Over what a norm takes its statistics, of maps of so many channels: all of a sample ("group") or the channels
    of each token ("channel"); None for any other norm."""
    kind = formula(norm)
    if kind == "group_norm" and norm.num_groups == 1:
        return "group"
    if kind == "layer_norm" and tuple(norm.normalized_shape) == (channels,):
        return "channel"
    return None


def activation_name(act: nn.Module) -> str | None:
    """The name in `ACTIVATIONS` of what a module computes; None where there is no such, or somebody changed it."""
    name = formula(act)
    if name not in ACTIVATIONS:
        return None
    if isinstance(act, nn.GELU):
        return name if act.approximate == "none" else None
    if isinstance(act, activations.GELUActivation):
        return name if act.act is nn.functional.gelu else None
    return name


def fit(like: torch.Tensor, shapes: Iterable[tuple[torch.Tensor | None, tuple[int, ...]]]) -> bool:
    """Whether tensors have these shapes, and the dtype of the input `like`, which only autocast would give them."""
    dtype = None if torch.is_autocast_enabled(like.device.type) else like.dtype
    for tensor, shape in shapes:
        if tensor is not None and (tensor.shape != shape or (dtype is not None and tensor.dtype != dtype)):
            return False
    return True
