"""Who computes the blocks of a model, and what its modules must be for that.

Kernels compute the two branches of a block (`ops.py` has the formulas) with fewer passes over memory. Whether they do,
an encoder decides once per forward (`decides`), and its stages and blocks follow (`unless_fused`). Without gradients
the CPU computes branches of the second paper's families, too, by plain functions (`infer_branches`). The environment
variable HF_POOLFORMER_KERNELS says who is to compute, else the configuration's `kernels`, else it is auto:

    auto       kernels where they can run and have been measured to be faster: "cpu" without gradients, and on a GPU
               "triton" where `why_not_fastest` has nothing against it
    cpu        oneDNN on the CPU, or RuntimeError with the reason why not
    triton     Triton on a GPU, or RuntimeError with the reason why not; with TRITON_INTERPRET=1 on the CPU, slowly
    reference  plain PyTorch: the modules as they are

`why_not_cpu` and `why_not_triton` tell the reason for one input. Kernels have no double backward, forward-mode
derivative or vmap rule, and an export would need this package to run: under torch.func, forward-mode differentiation
and export, auto takes the reference. So does everybody, whatever is asked for, where a mode looks at every operation
(FlopCounterMode, FakeTensorMode). A compiled function keeps the decision that held when it was compiled. No weight is
kept in another form from one call to the next: it may change in between in ways that nothing tells (fused optimisers,
`.data`, merged adapters).

A fused operation passes modules by. So it is taken only where that cannot be noticed: each module it stands for is of
a class in `FUSIBLE` (no subclass, which is also how parametrizations, adapters and quantisation show), its forward and
what that calls are those the class was defined with, no hook waits for it, and its attributes are those of the
formula. Whoever is anything else runs as it is, in plain PyTorch.

Autocast: kernels compute products in autocast's dtype; statistics, sums and all that scales a channel are float32, and
so is the result, as it is when PyTorch's own operations compute the branch under autocast.
"""

import copy
import functools
import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as hooks
from transformers import activations

from .ops import ACTIVATIONS


BACKENDS = ("auto", "cpu", "triton", "reference")
VARIABLE = "HF_POOLFORMER_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Side of the depthwise window that Triton's kernel holds in registers.
LARGEST_WINDOW = 7
# Channels of images whose patches Triton embeds; cuDNN widens so few to eight, in a pass of its own.
MOST_CHANNELS = 4
# Of the registered operations; kernels of another number have other arguments.
INTERFACE = 3
# What the `kernels` library calls kernels of ours that it has loaded from the Hub begins with this.
LOADED_KERNELS = "_hf_poolformer_kernels"


# ---------------------------------------------------------------------------------------------------------------------
# The decision


class Decision(NamedTuple):
    """Who computes the blocks of a model in one forward."""

    backend: str  # "cpu", "triton" or "reference"
    forced: bool = False  # somebody asked for it: what it cannot compute is an error, and not left to the modules
    channels_last: bool = False  # the memory format for all operations to come
    circumstances: tuple[bool, ...] = ()  # in which it was made, and holds


# Of the model whose forward is running.
DECISION: ContextVar[Decision | None] = ContextVar("decision", default=None)


def decide(x: torch.Tensor, preferred: str | None = None, pools: bool = False, whole: bool = False) -> Decision:
    """
    Who computes blocks for x (B, C, H, W), the input of a model or of one of its blocks.

    Args:
        preferred: one of `BACKENDS`, which counts where HF_POOLFORMER_KERNELS says nothing.
        pools: whether this is for a whole model whose mixers are all pooling, with norms of samples.
        whole: whether this is for a whole stage, which is one operation of a graph.

    Raises:
        RuntimeError: kernels are asked for that cannot compute this.
        ValueError: there is no such backend.
    """
    wanted = _default_backend() or preferred or "auto"
    if wanted not in BACKENDS:
        raise ValueError(f"{VARIABLE} (or kernels) must be one of {', '.join(BACKENDS)} but is {wanted!r}")
    if wanted == "reference" or _is_watched():
        return Decision("reference")
    if wanted == "auto" and _is_on_gpu(x):
        fastest = not _is_transformed() and why_not_fastest(x, pools, whole) is None
        return Decision("triton" if fastest else "reference", channels_last=fastest, circumstances=_circumstances())
    if wanted == "auto":
        usable = x.device.type == "cpu" and not _is_transformed() and why_not_cpu(x) is None
        # In training the CPU's kernels save a quarter of the memory, but are 5 % slower than plain PyTorch.
        backend = "cpu" if usable and not torch.is_grad_enabled() else "reference"
        return Decision(backend, channels_last=usable, circumstances=_circumstances())
    decision = Decision(wanted, forced=True, channels_last=True, circumstances=_circumstances())
    takes(decision, x)
    return decision


def takes(decision: Decision, x: torch.Tensor, *parameters: torch.Tensor | None) -> bool:
    """Whether kernels compute an operation on x (B, C, H, W) with these parameters; RuntimeError if they must but
    cannot."""
    if decision.backend == "reference":
        return False
    reason = why_not_cpu(x, *parameters) if decision.backend == "cpu" else why_not_triton(x, *parameters)
    if reason is not None and decision.forced:
        raise RuntimeError(f"The kernels cannot run: {reason}. {VARIABLE}=auto uses them only where they can.")
    return reason is None


