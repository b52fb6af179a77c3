"""Parts of many images of all sizes, resized together on a device, in a number of launches that does not grow with
their number.

A pixel of the result is a weighted sum of pixels along one axis, of such sums along the other. `embedding_bag` takes
weighted sums of rows of a table, each of as many rows as it likes, and needs no memory for what it adds up. So the
images are cut into tiles of TILE x TILE pixels, and these make a table twice:

    across  a row of the table is a column of TILE pixels, in a strip of tiles that lie side by side in an image
    down    a row of the table is a row of pixels of an image that has its final width

What the tiles at the right and lower edges hold beyond their image has no weight. The weights are those of
`interpolate` with `antialias=True`, which are Pillow's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from .operations import upload


TILE = 32
# As many pixels as are resized at once, by `Part.pixels`: a table takes 12 bytes for each of them, 400 MB, and nothing
# that is made on the way takes more. Two tables and what belongs to them, at most 26 bytes for each, 870 MB, exist at
# the same time.
MAX_PIXELS = 1 << 25
# Filters as polynomials of the distance, the highest power first, with a column for each whole distance: the bilinear
# one, then Keys' bicubic one with a = -0.5, each with nothing behind its end.
KERNELS = np.array(
    [[0, 0, 0, 1.5, -0.5, 0], [0, 0, 0, -2.5, 2.5, 0], [-1, 0, 0, 0, -4, 0], [1, 0, 0, 1, 2, 0]], dtype=np.float32
)


class Part(NamedTuple):
    """What becomes of one image. All in pixels.

    Attributes:
        top, left, height, width: the part of it that is resized.
        resized: height and width that it gets.
        start: top and left of what is kept of that.
        bicubic: or bilinear.
    """

    top: int
    left: int
    height: int
    width: int
    resized: tuple[int, int]
    start: tuple[int, int] = (0, 0)
    bicubic: bool = True

    def pixels(self, height: int, width: int) -> int:
        """As many as each table, and the result of this size, has at most of it."""
        return max(TILE * tiles(self.height), height) * max(TILE * tiles(self.width), width)


def tiles(length: Any) -> Any:
    """How many it takes for so many pixels; of a number or an array."""
    return -(-length // TILE)


def portions(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges that add up to at most `limit`, or consist of one element."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            yield start, index
            start, total = index, 0
        total += size
    if sizes:
        yield start, len(sizes)


class Deal:
    """The numbers from 0 on, dealt out one behind the other.

    Args:
        counts: how many each owner gets.
    """

    def __init__(self, counts: np.ndarray):
        self.ends = counts.cumsum()
        self.starts, self.total = self.ends - counts, int(self.ends[-1])


def resize_parts(
    images: Sequence[torch.Tensor], parts: Sequence[Part], height: int, width: int, stepwise: bool = False
) -> torch.Tensor:
    """Resized parts of images, antialiased: uint8 (B, 3, height, width), with their channels last in memory.

    As many launches for one image as for a hundred, but for copies of those whose memory is not in the order of their
    axes.

    Args:
        images: uint8 (3, H, W), on one device. The caller sees to it that the parts are not too many at once.
        height, width: of what is kept of the resized parts.
        stepwise: as Pillow does it, rounded to 8 bits after either axis, not in floats up to the end.
    """
    number = len(images)
    shapes, boxes = np.array([image.shape[1:] for image in images]), np.array([part[:4] for part in parts])
    row_lengths, areas = shapes[:, 1], shapes.prod(1)

    # The axes of the images: across for all of them, then down for all.
    lengths = np.concatenate([boxes[:, 3], boxes[:, 2]])
    resized, starts = (
        np.array([getattr(part, name)[::-1] for part in parts]).T.reshape(-1) for name in ("resized", "start")
    )
    bicubic = np.tile([part.bicubic for part in parts], 2)
    scales = lengths.astype(np.float32) / resized.astype(np.float32)
    stretches = scales.clip(min=1)  # of the filter, which must not miss a pixel
    supports = np.where(bicubic, 2, 1) * stretches
    taps = np.ceil(2 * supports).astype(np.int64)
    results = np.repeat([width, height], number)
    weighed, made = Deal(results * taps), Deal(results)

    # Strips, each of which is resized across by itself, with the weights of its image.
    strips = Deal(tiles(boxes[:, 2]))
    image = np.arange(number).repeat(tiles(boxes[:, 2]))
    tops = boxes[image, 0] + TILE * (np.arange(strips.total) - strips.starts[image])
    tiled, added = Deal(tiles(boxes[image, 3])), Deal(width * taps[image])
    corners = 3 * Deal(areas).starts[image] + tops * row_lengths[image] + boxes[image, 1]

    arrays = [
        np.stack([weighed.starts, taps, made.starts, np.append(0 * strips.starts, TILE * strips.starts), 3 * bicubic]),
        np.stack([(starts + 0.5) * scales - 0.5, scales, supports, 1 / stretches, lengths - 1]).astype(np.float32),
        KERNELS,
        np.stack([corners - TILE * tiled.starts, row_lengths[image], areas[image]]),
        np.stack([weighed.starts[image] - added.starts, TILE * tiled.starts]),
        np.stack([added.starts, taps[image]]),
        *(deal.ends for deal in (weighed, tiled, added)),
    ]
    axes, filters, kernels, lines, copies, first_bags, *ends = upload(arrays, images[0].device)
    most = max(weighed.total, tiled.total, added.total, height, width, TILE)
    numbers = torch.arange(most, device=axes.device)

    def bags(of: torch.Tensor, count: int) -> torch.Tensor:
        """Where the taps of `count` results begin, from the first tap and the number of taps for each."""
        return torch.addcmul(of[0, :, None], of[1, :, None], numbers[:count]).view(-1)

    across, down = bags(axes[:, :number], width), bags(axes[:, number:], height)
    weights, rows = weigh(axes, filters, kernels, numbers[: weighed.total], ends[0], torch.cat([across, down]))
    table = columns_of_tiles(images, lines, numbers, tiled.total, ends[1])
    tap = numbers[: added.total]
    tap_shift, row = copies.index_select(1, torch.searchsorted(ends[2], tap, right=True))
    tap = tap_shift.add_(tap)
    table = embedding_bag(
        rows.index_select(0, tap).add_(row),
        table,
        bags(first_bags, width),
        mode="sum",
        per_sample_weights=weights.index_select(0, tap),
    )
    del tap, tap_shift, row
    if stepwise:
        table = table.clamp_(0, 255).round_()
    table = table.view(-1, width, TILE, 3).transpose(1, 2).reshape(-1, width * 3)
    first = int(weighed.starts[number])
    table = embedding_bag(rows[first:], table, down - first, mode="sum", per_sample_weights=weights[first:])
    return table.clamp_(0, 255).round_().to(torch.uint8).view(number, height, width, 3).permute(0, 3, 1, 2)


def weigh(
    axes: torch.Tensor,
    filters: torch.Tensor,
    kernels: torch.Tensor,
    taps: torch.Tensor,
    ends: torch.Tensor,
    bags: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of each tap, float32 (taps,), and the row of the table that it takes, int64.

    Args:
        axes: int64 (5, axes): the first tap, how many make a result, the number of the first result, the first row,
            and the first column of `kernels`.
        filters: float32 (5, axes): the centre of the first result, how far it is from one to the next, how far the
            filter reaches, the distance for which its kernel has 1, and the last pixel.
        kernels: float32 (4, columns), as KERNELS.
        taps: int64, their numbers.
        ends: of the taps of each axis.
        bags: the first tap of each result.
    """
    axis = torch.searchsorted(ends, taps, right=True)
    first, count, result, row, kernel = axes.index_select(1, axis)
    centre, scale, support, unit, last = filters.index_select(1, axis)
    tap = taps - first
    place = tap // count
    centre = centre.addcmul_(place, scale)
    pixel = (centre - support).ceil_().add_(tap.remainder_(count))
    distance = (pixel - centre).abs_().mul_(unit)
    factors = kernels.index_select(1, distance.long().clamp_(max=2).add_(kernel))
    weights = factors[0]
    for factor in factors[1:]:
        weights = weights.mul_(distance).add_(factor)
    inside = pixel.clamp(min=0).minimum(last)
    weights = weights.mul_(pixel == inside)
    sums = embedding_bag(taps, weights[:, None], bags, mode="sum")[:, 0]
    return weights.div_(sums.index_select(0, place.add_(result))), inside.long().add_(row)


