"""Memory that is used up, as PyTorch and Python say it."""

from __future__ import annotations

import re

import torch


# What is no exception of its own: the CPU's allocator, drivers and libraries of GPUs.
_SAID = r"not enough memory|can't allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has no memory left for what was asked for."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and re.search(_SAID, str(error), re.IGNORECASE) is not None
