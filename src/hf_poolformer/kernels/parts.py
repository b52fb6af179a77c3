"""What kernels of several modules are made of: Triton functions, and how many programs share out the tokens."""

import triton
import triton.language as tl

from .launch import INTERPRETED


# Programs wanted where each takes several tiles, several per multiprocessor; a constant, so that sums do not depend on
# the device.
PROGRAMS = 4 if INTERPRETED else 1056


@triton.jit
def vector(pointer, index, inside, default: tl.constexpr):
    """Entries of an optional vector as float32."""
    if pointer is None:
        values = tl.full(index.shape, default, tl.float32)
    else:
        values = tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def scalar(pointer, default: tl.constexpr):
    """A learned scalar, or the constant that stands for it."""
    return default if pointer is None else tl.load(pointer).to(tl.float32)


@triton.jit
def store_if_wanted(target, place, values, inside):
    """Stores values in the dtype of the target, if there is one."""
    if target is not None:
        tl.store(target + place, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def tile_of(M, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """
    A program's tile of (M, N): its first row, as 32 and as 64 bits, rows from there on, which of them there are, which
    block of columns it has, and these. Neighbouring programs have the same rows.
    """
    blocks: tl.constexpr = tl.cdiv(N, COLUMNS)
    block = tl.program_id(0) % blocks
    first = (tl.program_id(0) // blocks) * ROWS
    start = first.to(tl.int64)
    row = tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    return first, start, row, first + row < M, block, column
