"""How kernels are launched: tile sizes, precision of products, current device, memory format."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from . import tiles

# What kernels need of it comes with the launches.
from .tiles import Tiles as Tiles
from .tiles import bucket as bucket


# With TRITON_INTERPRET=1 kernels run in Python, on CPU tensors. Triton reads it whenever something is decorated, its
# own functions included, so it had to be set when Triton was imported.
INTERPRETED = not isinstance(tl.sum, triton.runtime.JITFunction)
# Of every launch: multiply-adds in one rounding. Triton's default, of which 3.9 warns that 3.10 will change it.
FUSION = {"enable_fp_fusion": True}


class Kernel:
    """
    A kernel of Triton's that remembers what it was compiled to: `kernel[grid](arguments of its def, options by name)`.

    Triton looks at each argument of every launch in Python, to find the code that was compiled for such ones, which
    takes longer than the launch. Here a few of their properties are the key: type and, of addresses and integers,
    whether they are multiples of 16, or one, which is what Triton compiles for.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._jit = triton.jit(function, **options)
        self._compiled: dict[tuple, tuple[Any, tuple]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._jit[grid] if INTERPRETED else functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        active = triton.runtime.driver.active
        device = active.get_current_device()
        key, values = [device], []
        for argument in args:
            if isinstance(argument, torch.Tensor):
                # Its address: Triton would ask the tensor for it, and then the driver whether that is one.
                values.append(argument.data_ptr())
                key += argument.dtype, values[-1] % 16 == 0
            elif type(argument) is int:
                values.append(argument)
                key += argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
            else:
                values.append(argument)
                key.append(type(argument))
        key = *key, *options.items()
        found = self._compiled.get(key)
        recorder = RECORDER.get()
        if found is None:
            compiled = self._jit[grid](*args, **options)
            if compiled is not None:  # else another thread compiles it (see ahead.py)
                found = compiled, tuple(options[name] for name in self._jit.arg_names[len(args) :])
                self._compiled[key] = found
        else:
            compiled, constants = found
            compiled[whole_grid(grid)](*values, *constants, stream=active.get_current_stream(device))
        if recorder is not None:
            recorder(found, grid, args)


def whole_grid(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (*grid, 1, 1)[:3]


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorator of a kernel: `triton.jit` for what is launched. Its last arguments are constants, given by name."""
    return functools.partial(kernel, **options) if function is None else Kernel(function, **options)


# Is told of every launch in this thread: (what was compiled and its constants, or None; grid; arguments). What
# libraries compute is left to its `call` (see `by_library`).
RECORDER: ContextVar[Any] = ContextVar("recorder", default=None)
# Device and key -> candidates in the order in which they are tried.
_orders: dict[tuple, list] = {}
# While tiles are being timed (`hf-poolformer benchmark tune`), what stands for `_first_that_fits`.
_chooser: Callable[[tuple, list, Callable[[Any], Any]], Any] | None = None


def tuned(key: tuple, candidates: list, launch: Callable[[Any], Any]) -> Any:
    """
    `launch(tile)` with the first of the fitting `candidates`, the best known one being tried first.

    What is known comes from the user's own timings (`hf-poolformer benchmark tune`), then from `tiles.MEASURED`, then
    from a rule. Nothing is timed here, so that the order of summation, and with it the last bits of a result, are the
    same in every run.

    Args:
        key: the kernel's name, then what decides about its tile: dtypes (of products last), a `bucket` of rows, the
            number of channels, and whatever else.
        candidates: tiles that the kernel can take, the one to be taken where nothing is known first.
        launch: must be pure: it allocates what it returns.
    """
    if INTERPRETED:
        return launch(candidates[0])
    key = (triton.runtime.driver.active.get_current_device(), *key)
    return (_chooser or _first_that_fits)(key, candidates, launch)


def _first_that_fits(key: tuple, candidates: list, launch: Callable[[Any], Any]) -> Any:
    if key not in _orders:
        _orders[key] = tiles.order(key, candidates)
    order = _orders[key]
    while len(order) > 1:
        try:
            return launch(order[0])
        except OutOfResources:
            order.pop(0)
    return launch(order[0])


def cdiv(count: int, size: int) -> int:
    """How many of this size it takes for so many; Triton's own takes as long as a launch."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (count - 1).bit_length()


@contextlib.contextmanager
def every_tile() -> Iterator[None]:
    """Inside, every kernel is launched with each of its tiles: all of them are to be compiled."""

    def launch_all(key: tuple, candidates: list, launch: Callable[[Any], Any]) -> Any:
        for candidate in candidates[:-1]:
            with contextlib.suppress(OutOfResources):
                launch(candidate)
        return launch(candidates[-1])

    with _choosing(launch_all):
        yield


@contextlib.contextmanager
def timing() -> Iterator[dict[tuple, Any]]:
    """Inside, every kernel takes the fastest of its tiles, timed when it is first launched; yields key -> tile."""
    fastest: dict[tuple, Any] = {}

    def time_all(key: tuple, candidates: list, launch: Callable[[Any], Any]) -> Any:
        if key not in fastest:
            fastest[key] = min(candidates, key=lambda candidate: _milliseconds(launch, candidate))
        return launch(fastest[key])

    with _choosing(time_all):
        yield fastest


@contextlib.contextmanager
def _choosing(chooser: Callable[[tuple, list, Callable[[Any], Any]], Any]) -> Iterator[None]:
    global _chooser
    _chooser = chooser
    try:
        yield
    finally:
        _chooser = None


def _milliseconds(launch: Callable[[Any], Any], candidate: Any) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(candidate), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")


def precision(dtype: torch.dtype) -> str:
    """Precision of float32 products: what `torch.backends.cuda.matmul` asks for, IEEE by default."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def operand(dtype: torch.dtype):
    """Type of the operands of `tl.dot`: the interpreter multiplies the bits of bfloat16, so it gets float32."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return tl.float32 if INTERPRETED else types[dtype]


def by_library(function: Callable[..., torch.Tensor], *operands: torch.Tensor | None) -> torch.Tensor:
    """function(*operands), which is PyTorch's and no kernel of ours: it only reads them, and returns a new contiguous
    tensor, whose memory nothing else uses."""
    recorder = RECORDER.get()
    return function(*operands) if recorder is None else recorder.call(function, operands)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor in another dtype, or itself."""
    return tensor if tensor.dtype == dtype else by_library(functools.partial(torch.Tensor.to, dtype=dtype), tensor)


def transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a.T @ b` of (M, N) and (M, K) in float32: a reduction over all tokens, which cuBLAS splits best."""
    return by_library(product_of_transposed, a, b)


def product_of_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.float().t() @ b.float()


def on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Inside: kernels go to the device of `x`, and autocast, whose rules `backends.py` has applied, is off."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    # Either takes as long as a launch, so that it is done only where it changes something.
    if elsewhere or torch.is_autocast_enabled(x.device.type):
        return _switched(x)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _switched(x: torch.Tensor) -> Iterator[None]:
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with device, torch.autocast(x.device.type, enabled=False):
        yield


def empty_nhwc(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised (B, C, H, W) tensor like `x` in channels_last memory."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def float32(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised float32 tensor on the device of `x`."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def empty_like_each(parameters: Sequence[torch.Tensor | None], wanted: Sequence[bool]) -> list[torch.Tensor | None]:
    """Uninitialised contiguous tensors like those parameters that there are and that are `wanted`, for their
    gradients."""
    return [
        torch.empty_like(parameter, memory_format=torch.contiguous_format) if parameter is not None and want else None
        for parameter, want in zip(parameters, wanted, strict=True)
    ]