def columns_of_tiles(
    images: Sequence[torch.Tensor], lines: torch.Tensor, numbers: torch.Tensor, total: int, ends: torch.Tensor
) -> torch.Tensor:
    """The table for resizing across, float32 (total * TILE, TILE * 3).

    Args:
        lines: int64 (3, strips): where tile 0 would begin among the pixels of all images, if the tiles before those of
            a strip lay in its line, and how far it is from row to row and from channel to channel.
        numbers: int64, from 0 on.
        total: how many tiles there are.
        ends: of the tiles of each strip.
    """
    # Behind the last image its lowest tiles may go on.
    pad = TILE * (max(image.shape[2] for image in images) + 1)
    pixels = torch.cat([*(image.reshape(-1) for image in images), images[0].new_empty(pad)])
    tile = numbers[:total]
    first, row, channel = lines.index_select(1, torch.searchsorted(ends, tile, right=True))[..., None, None]
    starts = torch.addcmul(first.add_(tile[:, None, None], alpha=TILE), row, numbers[:TILE, None])
    starts = torch.addcmul(starts, channel, numbers[:3])
    made = pixels.unfold(0, TILE, 1).index_select(0, starts.view(-1)).view(total, TILE, 3, TILE)
    columns = made.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return columns.view(total * TILE, TILE * 3)
