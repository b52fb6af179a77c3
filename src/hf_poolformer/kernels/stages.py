"""A whole stage without gradients as one registered operation, for graphs.

A graph calls each operation through PyTorch's dispatcher, which for one written in Python takes longer than launching
its kernels. Here it does so once per stage, and what happens within are the launches of inference.py, recorded.

Graphs are kept on disk and read by other processes. So what the branches are is written into the graph itself, as a
Python literal: [('pool_mixer', {'pool_size': 3, 'weight': ..., 'res_scale': None})], with an ellipsis for each tensor.
Tensors come in that order.
"""

import ast
import functools

import torch

from .ahead import compiling_aside
from .inference import Branch, run, split
from .launch import INTERPRETED, empty_nhwc, precision
from .recordings import Recorded
from .registration import register


# By the text of the branches. Recordings hold no tensors, so models of one architecture share them.
_recorded: dict[str, Recorded] = {}
_compiled: set[tuple] = set()


@functools.lru_cache
def read_branches(text: str) -> list[Branch]:
    """Branches with an ellipsis in place of each tensor."""
    return ast.literal_eval(text)


def infer_stage(x: torch.Tensor, tensors: list[torch.Tensor], branches: str, dtype: torch.dtype) -> torch.Tensor:
    """x (B, C, H, W) in channels_last memory through branches, whose products have this dtype, to the same."""
    given = iter(tensors)
    found = [
        (name, {key: next(given) if value is ... else value for key, value in arguments.items()})
        for name, arguments in read_branches(branches)
    ]
    x = x.contiguous(memory_format=torch.channels_last)
    weights, kind = split(found)
    kind = dtype, precision(dtype), *kind
    everything = [x, None, *weights]
    _compile_ahead(everything, found, dtype, (branches, x.shape, x.dtype, x.device, dtype))
    return _recorded.setdefault(branches, Recorded(run))(everything, found, dtype, kind=kind)[0]


def _compile_ahead(given: list[torch.Tensor | None], branches: list[Branch], dtype: torch.dtype, key: tuple) -> None:
    """Compiles all kernels of a stage side by side, once; eager models are seen to as a whole (ahead.py)."""
    if INTERPRETED or key in _compiled or torch.cuda.is_current_stream_capturing():
        return
    _compiled.add(key)
    with compiling_aside():
        run(given, branches, dtype)


def _fake(x: torch.Tensor, tensors: list[torch.Tensor], branches: str, dtype: torch.dtype) -> torch.Tensor:
    return empty_nhwc(x)


register("infer_stage", infer_stage, _fake)
