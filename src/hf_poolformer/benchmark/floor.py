"""The physical floor: FLOP and bytes that a model needs, against what this machine can do.

Counted as if each embedding, mixer and MLP were one operation that reads its input once and writes its output once: a
mixer and an MLP move two activations each, so a block four (unfused products with fused epilogues move thirteen, the
eager code about 39). FLOP are those of convolutions and matrix products, two per multiply-add. The floor of a model is
the sum over its operations of the longer of arithmetic and memory traffic at the measured ceilings; caches may beat
the traffic's part of it, nothing the arithmetic's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..foundation.timing import synchronize
from .case import DTYPES, Case


@dataclass(frozen=True)
class FusedOperation:
    """FLOP and bytes of one fused operation on a whole batch."""

    name: str
    flop: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """What the device does at most: FLOP/s in a large matrix product, bytes/s in a stream triad."""

    flop_per_second: float
    bytes_per_second: float


def operations(case: Case) -> Iterator[FusedOperation]:
    """The fused operations of one step, in order."""
    config, itemsize, batch = case.config(), DTYPES[case.dtype].itemsize, case.batch_size
    training = case.mode == "train"
    side, channels = case.image_size, config.num_channels
    before, parameters = batch * channels * side**2, 0
    for stage, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes, strict=True)):
        kernel, stride, padding = config.patch_sizes[stage], config.strides[stage], config.padding[stage]
        side = (side + 2 * padding - kernel) // stride + 1
        size, weights = batch * width * side**2, width * channels * kernel**2
        parameters += weights + width
        flop = 2 * size * channels * kernel**2
        # Backward: a product for the input's gradient, which images have none of, and one for the weights'.
        passes = 1 + training * (1 if stage == 0 else 2)
        moved = before + size + training * (before * (1 if stage == 0 else 2) + size)
        yield FusedOperation(f"stage {stage + 1} embedding", flop * passes, (moved + weights * passes) * itemsize)
        inner = int(width * config.mlp_ratio)
        for _ in range(depth):
            # Backward reads the gradient and the saved input and writes a gradient.
            moved = size * (2 + 3 * training)
            yield FusedOperation("mixer", 0, moved * itemsize)
            weights = 2 * width * inner
            passes = 1 + 2 * training
            flop = 2 * weights * batch * side**2
            yield FusedOperation("mlp", flop * passes, (moved + weights * passes) * itemsize)
            parameters += weights + inner + 7 * width
        before, channels = size, width
    weights = channels * config.num_labels
    parameters += weights + config.num_labels + 2 * channels
    passes = 1 + 2 * training
    yield FusedOperation("head", 2 * batch * weights * passes, (before * passes + weights * passes) * itemsize)
    if training:
        # AdamW reads parameter, gradient and two moments, and writes all but the gradient.
        yield FusedOperation("optimiser", 0, 7 * parameters * itemsize)


def floor_seconds(case: Case, ceilings: Ceilings) -> float:
    """Seconds that one step takes at least."""
    return sum(
        max(operation.flop / ceilings.flop_per_second, operation.bytes / ceilings.bytes_per_second)
        for operation in operations(case)
    )


def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """Best of several: a square matrix product in `dtype`, and a triad `a = b + s * c` of arrays beyond any cache."""
    on_gpu = device != "cpu"
    side = 8192 if on_gpu else 1536
    left, right = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    product = _best(lambda: left @ right, device, rounds=20 if on_gpu else 6)
    elements = (1 << 28) if on_gpu else (1 << 24)
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))
    triad = _best(lambda: torch.add(b, c, alpha=3.0, out=a), device, rounds=20 if on_gpu else 8)
    return Ceilings(2 * side**3 / product, 3 * 4 * elements / triad)


def _best(step: Callable[[], object], device: str, rounds: int) -> float:
    best = math.inf
    for index in range(rounds + 2):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if index >= 2:
            best = min(best, time.perf_counter() - start)
    return best
