"""Single rows of a split once more, by their positions: for those who look at a few images after seeing all.

The position of a row is its place in the stream of its split: `ImageDataset.stream`, as it is iterated over, row 0
first. Whatever workers and processes read a split, a row has the same position. In Parquet, tars and saved datasets
this is the stored order; the files of a folder have a fixed order of their own, in which classes are mixed.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from .columns import ImageDataset
from .decoding import BrokenImage, EncodedImage
from .stream import NO_ROW, DamagedShard, Piece, Shards


def first_positions(num_shards: int, ends: Sequence[Mapping[int, int]]) -> list[int]:
    """The position of the first row of each shard, and behind them the number of all rows.

    Args:
        ends: `ImageLoader.ends` of every process.
    """
    rows = [max(own.get(shard, 0) for own in ends) for shard in range(num_shards)]
    return [0, *itertools.accumulate(rows)]


def pictures_of(dataset: ImageDataset, positions: Collection[int], side: int) -> dict[int, Image.Image]:
    """The images at these positions, upright, RGB, made smaller so that no side is longer than `side`, in pixels.

    Reads no further than it must: where `dataset.shard_rows` tells in which shard a row lies, only the shards with
    such rows, up to the last of these; else the stream up to the last position. One image is held at its full size at
    a time.

    Returns:
        position -> picture; without those that cannot be decoded, or are not there.
    """
    pictures: dict[int, Image.Image] = {}
    for position, source in sources_of(dataset, positions):
        try:
            with EncodedImage(source, token=dataset.token) as encoded:
                longest = max(encoded.height, encoded.width)
                reduction = next(factor for factor in (8, 4, 2, 1) if longest >= 2 * factor * side or factor == 1)
                picture = encoded.decode(reduction)[0]
        except BrokenImage:
            continue
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        pictures[position] = picture
    return pictures


def sources_of(dataset: ImageDataset, positions: Collection[int]) -> Iterator[tuple[int, Any]]:
    """The undecoded images at these positions, in ascending order; without those that are not there."""
    wanted = sorted(set(positions))
    stream = dataset.stream.select_columns([dataset.image_column])
    divided = _is_divided(stream, dataset.shard_rows)
    shards = Shards(stream, bool(divided))
    first = 0
    for shard in range(shards.num_shards):
        if not wanted or wanted[-1] < first:
            return
        known = None if divided is None else dataset.shard_rows[shard]
        mine = wanted[: bisect.bisect_left(wanted, first + known)] if known is not None else wanted
        wanted = wanted[len(mine) :]
        if known is not None:
            if mine:
                piece = Piece(shard, start=NO_ROW, extra=tuple(position - first for position in mine))
                yield from ((first + index, image) for index, image in _images(shards, piece, dataset))
            first += known
            continue
        rows, wanted, mine = 0, [], set(mine)
        for index, image in _images(shards, Piece(shard), dataset):
            rows = index + 1
            if first + index in mine:
                mine.discard(first + index)
                yield first + index, image
                if not mine:
                    return
        first, wanted = first + rows, sorted(mine)


def _images(shards: Shards, piece: Piece, dataset: ImageDataset) -> Iterator[tuple[int, Any]]:
    """Numbers of rows in their shard, and their images; of a damaged shard what comes before the damage."""
    try:
        for row in shards.rows(piece):
            yield row.index, row.values[dataset.image_column]
    except DamagedShard:
        return


def _is_divided(stream: Any, shard_rows: Sequence[int] | None) -> bool | None:
    """Whether these are the rows of the shards of a divided stream; None where they tell nothing."""
    if shard_rows is None:
        return None
    fitting = (divided for divided in (False, True) if Shards(stream, divided).num_shards == len(shard_rows))
    return next(fitting, None)
