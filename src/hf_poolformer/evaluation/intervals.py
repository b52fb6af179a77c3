"""How sure a figure of a small test set is: 95 % confidence intervals, by Wilson's formula and by the bootstrap.

The bootstrap draws as many images as there are, with replacement, and computes the figure again; the middle 95 % of
1000 such figures are the interval. A resample is told by how often it drew each image, so that a figure of many
resamples at once is a matter of weighted sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


LEVEL = 0.95
Z = 1.959963984540054  # of the normal distribution's middle 95 %
RESAMPLES, TOGETHER, SEED = 1000, 125, 0  # a resample of TOGETHER keeps the weights of 20 000 images at 10 MB


def wilson(hits: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of the share `hits / count`; NaN where nothing was counted.

    Of counts (shape of both), low and high. Wilson (1927), without the correction for continuity.
    """
    hits, count = np.asarray(hits, dtype=np.float64), np.asarray(count, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, wide = hits / count, Z**2 / count
        centre = (share + wide / 2) / (1 + wide)
        half = Z / (1 + wide) * np.sqrt(share * (1 - share) / count + wide / (4 * count))
    # At the ends the bounds are 0 and 1 but for rounding.
    return np.where(hits == 0, 0.0 * centre, centre - half), np.where(hits == count, 1 + 0 * centre, centre + half)


def resamples(count: int) -> Iterator[np.ndarray]:
    """How often each of `count` images is drawn: float32 (images, resamples), a part of the RESAMPLES at a time."""
    generator = np.random.default_rng(SEED)
    for start in range(0, RESAMPLES, TOGETHER):
        drawn = generator.integers(0, count, (min(TOGETHER, RESAMPLES - start), count), dtype=np.int32)
        yield np.stack([np.bincount(row, minlength=count) for row in drawn], axis=1).astype(np.float32)


def middle(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of figures (resamples, ...), the bounds of the middle 95 %, among those that are numbers."""
    known = values.reshape(len(values), -1)
    bounds = np.full((2, known.shape[1]), np.nan)
    some = ~np.isnan(known).all(axis=0)
    if some.any():
        bounds[:, some] = np.nanpercentile(known[:, some], [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    low, high = bounds.reshape(2, *values.shape[1:])
    return low, high


def summed(weights: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """Sums of weights (images, resamples) over the images of each group, 0 to count - 1: (resamples, groups)."""
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    sums = np.zeros((weights.shape[1], count))
    if len(present):
        sums[:, present] = np.add.reduceat(weights[order], starts, axis=0).T
    return sums


class Ranking:
    """Images in the order of their scores for one class, of which any resample has the AUROC and average precision.

    Only where an image of the class stands do these change: the images are summed up to groups, those of equal score
    among which there is one, and those in between.

    Args:
        scores: (images,).
        truth: bool (images,), whether an image is of the class.
    """

    def __init__(self, scores: np.ndarray, truth: np.ndarray):
        self.order = np.argsort(-scores, kind="stable")
        scores, truth = scores[self.order], truth[self.order]
        ties = np.cumsum(np.diff(scores, prepend=scores[:1]) != 0)  # number of the score of each image
        with_class = np.zeros(ties[-1] + 1 if len(ties) else 0, dtype=bool)
        with_class[ties[truth]] = True
        # A group begins with each score that has an image of the class, and behind it.
        begins = np.diff(ties, prepend=-1) != 0
        begins &= with_class[ties] | with_class[ties - 1] | (ties == 0)
        self.starts = np.flatnonzero(begins)
        self.positive = np.flatnonzero(truth)
        groups = np.cumsum(begins) - 1
        # Where the images of the class change their group, and which it is.
        self.groups, self.changes = np.unique(groups[self.positive], return_index=True)

    def figures(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and average precision of resamples, both (resamples,); NaN where a resample has none.

        Args:
            weights: (images, resamples).
        """
        drawn = weights.shape[1]
        if not len(self.positive):
            return np.full(drawn, np.nan), np.full(drawn, np.nan)
        weights = weights[self.order]
        every = np.add.reduceat(weights, self.starts, axis=0)
        positive = np.zeros_like(every)
        positive[self.groups] = np.add.reduceat(weights[self.positive], self.changes, axis=0)
        negative = every - positive
        above = np.cumsum(positive, axis=0)
        of_class, others = above[-1].astype(np.float64), negative.sum(axis=0, dtype=np.float64)
        pairs = (negative * (above - positive / 2)).sum(axis=0, dtype=np.float64)
        precision = above / np.maximum(np.cumsum(every, axis=0), 1)
        with np.errstate(invalid="ignore"):
            return pairs / (of_class * others), (positive * precision).sum(axis=0, dtype=np.float64) / of_class