def decided(x: torch.Tensor, preferred: str | None) -> Decision:
    """What the model around a block has decided; a block that is called on its own decides for itself."""
    if torch.compiler.is_compiling():  # graphs have no context variables: a block decides while it is traced
        return decide(x, preferred)
    decision = DECISION.get()
    if decision is None or not _holds(decision):
        return decide(x, preferred)
    return decision


def _holds(decision: Decision) -> bool:
    """Whether nothing has happened since that kernels must know of; plain PyTorch is right at all times."""
    return decision.backend == "reference" or decision.circumstances == _circumstances()


def _circumstances() -> tuple[bool, ...]:
    # Reentrant checkpointing turns gradients off around a block, selective checkpointing watches it.
    return torch.is_grad_enabled(), _is_watched(), _is_transformed()


def decides(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of the forward of an encoder: decides for all within, and lays out `pixel_values` accordingly."""

    @functools.wraps(forward)
    def run(self, pixel_values: torch.Tensor, **kwargs):
        mixers, norm = set(self.config.token_mixers), self.config.norm_layer
        decision = decide(pixel_values, self.config.kernels, mixers == {"pooling"} and norm == "group_norm")
        pixel_values = _lay_out(pixel_values, decision)
        if torch.compiler.is_compiling():
            return forward(self, pixel_values, **kwargs)
        token = DECISION.set(decision)
        try:
            if decision.backend == "triton":
                _triton_kernels().ahead.compile_ahead(forward, self, pixel_values)
            return forward(self, pixel_values, **kwargs)
        finally:
            DECISION.reset(token)

    return run


def _lay_out(x: torch.Tensor, decision: Decision) -> torch.Tensor:
    """
    x in the memory format that is the fastest for all operations to come.

    That is channels_last for kernels, and for plain PyTorch on the CPU, training included, unless the reference was
    asked for: then x is left as it is, and the model built into transformers is met to the bit.
    """
    if not decision.channels_last:
        return x
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        cpu = _cpu_kernels()
        if cpu is not None:
            cpu.settle_allocator()
    # Here it costs least: three channels, and convolutions keep to it.
    return x.contiguous(memory_format=torch.channels_last)


def convolve(conv: nn.Module, x: torch.Tensor, preferred: str | None = None) -> torch.Tensor:
    """
    conv(x) of an embedding, by whom it is faster, and in the memory format of x, (B, C, H, W) both.

    PyTorch on the CPU reorders a contiguous weight in every call for a channels_last input, which for one image takes
    longer than the convolution where the weight is the larger of the two.
    """
    decision = decided(x, preferred)
    result = _convolved(conv, x, decision) if decision.backend == "triton" else None
    if result is not None:
        return result
    if (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _is_transformed()
        and not _is_watched()
        and isinstance(conv, nn.Conv2d)
        and is_plain(conv)
        and not x.is_contiguous()
        and conv.weight.is_contiguous()
        and conv.weight.numel() > x.numel()
    ):
        return conv(x.contiguous()).contiguous(memory_format=torch.channels_last)
    return conv(x)


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


def _is_watched() -> bool:
    """Whether a mode looks at every operation: a counter, a tracer, fake tensors. It is to see PyTorch's own."""
    if torch.compiler.is_compiling():
        return False
    # `torch.set_default_device` and `with torch.device(...)` are modes, too, which look at factory functions only.
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    watching = any(type(mode) is not torch.utils._device.DeviceContext for mode in modes)
    return watching or torch._C._len_torch_dispatch_stack() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Which kernels there are, and what they can take


def why_not_cpu(x: torch.Tensor, *parameters: torch.Tensor | None) -> str | None:
    """Why the CPU's kernels cannot compute an operation on x (B, C, H, W), or None if they can."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    for dtype in {x.dtype, _product_dtype(x)}:
        if not _has_onednn(dtype):
            return f"oneDNN has no fast products of {dtype} on this CPU, or is missing"
    return _unfit(x, parameters)


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
def _has_onednn(dtype: torch.dtype) -> bool:
    cpu = _cpu_kernels()
    return cpu is not None and cpu.has_onednn(dtype)


def _cpu_kernels() -> ModuleType | None:
    """The CPU's kernels, if this file finds those that it was written for."""
    loaded = _loaded_kernels("cpu")
    if isinstance(loaded, ModuleType):
        return loaded.cpu
    try:
        import hf_poolformer.kernels.cpu
    except ImportError:  # this file is a copy that travelled with a checkpoint, to a machine without the package
        return None
    return hf_poolformer.kernels.cpu if hf_poolformer.kernels.INTERFACE == INTERFACE else None


@torch.compiler.assume_constant_result
def _why_no_kernels(device: str, index: int | None) -> str | None:
    """Why there are no Triton kernels for a device, or None."""
    if device not in ("cuda", "cpu"):
        return f"x is on {device}, and there are kernels for CUDA GPUs only"
    kernels = _triton_kernels()
    if isinstance(kernels, str):
        return kernels
    if kernels.INTERFACE != INTERFACE:
        return f"the installed hf_poolformer has kernels of interface {kernels.INTERFACE}, this code needs {INTERFACE}"
    if device == "cpu" and not kernels.launch.INTERPRETED:
        return "x is on the CPU, where kernels run only if TRITON_INTERPRET=1 was set before Triton was imported"
    if device == "cuda" and torch.version.hip is None and _capability(index) < (7, 0):
        return "this GPU is older than what Triton supports (compute capability 7.0)"
    return None


@torch.compiler.assume_constant_result
def _has_bfloat16(index: int | None) -> bool:
    return torch.version.hip is not None or _capability(index) >= (8, 0)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _is_on_gpu(x: torch.Tensor) -> bool:
    return x.device.type == "cuda"


# In inference, stages of pooling blocks go from launch to launch (3 ms for S12 on a slow CPU), and are the fastest for
# any batch. Launching the kernels of others takes the CPU longer, as long for any batch; with fewer pixels plain
# PyTorch, whose time grows with the batch, is through before: 9.3 ms against 0.098 ms per image of 224 x 224 on an
# H100. Stages of separable convolutions and attention go from launch to launch as well since then, which no GPU has
# measured yet.
FEWEST_PIXELS = 95 * 224**2
# In training the CPU takes 15.6 ms, and up to 22 on a busy one, a plain step 0.21 ms per image on an H200. Counted in
# images, of any size: a block that checkpointing computes again knows of no other number, nor does a stage of a graph.
FEWEST_IMAGES = 96


def why_not_fastest(x: torch.Tensor, pools: bool = False, whole: bool = False) -> str | None:
    """Why auto leaves the blocks of a model with the input x (B, C, H, W) on a GPU to plain PyTorch; None if Triton is
    to compute them. `pools` and `whole` as in `decide`."""
    reason = why_not_triton(x)
    if reason is not None:
        return reason
    if torch.version.hip is not None:
        return "nobody has measured the kernels on AMD's GPUs"
    if _capability(x.device.index) < (8, 0):
        return "nobody has measured the kernels on GPUs older than compute capability 8.0"
    if _product_dtype(x) == torch.float32:
        return "in float32 PyTorch's convolutions may use TF32, the kernels do not"
    if torch.compiler.is_compiling():
        # On an H200, 256 images: 57 600 per second with an operation for each stage, 25 400 with one for each branch,
        # and 30 500 without.
        if torch.is_grad_enabled() or not whole:
            return "compiled plain PyTorch was measured to be faster than a graph of operations for each branch"
        return "launching kernels takes longer than computing few images" if x.shape[0] < FEWEST_IMAGES else None
    if torch.is_grad_enabled():
        few = x.shape[0] < FEWEST_IMAGES
        return f"launching kernels takes longer than training on {x.shape[0]} images" if few else None
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels < FEWEST_PIXELS and not (pools or _is_for_graph()):
        return f"launching kernels takes longer than computing {pixels} pixels, unless a CUDA graph launches them"
    return None


def _is_for_graph() -> bool:
    """Whether launches are recorded in a CUDA graph, or rehearsed for one, and cost nothing later."""
    return torch.cuda.is_current_stream_capturing() or _triton_kernels().GRAPHING.get()


def _triton_kernels() -> ModuleType | str:
    """The package of Triton kernels, whose import registers them, or why it cannot be imported."""
    loaded = _loaded_kernels(*TRITON_MODULES)
    if loaded is not None:
        return loaded
    # Here rather than at the top: half of its time is Triton's, which the CPU does not need. Absolute, because this
    # file may travel to the Hub, where every relative import is taken for a file to copy.
    try:
        import hf_poolformer.kernels.ahead
        import hf_poolformer.kernels.channel_mlp
        import hf_poolformer.kernels.inference
        import hf_poolformer.kernels.patch_embedding
        import hf_poolformer.kernels.pool_mixer
        import hf_poolformer.kernels.separable_conv
        import hf_poolformer.kernels.stages
        import hf_poolformer.kernels.statistics
        import hf_poolformer.kernels.token_norm
        import hf_poolformer.kernels.training
    except ImportError as error:
        return f"{error.name or 'a module'} is not installed ({error})"
    return hf_poolformer.kernels


TRITON_MODULES = (
    "ahead",
    "channel_mlp",
    "inference",
    "patch_embedding",
    "pool_mixer",
    "separable_conv",
    "stages",
    "statistics",
    "token_norm",
    "training",
)


@torch.compiler.assume_constant_result
def _loaded_kernels(*modules: str) -> ModuleType | str | None:
    """
    Our kernels as the `kernels` library has loaded them from a repository of the Hub (hub/kernel_repository.py), with
    these of their modules imported, or why that cannot be; None where it has loaded none of this interface.

    Whoever wants them has loaded them, and said which revision, and that they are trusted. Nothing is downloaded here.
    """
    library = sys.modules.get("kernels")
    if not hasattr(library, "get_loaded_kernels"):
        return None
    for each in library.get_loaded_kernels():
        package = each.module
        if package.__name__.startswith(LOADED_KERNELS) and package.INTERFACE == INTERFACE:
            try:
                for name in modules:
                    importlib.import_module(f"{package.__name__}.{name}")
            except ImportError as error:
                return f"{error.name or 'a module'} is not installed ({error})"
            return package
    return None


@torch.compiler.assume_constant_result
def _namespace(backend: str) -> str:
    """Of `torch.ops`, where the kernels of a backend have registered their operations."""
    return (_cpu_kernels() if backend == "cpu" else _triton_kernels()).NAMESPACE


# ---------------------------------------------------------------------------------------------------------------------
# What a model's modules must be


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
        or _has_global_hooks()
    )


