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

from ..foundation.errors import UserError
from .columns import ImageDataset, field_of


if TYPE_CHECKING:
    from .stream import Row


# An image that comes more often than so in an epoch is learnt by heart, whatever is done to it.
MOST_REPEATS = 1000
_BITS = (1 << 64) - 1


def repeat_factors(counts: Sequence[int], power: float = 1.0) -> tuple[float, ...]:
    """How often an image of each class comes in an epoch, on average, for images of one class each.

    In proportion to `(1 / count) ** power`: with 1 all classes come equally often, 0 leaves the images as they are.
    The number of images in an epoch stays what it is. A class without images has the factor 1, which nothing uses.

    Args:
        counts: images of each class, by index.
    """
    raw = [(1 / count) ** power if count else 0.0 for count in counts]
    share = sum(counts) / sum(count * factor for count, factor in zip(counts, raw, strict=True))
    return tuple(factor * share if count else 1.0 for count, factor in zip(counts, raw, strict=True))


class Repeats:
    """How often the rows of a dataset come, told by their labels, which are read undecoded.

    A row without a label comes once, and so does one whose label is no class: whoever decodes it says so.

    Args:
        factors: of each class, by the indices of the dataset.

    Attributes:
        most: times that a row can come in one epoch.

    Raises:
        UserError: a class is so rare that its images would come more often than is any use.
    """

    def __init__(self, dataset: ImageDataset, factors: Sequence[float]):
        self.most = math.ceil(max(factors))
        if self.most > MOST_REPEATS:
            rarest = dataset.classes.names[factors.index(max(factors))]
            raise UserError(
                f"an image of the class {rarest} would come {self.most} times in an epoch, so rare it is: lower "
                "--sampling_power, 0.5 say, or leave out the class."
            )
        self._dataset, self._factors = dataset, tuple(factors)
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

    def _factor(self, values: Mapping[str, Any]) -> float:
        stored = field_of(values, self._dataset.label_column)
        factor = self._known.get(stored)
        if factor is None:
            try:
                index = self._dataset.classes.index(stored)
            except UserError:
                index = None
            factor = self._known[stored] = 1.0 if index is None else self._factors[index]
        return factor


def mixed(seed: int, number: int) -> int:
    """64 bits of two numbers, each below 2**64: a step of SplitMix64 (Steele, Lea and Flood 2014)."""
    bits = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _BITS
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _BITS
    return bits ^ (bits >> 31)
