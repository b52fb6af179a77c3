"""A whole stage without gradients as one registered operation, for graphs.

A graph calls each operation through PyTorch's dispatcher, which for one written in Python takes longer than launching
its kernels. Here it does so once per stage, and what happens within are the launches of inference.py, recorded.

Graphs are kept on disk and read by other processes. So what the branches are is written into the graph itself, as a
Python literal: [('pool_mixer', {'pool_size': 3, 'eps': 0.0, 'weight': ..., 'res_scale': None})], with an ellipsis for
each tensor, and 0.0 for each float. Tensors and floats come in that order.
"""

import ast
import functools
from typing import Any

import torch

from .ahead import rehearse
from .inference import run, split
from .launch import empty_nhwc, precision
from .recordings import Recorded
from .registration import register


class Stage:
    """What is known of stages with these branches. No tensors, so models of one architecture share it."""

    def __init__(self, branches: str):
        self.branches = ast.literal_eval(branches)
        self.recorded = Recorded(run)
        self.rehearsed: set[tuple] = set()


# As many as a few models have stages.
@functools.lru_cache(64)
def stage_of(branches: str) -> Stage:
    return Stage(branches)


def infer_stage(
    x: torch.Tensor, tensors: list[torch.Tensor], numbers: list[float], branches: str, dtype: torch.dtype
) -> torch.Tensor:
    """x (B, C, H, W) in channels_last memory through branches, whose products have this dtype, to the same."""
    stage, tensors_left, numbers_left = stage_of(branches), iter(tensors), iter(numbers)

    def filled(value: Any) -> Any:
        return next(tensors_left) if value is ... else next(numbers_left) if isinstance(value, float) else value

    found = [(name, {key: filled(value) for key, value in arguments.items()}) for name, arguments in stage.branches]
    x = x.contiguous(memory_format=torch.channels_last)
    weights, kind = split(found)
    everything = [x, None, *weights]
    # All its kernels side by side; eager models are seen to as a whole (ahead.py).
    rehearse(lambda: run(everything, found, dtype), stage.rehearsed, (x.shape, x.dtype, x.device, dtype))
    return stage.recorded(everything, found, dtype, kind=(dtype, precision(dtype), *kind))[0]


def _fake(
    x: torch.Tensor, tensors: list[torch.Tensor], numbers: list[float], branches: str, dtype: torch.dtype
) -> torch.Tensor:
    return empty_nhwc(x)


register("infer_stage", infer_stage, _fake)