def _has_global_hooks() -> bool:
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
    if kind not in FUSIBLE or (kinds and kind not in kinds) or not _is_as_defined(kind):
        return False
    own = vars(module)
    # Loops, which torch.compile can follow and so guard.
    for name in FUSIBLE[kind]:
        if name in own:
            return False
    return is_unhooked(module)


def _is_as_defined(kind: type[nn.Module]) -> bool:
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


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


# While an embedding is on its way into a stage: what it gives, and the statistics of that, where kernels made them.
ENTERING: ContextVar[list[tuple[torch.Tensor, torch.Tensor]] | None] = ContextVar("entering", default=None)


def enter_stage(embedding: nn.Module, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """stage(embedding(x)); where nobody can come between, the first block takes the statistics of its input from the
    kernels of the embedding."""
    if not _hands_over(embedding, stage):
        return stage(embedding(x))
    token = ENTERING.set([])
    try:
        return stage(embedding(x))
    finally:
        ENTERING.reset(token)


def entering_statistics(x: torch.Tensor) -> torch.Tensor | None:
    """Statistics (B, 2) of x, the input of a stage, if the embedding made them; they are given once."""
    entering = None if torch.compiler.is_compiling() else ENTERING.get()
    if not entering:
        return None
    made, statistics = entering.pop()
    return statistics if made is x else None


def _hands_over(embedding: nn.Module, stage: nn.Module) -> bool:
    """Whether the first block of a stage wants statistics, and gets the very result of a convolution."""
    decision = None if torch.compiler.is_compiling() else DECISION.get()
    if decision is None or decision.backend != "triton" or not _holds(decision):
        return False
    if not (is_plain(stage) and isinstance(stage, nn.ModuleList) and len(stage) and formula(stage[0]) == "block"):
        return False
    block, last = stage[0], getattr(embedding, "post_norm", None)
    return (
        # What its branch will ask for; statistics that it does not take after all are made in vain.
        isinstance(block.before_norm, nn.GroupNorm)
        and hasattr(type(block.token_mixer), "fused_pool_size")
        # It would compute itself again without them.
        and not (block.gradient_checkpointing and block.training)
        and is_plain(embedding)
        and embedding.position_embeddings is None
        and isinstance(last, nn.Identity)
        and is_plain(last)
    )


def _convolved(conv: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor | None:
    """conv(x) (B, C, H, W) with Triton's kernels, in whole or for its bias; None if plain PyTorch is to compute."""
    if not (isinstance(conv, nn.Conv2d) and is_plain(conv)) or _is_transformed():
        return None
    compiling = torch.compiler.is_compiling()
    entering = None if compiling else ENTERING.get()
    arguments = embedding_arguments(conv, x, decision)
    if arguments is not None:
        y, statistics = patch_embedding(x, **arguments, with_statistics=entering is not None)
    elif not compiling and not torch.is_grad_enabled() and _has_plain_bias(conv, x, decision):
        y = conv._conv_forward(x, conv.weight, None)
        if not y.is_contiguous(memory_format=torch.channels_last):
            return y + conv.bias.to(y.dtype)[:, None, None]
        kernels = _triton_kernels().patch_embedding
        statistics = kernels.add_bias(y, conv.bias.contiguous(), entering is not None)
    else:
        return None
    if entering is not None:
        entering.append((y, statistics))
    return y


def embedding_arguments(conv: nn.Conv2d, x: torch.Tensor, decision: Decision) -> dict[str, Any] | None:
    """Of `patch_embedding`, for the convolution of an embedding; None where that would compute another function, or
    cannot, or is not faster."""
    if _product_dtype(x) == torch.float32 or x.ndim != 4 or x.shape[1] > MOST_CHANNELS or conv.weight.ndim != 4:
        return None
    outputs, _, *window = conv.weight.shape
    if not (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(type(pad) is int for pad in conv.padding)  # and not "same"
        and all(size + 2 * pad >= side for size, pad, side in zip(x.shape[2:], conv.padding, window, strict=True))
        and fit(x, [(conv.weight, (outputs, x.shape[1], *window)), (conv.bias, (outputs,))])
        and takes(decision, x, conv.weight, conv.bias)
    ):
        return None
    arguments = {"weight": conv.weight, "stride": list(conv.stride), "padding": list(conv.padding)}
    if not _triton_kernels().patch_embedding.fits(**arguments):
        return None
    return {**arguments, "bias": conv.bias}


def _has_plain_bias(conv: nn.Conv2d, x: torch.Tensor, decision: Decision) -> bool:
    """Whether a convolution may compute its product, and a kernel add its bias."""
    bias = conv.bias
    shapes = [(conv.weight, conv.weight.shape), (bias, conv.weight.shape[:1])]
    return bias is not None and fit(x, shapes) and takes(decision, x, conv.weight, bias)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def unless_fused(fused: Callable[[nn.Module, torch.Tensor], torch.Tensor | None]) -> Callable[[Callable], Callable]:
    """Decorator of the forward of a block or a stage, for where `fused(module, x)` has no result."""

    def decorate(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
            result = fused(self, hidden_states)
            return forward(self, hidden_states) if result is None else result

        return run

    return decorate


def fused_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """A block of x (B, C, H, W), each branch in one operation where its parts allow it; None if plain PyTorch is to
    compute."""
    decision = decided(x, block.config.kernels)
    if decision.backend == "reference":
        return None
    if infers(decision):
        return _inferred_block(block, x, decision)
    return _operated_block(block, x, decision, entering_statistics(x), False)[0]


def fused_stage(stage: nn.ModuleList, x: torch.Tensor) -> torch.Tensor | None:
    """
    All blocks of a stage by kernels, whatever computes their branches being found only once. Without gradients a CPU
    takes a few samples at a time through all of them, which keeps these in the caches, and a GPU goes from launch to
    launch. In training on a GPU, blocks hand on the statistics of their results.

    None where plain PyTorch is to compute, or blocks are to be called one by one.
    """
    if torch.compiler.is_compiling():
        return _stage_of_graph(stage, x)
    decision = DECISION.get()
    if decision is None or decision.backend == "reference" or not _holds(decision):
        return None
    if torch.is_grad_enabled():
        return _trained_stage(stage, x, decision) if decision.backend == "triton" else None
    branches = _known(_find_branches, stage, x, decision)
    return infer_branches(stage, x, branches, decision.backend, entering_statistics(x)) if branches else None


def _stage_of_graph(stage: nn.ModuleList, x: torch.Tensor) -> torch.Tensor | None:
    """The same in a graph, on a GPU and without gradients: the stage is one operation."""
    if torch.is_grad_enabled() or len(stage) == 0 or formula(stage[0]) != "block":
        return None
    decision = decide(x, stage[0].config.kernels, whole=True)
    branches = _find_branches(stage, x, decision) if decision.backend == "triton" else None
    if branches is None:
        return None
    x, dtype = _autocast(x)
    tensors = [value for _, arguments in branches for value in arguments.values() if isinstance(value, torch.Tensor)]
    text = ", ".join([f"('{name}', {_literal(arguments)})" for name, arguments in branches])
    run = getattr(torch.ops, _namespace("triton")).infer_stage
    return run(x.contiguous(memory_format=torch.channels_last), tensors, f"[{text}]", dtype)


def _literal(arguments: dict[str, Any]) -> str:
    """Arguments as kernels/stages.py reads them in a graph. Written for torch.compile, which knows no `repr`."""
    items = []
    for name, value in arguments.items():
        text = "..." if isinstance(value, torch.Tensor) else f"'{value}'" if isinstance(value, str) else f"{value}"
        items.append(f"'{name}': {text}")
    return "{" + ", ".join(items) + "}"


def _trained_stage(stage: nn.ModuleList, x: torch.Tensor, decision: Decision) -> torch.Tensor | None:
    blocks = list(stage)
    if any(formula(block) != "block" or (block.gradient_checkpointing and block.training) for block in blocks):
        return None
    found = [_known(_find_operations, block, x, decision) for block in blocks]
    statistics = entering_statistics(x)
    if all(map(_is_recordable, found)):
        branches = [branch for mixer, _, mlp in found for branch in (("pool_mixer", mixer), ("channel_mlp", mlp))]
        norms = [block.before_norm.bias for block in blocks]
        if _needs_gradient(x, *norms, *(value for _, arguments in branches for value in arguments.values())):
            x, dtype = _autocast(x)
            x = x.contiguous(memory_format=torch.channels_last)
            rest = [rest for bias in norms for rest in ({"norm_bias": bias}, {})]
            # Drawn in the order in which the blocks would draw them.
            masks = [block.drop_path.mask(x) for block in blocks for _ in range(2)]
            branches = [
                (name, {**arguments, **more, "mask": mask})
                for (name, arguments), more, mask in zip(branches, rest, masks, strict=True)
            ]
            return _triton_kernels().training.train(stage, x, branches, dtype, statistics)
        if not any(block.drop_path.drops for block in blocks):
            return infer_branches(stage, x, branches, decision.backend, statistics)
    for block in blocks:
        x, statistics = _operated_block(block, x, decision, statistics, block is not blocks[-1])
    return x


def _needs_gradient(*values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _is_recordable(found: tuple[dict[str, Any] | None, ...]) -> bool:
    """Whether a block is a pooling mixer and an MLP with norms of samples, all of whose tensors are contiguous."""
    mixer, _, mlp = found
    if mixer is None or mlp is None or mlp["norm"] != "group":
        return False
    values = (*mixer.values(), *mlp.values())
    return all(value.is_contiguous() for value in values if isinstance(value, torch.Tensor))


def _operated_block(
    block: nn.Module, x: torch.Tensor, decision: Decision, known: torch.Tensor | None, hands_on: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    A block of x (B, C, H, W) by operations that have gradients, or by modules where there is none.

    Args:
        known: statistics of the samples of x (B, 2), or None.
        hands_on: whether those of the result are wanted.

    Returns:
        The result, and those statistics, where they cost no pass of their own, or None.
    """
    found = _find_operations if torch.compiler.is_compiling() else functools.partial(_known, _find_operations)
    mixer, separable, mlp = found(block, x, decision)
    statistics = {}  # of what the second branch gets, by the kind of norm that wants them
    if mixer is not None:
        rest = {"norm_bias": block.before_norm.bias, "mask": block.drop_path.mask(x), "statistics": known}
        x, statistics["group"] = pool_mixer(
            x, **mixer, **rest, with_statistics=block.use_mlp, backend=decision.backend
        )
    elif separable is not None:
        x = separable_conv(x, **separable, mask=block.drop_path.mask(x))
    else:
        branch = module_branch(block, x, decision)
        x, statistics["channel"] = (block.mix_tokens(x), None) if branch is None else branch
    if mlp is None:
        return block.mix_channels(x), None
    rest = {"mask": block.drop_path.mask(x), "statistics": statistics.get(mlp["norm"])}
    with_statistics = hands_on and mlp["norm"] == "group"
    return channel_mlp(x, **mlp, **rest, with_statistics=with_statistics, backend=decision.backend)


def _find_operations(block: nn.Module, x: torch.Tensor, decision: Decision) -> tuple[dict[str, Any] | None, ...]:
    """Arguments of `pool_mixer` or `separable_conv`, and of `channel_mlp`; None for what modules are to compute."""
    mixer = mixer_arguments(block, x, decision)
    separable = separable_arguments(block, x, decision) if mixer is None else None
    return mixer, separable, mlp_arguments(block, x, decision)


def _find_branches(stage: nn.ModuleList, x: torch.Tensor, decision: Decision) -> list["Branch"] | None:
    """All branches of the blocks of a stage; None if plain PyTorch is to compute one of them."""
    branches: list[Branch | None] = []
    for block in stage:
        if formula(block) != "block":
            return None
        branches.append(_find_branch(block, x, decision, MIXERS))
        if block.use_mlp:
            branches.append(_find_branch(block, x, decision, MLPS))
        if None in branches:
            return None
    return branches


def _known(find: Callable[..., Any], module: nn.Module, x: torch.Tensor, decision: Decision) -> Any:
    """find(module, x, decision), which looks at a hundred things for each block, only if something has changed."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    asked = decision, x.dtype, x.device, x.shape[1:], autocast
    # On the module, with which it goes: a table of all modules would keep those alive that refer to themselves.
    known = vars(module).setdefault("_found_by_backends", Found()).by_function
    last = known.get(find)
    # Replicas and shallow copies share what lies on the module that they are of.
    if last is None or last[1] != asked or last[0].module is not module or not last[0].holds():
        last = known[find] = Snapshot(module), asked, find(module, x, decision)
    return last[2]


class Found:
    """What was found of a module, when, and for what, by the function that found it. Copies start anew."""

    def __init__(self):
        self.by_function: dict[Callable[..., Any], tuple[Snapshot, tuple, Any]] = {}

    def __reduce__(self):
        return Found, ()


class Snapshot:
    """All attributes of a module and of those within, as they are now."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._modules = list(module.modules())
        self._classes = list(map(type, self._modules))
        parts = list(map(vars, self._modules))
        # What may change in place: parameters, hooks and the like.
        containers = [value for own in parts for value in own.values() if isinstance(value, dict | list | set)]
        self._empty = [each for each in containers if not each]
        self._now = parts + [each for each in containers if each]
        self._then = [copy.copy(each) for each in self._now]
        self._parameters = [own["_parameters"] for own in parts]
        self._tensors = self._find_tensors()
        self._layouts = [(each.shape, each.dtype, each.device) for each in self._tensors]

    def _find_tensors(self) -> list[torch.Tensor]:
        return [tensor for own in self._parameters for tensor in own.values() if tensor is not None]

    def holds(self) -> bool:
        """Whether nothing has changed; neither has a class that was replaced a method, nor is there a global hook."""
        try:
            same = not any(self._empty) and all(map(operator.eq, self._now, self._then))
        except RuntimeError:  # of two tensors, one of which stands in the place of the other
            return False
        return (
            same
            # Two of one number may be equal, and yet be two.
            and all(map(operator.is_, self._find_tensors(), self._tensors))
            and all(
                tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
                for tensor, (shape, dtype, device) in zip(self._tensors, self._layouts, strict=True)
            )
            and self._classes == list(map(type, self._modules))
            and all(map(_is_as_defined, set(self._classes)))
            and not _has_global_hooks()
        )


# ---------------------------------------------------------------------------------------------------------------------
# Branches of a block


# Of an operation that a branch is: its name, and its arguments beside x.
Branch = tuple[str, dict[str, Any]]


def infers(decision: Decision) -> bool:
    """Whether the CPU's functions of inference compute: they know more branches than its differentiable operations."""
    return decision.backend == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def computes_channel_norm(decision: Decision) -> bool:
    """Whether there are kernels for branches with a LayerNorm over channels."""
    return decision.backend == "triton" or infers(decision)


def _inferred_block(block: nn.Module, x: torch.Tensor, decision: Decision) -> torch.Tensor:
    """A block by the functions of inference, but for branches that only modules can compute."""
    mixer = _find_branch(block, x, decision, MIXERS)
    if mixer is None:
        x = block.mix_tokens(x)
    mlp = _find_branch(block, x, decision, MLPS)
    branches = [branch for branch in (mixer, mlp) if branch is not None]
    x = infer_branches(block, x, branches, decision.backend) if branches else x
    return block.mix_channels(x) if mlp is None else x


def _find_branch(
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
    if formula(mixer) != "attention" or not mixer.is_sdpa or _is_transformed():
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
        not _computes_token_norm(decision)
        or _norm_of_plain_branch(block, "mix_tokens", norm, x, *scales) != "channel"
        or not takes(decision, x, norm.weight, norm.bias, *scales)
    ):
        return None
    kernels = _triton_kernels().token_norm
    dtype = torch.float32 if _is_autocast(x) else x.dtype
    multiplied = formula(mixer) == "attention" and is_plain(mixer.qkv, nn.Linear)
    weight, bias, layer_scale, res_scale = _contiguous(norm.weight, norm.bias, *scales)
    normed, shortcut = kernels.norm_and_shortcut(
        x.contiguous(memory_format=torch.channels_last),
        weight,
        bias,
        res_scale,
        norm.eps,
        _product_dtype(x) if multiplied else dtype,
    )
    branch = mixer(normed)
    if _unfit(branch, ()) or branch.shape != x.shape or branch.device != x.device or branch.dtype not in DTYPES:
        return block.merge(x, branch, *scales), None
    branch = branch.contiguous(memory_format=torch.channels_last)
    mask = block.drop_path.mask(branch)
    return kernels.merge(shortcut, branch, layer_scale, res_scale, mask, dtype, block.use_mlp)


def normalise(
    norm: nn.Module, x: torch.Tensor, preferred: str | None, reader: nn.Module | None = None
) -> torch.Tensor:
    """
    norm(x), by a kernel where that is a LayerNorm over the channels of x and Triton's kernels compute.

    Args:
        x: (B, C, H, W), and so is the result.
        preferred: one of `BACKENDS`, for a norm that is called outside of a model.
        reader: what alone reads the result. If that is a convolution, the result has autocast's dtype.
    """
    # In this order, because most embeddings have no norm, and nobody should wait for that to be found out.
    if not isinstance(norm, nn.LayerNorm) or torch.compiler.is_compiling():
        return norm(x)
    decision, parameters = decided(x, preferred), (norm.weight, norm.bias)
    if not (
        _computes_token_norm(decision)
        and norm_kind(norm, x.shape[1]) == "channel"
        and fit(x, ((vector, x.shape[1:2]) for vector in parameters))
        and takes(decision, x, *parameters)
    ):
        return norm(x)
    multiplied = reader is not None and is_plain(reader, nn.Conv2d)
    dtype = _product_dtype(x) if multiplied else torch.float32 if _is_autocast(x) else x.dtype
    x = x.contiguous(memory_format=torch.channels_last)
    return _triton_kernels().token_norm.token_norm(x, *_contiguous(*parameters), norm.eps, dtype)


def _computes_token_norm(decision: Decision) -> bool:
    """Whether kernels compute a LayerNorm and an addition that are not part of a larger operation. Compiled functions
    do without: Inductor's are as fast, and these are no operations that a graph could hold."""
    return decision.backend == "triton" and not (torch.compiler.is_compiling() or _is_transformed())


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


# ---------------------------------------------------------------------------------------------------------------------
# Operations


def pool_mixer(
    x: torch.Tensor,
    *,
    backend: str,
    pool_size: int,
    eps: float,
    weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    with_statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `ops.pool_mixer` by kernels, for what they can take (`takes`).

    Args:
        x: (B, C, H, W). Kernels work in channels_last memory, to which they bring it.
        backend: "cpu" or "triton".
        norm_bias: (C,), cancels; but it gets the gradient zero, because DistributedDataParallel waits for one.
        mask: gets no gradient.
        statistics: (B, 2) of x as an operation before this one returned them, which saves a pass. The gradient
            accounts for their dependence on x; they themselves get none.
        with_statistics: also return the statistics of the result, where that costs no pass of its own.

    Returns:
        The result, like x, and its statistics (B, 2), or None.
    """
    x = _autocast(x)[0].contiguous(memory_format=torch.channels_last)
    parameters = _contiguous(weight, layer_scale, res_scale, mask)
    if backend == "cpu":
        return getattr(torch.ops, _namespace("cpu")).cpu_pool_mixer(x, *parameters, pool_size, eps, norm_bias)[0], None
    statistics = _known_statistics(x, statistics)
    run = _operation("pool_mixer", "pool_mixer")
    y, statistics = run(x, statistics, *parameters, pool_size, eps, with_statistics, norm_bias)
    return y, statistics if with_statistics else None


def channel_mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    *,
    backend: str,
    activation: str,
    eps: float,
    norm: str = "group",
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `ops.channel_mlp` by kernels; what is not said there, and the result, as in `pool_mixer`.

    Args:
        norm: "group", or (Triton only) "channel" for a LayerNorm over channels, whose statistics are (B H W, 2), of
            tokens.
    """
    x, dtype = _autocast(x)
    if backend == "cpu":
        weight1, weight2 = weight1.flatten(1), weight2.flatten(1)
    vectors = (norm_weight, norm_bias, weight1, bias1, weight2, bias2, act_scale, act_bias)
    vectors = (*vectors, layer_scale, res_scale, mask)
    needs_gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *vectors))
    x, vectors = x.contiguous(memory_format=torch.channels_last), _contiguous(*vectors)
    if backend == "cpu":
        arguments = (x, *vectors, activation, eps, dtype, needs_gradient)
        return getattr(torch.ops, _namespace("cpu")).cpu_channel_mlp(*arguments)[0], None
    arguments = (x, _known_statistics(x, statistics, norm), *vectors, activation, eps, dtype, needs_gradient)
    y, statistics, _, _ = _operation("channel_mlp", "channel_mlp")(*arguments, with_statistics)
    return y, statistics if with_statistics else None


def separable_conv(
    x: torch.Tensor,
    weight1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    weight2: torch.Tensor,
    *,
    act_scale: torch.Tensor,
    act_bias: torch.Tensor,
    eps: float,
    norm_weight: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
    res_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.separable_conv` by Triton's kernels, for a window of at most `LARGEST_WINDOW` tokens; the rest as in
    `pool_mixer`."""
    x, dtype = _autocast(x)
    vectors = (norm_weight, weight1, act_scale, act_bias, depthwise_weight, weight2)
    vectors = (*vectors, layer_scale, res_scale, mask)
    needs_gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *vectors))
    x, vectors = x.contiguous(memory_format=torch.channels_last), _contiguous(*vectors)
    return _operation("separable_conv", "separable_conv")(x, *vectors, eps, dtype, needs_gradient)[0]


def patch_embedding(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: list[int],
    padding: list[int],
    with_statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The convolution of x (B, C, H, W) by Triton's kernel, in x's dtype or, as PyTorch has it, autocast's.

    Args:
        weight: (out, C, KH, KW), small enough for `patch_embedding.fits`; bias (out,).
        stride, padding: of height and width, padding with zeros.
        with_statistics: also return those of the result, (B, 2), else None.
    """
    x = x.to(_product_dtype(x)).contiguous(memory_format=torch.channels_last)
    arguments = (x, weight, None if bias is None else bias.contiguous(), stride, padding, with_statistics)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y, statistics = getattr(torch.ops, _namespace("triton")).patch_embedding(*arguments)
    else:
        y, statistics = _triton_kernels().patch_embedding.convolve(*arguments)
    return y, statistics if with_statistics else None


def infer_branches(
    owner: nn.Module,
    x: torch.Tensor,
    branches: list[Branch],
    backend: str,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Branches in sequence, without gradients.

    Args:
        owner: the stage or the block whose branches they are.
        x: (B, C, H, W), and so is the result, in channels_last memory.
        branches: of each the name of its operation, and its arguments: "pool_mixer", "channel_mlp" and
            "separable_conv" with those of `ops`, all of them, but mask; "attention", and on the CPU "mixing", with
            those of `attention_arguments` and `mixing_arguments`.
        backend: "cpu" or "triton".
        statistics: (B, 2) of x, where they are known; the CPU makes its own.
    """
    x, dtype = _autocast(x)
    if backend == "triton":
        x = x.contiguous(memory_format=torch.channels_last)
        return _triton_kernels().inference.infer(owner, x, branches, dtype, statistics)
    cpu = _cpu_kernels()
    return cpu.infer(x, [cpu.BRANCHES[name].prepare(dtype, **arguments) for name, arguments in branches])


def _autocast(x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """x as autocast's rules have it, and the dtype of products."""
    return x.float() if _is_autocast(x) else x, _product_dtype(x)


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def _is_autocast(x: torch.Tensor) -> bool:
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _operation(module: str, name: str) -> Callable[..., Any]:
    """An operation of Triton's: where graphs are made the registered one, else without PyTorch's dispatcher, which
    would take longer than launching the kernels."""
    if torch.compiler.is_compiling() or _is_transformed() or _is_watched():
        return getattr(getattr(torch.ops, _namespace("triton")), name)
    return getattr(getattr(_triton_kernels(), module), name)


def _known_statistics(x: torch.Tensor, statistics: torch.Tensor | None, norm: str = "group") -> torch.Tensor:
    if statistics is not None:
        return statistics.detach()
    if norm == "channel":
        return _operation("statistics", "token_statistics")(x.detach())
    return _operation("statistics", "sample_statistics")(x.detach())


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
