"""Which tile a kernel takes: what a user's own timings say, else the table of what was measured, else a rule.

The table holds what one H200 was fastest with (PoolFormer S12, 224 px, batch 256, bfloat16). A shape that it does not
have takes the tile of the nearest number of channels, if its rows are within a factor of eight. Otherwise the
first tile that a kernel's module names is taken: for few rows, which large tiles would not spread over the GPU, the
smallest instead.
"""

import functools
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from huggingface_hub import constants


logger = logging.getLogger(__name__)


class Tiles(NamedTuple):
    """Tile of a matrix product (rows, columns, depth), warps per program and depth of the load pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Bucket(int):
    """A number of rows, as the exponent of the power of two that it is at most."""


def bucket(rows: int) -> Bucket:
    """Rows to the next power of two: tiles are shared by nearby batch and image sizes."""
    return Bucket((rows - 1).bit_length())


# Kernel -> bits of a number in products -> channels -> bucket of rows -> tile.
Table = dict[str, dict[int, dict[int, dict[int, tuple[int, ...]]]]]


def _best(tiles: dict[int, tuple[int, ...]], rows: dict[int, int]) -> dict[int, dict[int, tuple[int, ...]]]:
    """Of halves: channels -> bucket of rows -> tile."""
    return {channels: {rows[channels]: tile} for channels, tile in tiles.items()}


# Buckets of rows of S12's stages at 224 px and batch 256.
STAGES = {64: 20, 128: 18, 320: 16, 512: 14}
# By the major number of the compute capability; of kernels that keep z for backward, by a name of their own.
MEASURED: dict[int, Table] = {
    9: {
        kernel: {16: _best(tiles, STAGES)}
        for kernel, tiles in {
            "channel_mlp": {64: (64, 64, 0, 4, 3), 128: (64, 64, 0, 4, 3)},
            "channel_mlp_saving": {64: (64, 64, 0, 4, 2), 128: (64, 64, 0, 4, 2)},
            "expand": {320: (128, 128, 64, 8, 3), 512: (128, 128, 64, 8, 3)},
            "expand_saving": {320: (128, 128, 32, 8, 4), 512: (128, 128, 64, 8, 3)},
            "contract": {320: (128, 64, 64, 4, 3), 512: (128, 128, 64, 8, 3)},
            "expand_backward": dict.fromkeys(STAGES, (64, 64, 64, 4, 3)),
            "contract_backward": {
                64: (128, 64, 64, 4, 3),
                128: (128, 128, 64, 8, 3),
                320: (128, 128, 64, 8, 3),
                512: (64, 128, 64, 8, 3),
            },
        }.items()
    },
}

# Fewer rows than this leave multiprocessors of a large GPU (132) idle with tiles of 128 rows.
FEW_ROWS = 12
NEAR = 3  # a factor of eight in rows


def order(key: tuple, candidates: list) -> list:
    """
    Candidates, the best known one first.

    Args:
        key: number of the device, name of the kernel, then its shape: see `launch.tuned`.
    """
    device, kernel, *shape = key
    bits, rows, channels = _place(shape)
    ranked = sorted(candidates, key=_size) if rows <= FEW_ROWS else list(candidates)
    # The arithmetic is a lower bound, so what it excludes cannot be launched.
    ranked.sort(key=lambda tile: _shared_bytes(tile, bits) > _shared_memory(device))
    for table in (_own(device), MEASURED.get(_capability(device)[0], {})):
        known = _nearest(table.get(kernel, {}).get(bits, {}), channels, rows)
        found = next((tile for tile in candidates if tuple(tile) == known), None)
        if found is not None:
            return [found, *(tile for tile in ranked if tile != found)]
    return ranked


def entry(key: Sequence[Any]) -> tuple[str, int, int, int]:
    """Where a table has the tile of a key of `launch.tuned`, without its device: kernel, bits, channels, rows."""
    kernel, *shape = key
    bits, rows, channels = _place(shape)
    return kernel, bits, channels, rows


def _place(shape: Sequence[Any]) -> tuple[int, int, int]:
    """Bits of a number in products, bucket of rows, and channels."""
    bits = [8 * value.itemsize for value in shape if isinstance(value, torch.dtype)][-1]
    rows = next(value for value in shape if isinstance(value, Bucket))
    return bits, rows, next(value for value in shape if type(value) is int)


def _nearest(known: dict[int, dict[int, Any]], channels: int, rows: int) -> tuple[int, ...] | None:
    near = {
        (abs(math.log2(width / channels)), abs(number - rows)): tuple(tile)
        for width, by_rows in known.items()
        for number, tile in by_rows.items()
        if abs(number - rows) <= NEAR
    }
    return near[min(near)] if near else None


def _size(tile: Any) -> int:
    """Entries of the result of a program."""
    return tile.rows * tile.columns if isinstance(tile, Tiles) else math.prod(tile[:-1])


def _shared_bytes(tile: Any, bits: int) -> int:
    """What the load pipeline of a product takes; other kernels take none to speak of."""
    if not isinstance(tile, Tiles):
        return 0
    return (tile.stages - 1) * (tile.rows + tile.columns) * tile.depth * bits // 8


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes that a program may have."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def _capability(device: int) -> tuple[int, int]:
    number = triton.runtime.driver.active.get_current_target().arch
    return divmod(number, 10) if isinstance(number, int) else (0, 0)  # AMD's have names


def cache_file(device: int = 0) -> Path:
    """Where a user's timings are kept, for a kind of GPU and the versions that they hold for."""
    names = (torch.cuda.get_device_name(device), torch.__version__, triton.__version__)
    name = "-".join(re.sub(r"[^\w.+]+", "_", part) for part in names)
    return Path(constants.HF_HOME) / "hf-poolformer" / f"tiles-{name}.json"


@functools.cache
def _own(device: int) -> Table:
    if not torch.cuda.is_available():  # kernels are compiled for a GPU that is elsewhere
        return {}
    return read(cache_file(device))


def read(path: Path) -> Table:
    """The table in a file, empty where there is none, or none that can be read, which is said."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(kernel): {
                int(bits): {
                    int(channels): {int(rows): tuple(map(int, tile)) for rows, tile in by_rows.items()}
                    for channels, by_rows in by_channels.items()
                }
                for bits, by_channels in by_bits.items()
            }
            for kernel, by_bits in stored.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is left aside, it holds no tiles (%s)", path, type(error).__name__)
        return {}
