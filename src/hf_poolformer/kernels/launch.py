"""How kernels are launched: tile sizes, precision of products, current device, memory format."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources


# With TRITON_INTERPRET=1 kernels run in Python, on CPU tensors. Triton reads it whenever something is decorated, its
# own functions included, so it had to be set when Triton was imported.
INTERPRETED = not isinstance(tl.sum, triton.runtime.JITFunction)
# Of every launch: multiply-adds in one rounding. Triton's default, of which 3.9 warns that 3.10 will change it.
FUSION = {"enable_fp_fusion": True}


class Tiles(NamedTuple):
    """Tile of a matrix product (rows, columns, depth), warps per program and depth of the load pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_chosen: dict[tuple, Any] = {}


def tuned(key: tuple, candidates: list, launch: Callable[[Any], Any]) -> Any:
    """
    `launch(candidate)` with the fastest of `candidates`, timed once per `key` in this process.

    `launch` must be pure: it allocates what it returns. Candidates that need more shared memory than there is are left
    out. Nothing is timed under the interpreter (first candidate), while a CUDA graph is captured or with
    HF_POOLFORMER_AUTOTUNE=0 (first candidate that fits), which also makes the order of summation, and so the last
    bits of a result, independent of timing.
    """
    if INTERPRETED:
        return launch(candidates[0])
    key = (torch.cuda.current_device(), *key)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing() or os.environ.get("HF_POOLFORMER_AUTOTUNE") == "0":
            return _first_that_fits(candidates, launch)
        _chosen[key] = min(candidates, key=lambda candidate: _milliseconds(launch, candidate))
    return launch(_chosen[key])


def _first_that_fits(candidates: list, launch: Callable[[Any], Any]) -> Any:
    for candidate in candidates[:-1]:
        try:
            return launch(candidate)
        except OutOfResources:
            continue
    return launch(candidates[-1])


def _milliseconds(launch: Callable[[Any], Any], candidate: Any) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(candidate), warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")


def bucket(rows: int) -> int:
    """Rows to the next power of two: tile choices are shared by nearby batch and image sizes."""
    return (rows - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """Precision of float32 products: what `torch.backends.cuda.matmul` asks for, IEEE by default."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def operand(dtype: torch.dtype):
    """Type of the operands of `tl.dot`: the interpreter multiplies the bits of bfloat16, so it gets float32."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return tl.float32 if INTERPRETED else types[dtype]


def transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a.T @ b` of (M, N) and (M, K) in float32: a reduction over all tokens, which cuBLAS splits best."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.float().t() @ b.float()


@contextlib.contextmanager
def on(x: torch.Tensor):
    """Inside: kernels go to the device of `x`, and autocast, whose rules `backends.py` has applied, is off."""
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with device, torch.autocast(x.device.type, enabled=False):
        yield


def empty_nhwc(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Uninitialised (B, C, H, W) tensor like `x` in channels_last memory."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def float32(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised float32 tensor on the device of `x`."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)
