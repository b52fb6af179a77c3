"""How often each image of a stream comes in an epoch, so that rare classes are seen more and frequent ones less.

An image of class c comes `r` times in an epoch on average, its repeat factor, and there are as many images in an epoch
as without. In epoch e it comes `floor((e + 1) * r + u) - floor(e * r + u)` times; `u` is uniform in [0, 1), and a
function of the seed and of where the image is stored alone. So an image that an epoch leaves out comes in one of the
next `1 / r`; nobody has to remember anything; and a run that was interrupted, or is divided among other processes,
goes on as planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..foundation.errors import UserError
from .columns import ImageDataset, field_of
from .decoding import BrokenImage


if TYPE_CHECKING:
    from .stream import Row


# An image that comes more often than so in an epoch is learnt by heart, whatever is done to it.
MOST_REPEATS = 1000
_BITS = (1 << 64) - 1
_KNOWN = 100_000  # factors of stored labels are kept, for so many different labels


def repeat_factors(counts: Sequence[int], power: float = 1.0, images: int | None = None) -> tuple[float, ...]:
    """How often an image comes in an epoch, on average, for each class that it has.

    In proportion to `(1 / count) ** power`: with 1 all classes come equally often; with 0 they come as they do, if an
    image has one class each. The number of images in an epoch stays what it is. A class without images has the factor
    1, which nothing uses.

    Args:
        counts: images that have each class, by index.
        images: that have any class; by default as many as they have classes, one each.
    """
    raw = [(1 / count) ** power if count else 0.0 for count in counts]
    drawn = sum(count * factor for count, factor in zip(counts, raw, strict=True))
    share = (sum(counts) if images is None else images) / drawn
    return tuple(factor * share if count else 1.0 for count, factor in zip(counts, raw, strict=True))


class Repeats:
    """How often the rows of a dataset come, told by their labels, which are read undecoded.

    A row with several classes comes as often as all of them make it: it is drawn by way of each (class-aware sampling,
    as arXiv 2007.09654 has it for several labels). So the length of an epoch follows from the counts of the classes.
    A row with none comes once, and so does one whose label cannot be read: whoever decodes it says so.

    Args:
        factors: of each class, by the indices of the dataset.

    Attributes:
        most: times that a row can come in one epoch.

    Raises:
        UserError: a class is so rare that its images would come more often than is any use.
    """

    def __init__(self, dataset: ImageDataset, factors: Sequence[float]):
        most = math.ceil(max(factors))
        if most > MOST_REPEATS:
            rarest = dataset.classes.names[factors.index(max(factors))]
            raise UserError(
                f"an image of the class {rarest} would come {most} times in an epoch, so rare it is: lower "
                "--sampling_power, to 0.5 say, or leave out the class."
            )
        several = dataset.problem_type == "multi_label_classification"
        self.most = min(math.ceil(sum(factors)) if several else most, MOST_REPEATS)
        self._dataset, self._factors = dataset, np.array(factors)
        self._known: dict[Any, float] = {}

    def draws(self, seed: int, epoch: int) -> Callable[[Row], int]:
        """How often each row comes in this epoch."""
        of_shards: dict[int, int] = {}

        def copies(row: Row) -> int:
            shard = of_shards.get(row.shard)
            if shard is None:
                shard = of_shards[row.shard] = mixed(seed, row.shard)
            factor, place = self._factor(row.values), (mixed(shard, row.index) >> 11) * 2.0**-53
            return min(int((epoch + 1) * factor + place) - int(epoch * factor + place), self.most)

        return copies

    def _factor(self, row: Mapping[str, Any]) -> float:
        columns = self._dataset.label_columns
        stored = field_of(row, columns[0]) if len(columns) == 1 else tuple(field_of(row, column) for column in columns)
        if isinstance(stored, list):
            stored = tuple(stored)
        factor = self._known.get(stored)
        if factor is None:
            try:
                label = self._dataset.label(row)
            except (UserError, BrokenImage):
                label = np.zeros(len(self._factors))
            # An index, or ones and zeros.
            factor = float(self._factors @ label if label.ndim else self._factors[label]) or 1.0
            if len(self._known) < _KNOWN:
                self._known[stored] = factor
        return factor


def mixed(seed: int, number: int) -> int:
    """64 bits of two numbers, each below 2**64: a step of SplitMix64 (Steele, Lea and Flood 2014)."""
    bits = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _BITS
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _BITS
    return bits ^ (bits >> 31)
