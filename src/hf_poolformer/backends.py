"""Who computes the blocks of a model: who is asked for, which kernels there are, and what they can take.

Kernels compute the two branches of a block (`ops.py` has the formulas, `fused_operations.py` calls the kernels) with
fewer passes over memory. Whether they do, an encoder decides once per forward (`decides`), and its embeddings, stages
and blocks follow (`fused_embeddings.py`, `fused_blocks.py`). The environment variable HF_POOLFORMER_KERNELS says who
is to compute, else the configuration's `kernels`, else it is auto:

    auto       kernels where they can run and have been measured to be faster: "cpu" without gradients, and on a GPU
               "triton" where `why_not_fastest` has nothing against it
    cpu        oneDNN on the CPU, or RuntimeError with the reason why not
    triton     Triton on a GPU, or RuntimeError with the reason why not; with TRITON_INTERPRET=1 on the CPU, slowly
    reference  plain PyTorch: the modules as they are

`why_not_cpu` and `why_not_triton` tell the reason for one input. Kernels have no double backward, forward-mode
derivative or vmap rule, and an export would need this package to run: under torch.func, forward-mode differentiation
and export, auto takes the reference. So does everybody, whatever is asked for, where a mode looks at every operation
(FlopCounterMode, FakeTensorMode). A compiled function keeps the decision that held when it was compiled.

Autocast: kernels compute products in autocast's dtype; statistics, sums and all that scales a channel are float32, and
so is the result, as it is when PyTorch's own operations compute the branch under autocast.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensor


BACKENDS = ("auto", "cpu", "triton", "reference")
VARIABLE = "HF_POOLFORMER_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
    if wanted == "reference" or is_watched():
        return Decision("reference")
    if wanted == "auto" and _is_on_gpu(x):
        fastest = not is_transformed() and why_not_fastest(x, pools, whole) is None
        return Decision("triton" if fastest else "reference", channels_last=fastest, circumstances=_circumstances())
    if wanted == "auto":
        usable = x.device.type == "cpu" and not is_transformed() and why_not_cpu(x) is None
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
    if decision is None or not holds(decision):
        return decide(x, preferred)
    return decision


def holds(decision: Decision) -> bool:
    """Whether nothing has happened since that kernels must know of; plain PyTorch is right at all times."""
    return decision.backend == "reference" or decision.circumstances == _circumstances()


def _circumstances() -> tuple[bool, ...]:
    # Reentrant checkpointing turns gradients off around a block, selective checkpointing watches it.
    return torch.is_grad_enabled(), is_watched(), is_transformed()


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
                triton_kernels().ahead.compile_ahead(forward, self, pixel_values)
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
        cpu = cpu_kernels()
        if cpu is not None:
            cpu.settle_allocator()
    # Here it costs least: three channels, and convolutions keep to it.
    return x.contiguous(memory_format=torch.channels_last)


@torch.compiler.assume_constant_result
def _default_backend() -> str | None:
    return os.environ.get(VARIABLE) or None


def is_transformed() -> bool:
    """Whether something is going on that kernels have no rule for: an export, torch.func, forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return is_exporting()
    if torch.jit.is_tracing() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether a graph is made for other programs. Asked, not traced: traced, PyTorch 2.11 says so of every graph."""
    return torch.compiler.is_exporting()


def is_watched() -> bool:
    """Whether a mode looks at every operation: a counter, a tracer, fake tensors. It is to see PyTorch's own."""
    if torch.compiler.is_compiling():
        return False
    # `torch.set_default_device` and `with torch.device(...)` are modes, too, which look at factory functions only.
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    watching = any(type(mode) is not torch.utils._device.DeviceContext for mode in modes)
    return watching or torch._C._len_torch_dispatch_stack() > 0


def infers(decision: Decision) -> bool:
    """Whether the CPU's functions of inference compute: they know more branches than its differentiable operations."""
    return decision.backend == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def computes_channel_norm(decision: Decision) -> bool:
    """Whether there are kernels for branches with a LayerNorm over channels."""
    return decision.backend == "triton" or infers(decision)


def computes_token_norm(decision: Decision) -> bool:
    """Whether kernels compute a LayerNorm and an addition that are not part of a larger operation. Compiled functions
    do without: Inductor's are as fast, and these are no operations that a graph could hold."""
    return decision.backend == "triton" and not (torch.compiler.is_compiling() or is_transformed())


# ---------------------------------------------------------------------------------------------------------------------
# Which kernels there are, and what they can take


def why_not_cpu(x: torch.Tensor, *parameters: torch.Tensor | None) -> str | None:
    """Why the CPU's kernels cannot compute an operation on x (B, C, H, W), or None if they can."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on the CPU"
    for dtype in {x.dtype, product_dtype(x)}:
        if not _has_onednn(dtype):
            return f"oneDNN has no fast products of {dtype} on this CPU, or is missing"
    return unfit(x, parameters)


def why_not_triton(x: torch.Tensor, *parameters: torch.Tensor | None) -> str | None:
    """Why the kernels cannot compute an operation on x (B, C, H, W) with these parameters, or None if they can."""
    reason = _why_no_kernels(x.device.type, x.device.index)
    if reason is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not one of float32, bfloat16, float16"
    if x.dtype == torch.bfloat16 and x.is_cuda and not _has_bfloat16(x.device.index):
        return "this GPU has no bfloat16"
    return unfit(x, parameters)


def unfit(x: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]) -> str | None:
    """What no kernel can take."""
    if not _is_plain_tensor(x):
        return f"x is a {type(x).__name__}, which may compute in another way"
    if x.ndim != 4:
        return f"x has shape {tuple(x.shape)}, not (batch, channels, height, width)"
    if x.numel() == 0:
        return f"x is empty, {tuple(x.shape)}"
    for parameter in parameters:
        if parameter is None:
            continue
        if not _is_plain_tensor(parameter):
            return f"a parameter is a {type(parameter).__name__}, which may compute in another way"
        if parameter.device != x.device:
            return f"x is on {x.device} but a parameter on {parameter.device}"
        if parameter.dtype not in DTYPES:
            return f"a parameter is {parameter.dtype}, not one of float32, bfloat16, float16"
    return None


def _is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor computes as PyTorch does: no shard, nor a quantised one. Exports trace with fakes of those."""
    kind = type(tensor)
    return kind in (torch.Tensor, nn.Parameter) or (kind is FakeTensor and is_exporting())


@torch.compiler.assume_constant_result
def _has_onednn(dtype: torch.dtype) -> bool:
    cpu = cpu_kernels()
    return cpu is not None and cpu.has_onednn(dtype)


def cpu_kernels() -> ModuleType | None:
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
    kernels = triton_kernels()
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
    if product_dtype(x) == torch.float32:
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
    return torch.cuda.is_current_stream_capturing() or triton_kernels().GRAPHING.get()


def triton_kernels() -> ModuleType | str:
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
def namespace(backend: str) -> str:
    """Of `torch.ops`, where the kernels of a backend have registered their operations."""
    return (cpu_kernels() if backend == "cpu" else triton_kernels()).NAMESPACE


# ---------------------------------------------------------------------------------------------------------------------
# Autocast


def under_autocast(x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """x as autocast's rules have it, and the dtype of products."""
    return x.float() if is_autocast(x) else x, product_dtype(x)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: torch.Tensor) -> bool:
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
