"""Kernels compiled side by side before a model's first step, rather than one after the other in it.

A launch of a kernel that is not there yet, in a thread that collects (`compiling_aside`), launches nothing: another
thread compiles it. So whatever code launches kernels is also the code that says which of them are needed, for which
arguments, and the launches that follow find exactly these. What such code returns is memory that nobody wrote.
"""

import contextlib
import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
from torch import nn
from torch.utils._pytree import tree_leaves
from triton.runtime import driver

from .launch import INTERPRETED


logger = logging.getLogger(__name__)

# Of the thread that collects: (kernel, key) -> its compilation.
_collected: ContextVar[dict[tuple, Future] | None] = ContextVar("collected", default=None)
_one_at_a_time = threading.Lock()
# Encoder -> the circumstances in which its kernels have been seen to.
_seen: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()
# A model that is given images of ever other sizes would spend more on looking than on compiling.
MOST = 8
# Kernels that are read from Triton's cache are there sooner.
SILENT_SECONDS = 1.5


def compile_ahead(forward: Callable[..., Any], encoder: nn.Module, pixel_values: torch.Tensor) -> int:
    """
    Compiles the kernels that `forward(encoder, pixel_values)` needs, and those of its backward in training, all at
    once. Nothing of the encoder changes, nor do random numbers. Each (shape, dtype, mode) is looked at once.

    Args:
        pixel_values: (B, C, H, W).

    Returns:
        how many had to be compiled, or read from Triton's cache; 0 also where this failed, which is said and no more.
    """
    training = encoder.training and torch.is_grad_enabled()
    device = pixel_values.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    circumstances = (pixel_values.shape, pixel_values.dtype, pixel_values.device, training, autocast)
    devices = [pixel_values.device] if pixel_values.is_cuda else []

    def run() -> None:
        if not all(map(_is_whole, encoder.parameters())):
            return
        # A copy: batch norms count, hooks of gradients wait.
        replica = copy.deepcopy(encoder)
        for module in replica.modules():
            # Needs no other kernels, but may refuse autograd.grad.
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        with torch.random.fork_rng(devices):
            outputs = forward(replica, pixel_values.detach())
            if training:
                differentiate(outputs, list(replica.parameters()))

    return rehearse(run, _seen.setdefault(encoder, set()), circumstances)


def rehearse(run: Callable[[], Any], seen: set[Hashable], circumstances: Hashable) -> int:
    """
    Compiles the kernels that `run()` launches, all at once, the first time in these circumstances, which it notes in
    `seen`; what is compiled already is launched. A failure of `run` is said and no more.

    Returns:
        how many had to be compiled, or read from Triton's cache.
    """
    if INTERPRETED or circumstances in seen or len(seen) >= MOST:
        return 0
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return 0
    seen.add(circumstances)
    try:
        with compiling_aside() as kernels:
            run()
    except Exception as error:  # such as memory for a second model that is not there: nobody depends on this
        logger.warning("Kernels are compiled one by one, as they are needed: %s", str(error).partition("\n")[0])
        return 0
    return len(kernels)


def _is_whole(parameter: nn.Parameter) -> bool:
    """Whether it is neither a shard of a larger one nor computed from others."""
    return type(parameter) is nn.Parameter


def differentiate(outputs: Any, parameters: list[nn.Parameter]) -> None:
    """Backward of whatever tensors are in `outputs`, in this thread, leaving no gradients."""
    outputs = [each for each in tree_leaves(outputs) if isinstance(each, torch.Tensor) and each.requires_grad]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if outputs and parameters:
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(outputs, parameters, [torch.ones_like(each) for each in outputs], allow_unused=True)


@contextlib.contextmanager
def compiling_aside() -> Iterator[dict[tuple, Future]]:
    """
    Inside, in this thread, kernels that are not compiled yet are compiled by other threads and not launched; yields
    them. At the end all have been compiled. A kernel that cannot be compiled is left to the launch that needs it.

    One thread at a time: another that comes meanwhile finds what this one compiled.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runtime = triton.knobs.runtime
    collected: dict[tuple, Future] = {}
    with _one_at_a_time, ThreadPoolExecutor(threads, "compile") as pool:
        before, start = runtime.jit_cache_hook, time.monotonic()

        def hook(*, key: str, fn: Any, compile: dict[str, Any], **rest: Any) -> bool | None:
            """Triton asks it before it compiles; True is for: somebody else does."""
            mine = _collected.get()
            if mine is None:
                return before(key=key, fn=fn, compile=compile, **rest) if before is not None else None
            if (fn.jit_function, key) not in mine:
                mine[fn.jit_function, key] = pool.submit(
                    _compile, fn.jit_function, compile["specialization_data"], compile["device"]
                )
            return True

        token = _collected.set(collected)
        runtime.jit_cache_hook = hook
        try:
            yield collected
        finally:
            _collected.reset(token)
            waiting = wait(collected.values(), max(0.0, start + SILENT_SECONDS - time.monotonic())).not_done
            if waiting:
                logger.warning(
                    "Compiling %d kernels for this GPU on %d threads; Triton keeps them for the next time.",
                    len(collected),
                    threads,
                )
            wait(collected.values())
            runtime.jit_cache_hook = before
            if waiting:
                logger.warning("Compiled in %.0f s.", time.monotonic() - start)


def _compile(kernel: Any, specialization: str, device: int) -> None:
    driver.active.set_current_device(device)  # which each thread has its own of
    kernel.preload(specialization)
