"""Two models on the same images, A and B: how far apart their figures are, and how much of that may be chance.

The images are paired. What both models get right says nothing of which is better, so tests and intervals are of the
differences on single images: far narrower than those that the two figures have by themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.intervals import middle, wilson
from ..evaluation.metrics import AnswerJudge, Columns
from ..foundation.tasks import Figure


# Of fewer images that only one model gets right, McNemar's test is computed exactly.
FEW = 25
# Where a difference as large is less probable than this by chance, it is called significant.
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class McNemar:
    """McNemar's test (1947) of whether two models are right equally often.

    Attributes:
        only_a, only_b: images that one model gets right and the other wrong.
        p: how probable so uneven a division of them is, or a more uneven one, where the models are equally good.
        exact: by the binomial distribution; else by the chi-squared one, with Edwards' correction for continuity.
    """

    only_a: int
    only_b: int
    p: float
    exact: bool

    @property
    def method(self) -> str:
        return "exact" if self.exact else "chi-squared with the correction for continuity"


def mcnemar(only_a: int, only_b: int) -> McNemar:
    count, fewer = only_a + only_b, min(only_a, only_b)
    if count < FEW:
        tail = sum(math.comb(count, number) for number in range(fewer + 1)) / 2**count
        return McNemar(only_a, only_b, min(1.0, 2 * tail), exact=True)
    # No correction beyond an even division, which no other can be less uneven than.
    squared = max(abs(only_a - only_b) - 1, 0) ** 2 / count
    return McNemar(only_a, only_b, math.erfc(math.sqrt(squared / 2)), exact=False)


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares, B's less A's, of the same images.

    Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions based on paired
    data", method 10: from Wilson's intervals of both shares and the correlation between them.

    Args:
        both, only_a, only_b, neither: the images that these models get right, one at least.
    """
    count = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    share_a, share_b = right_a / count, right_b / count
    (low_a, low_b), (high_a, high_b) = (bounds.tolist() for bounds in wilson([right_a, right_b], [count, count]))
    margins = right_a * (count - right_a) * right_b * (count - right_b)
    excess = both * neither - only_a * only_b
    if excess > 0:
        excess = max(excess - count / 2, 0)
    correlation = excess / math.sqrt(margins) if margins else 0.0

    def reach(below: float, above: float) -> float:
        return math.sqrt(max(below**2 - 2 * correlation * below * above + above**2, 0.0))

    difference = share_b - share_a
    return (
        difference - reach(share_b - low_b, high_a - share_a),
        difference + reach(high_b - share_b, share_a - low_a),
    )


@dataclass(frozen=True)
class Paired:
    """A figure of both models, over the images that both have answered.

    Attributes:
        a, b: the figure; NaN where it has none.
        interval_a, interval_b: the 95 % intervals of each by itself; None where there are none.
        difference: `b - a`.
        interval: of the difference, by the paired bootstrap: both figures of the same resamples of the images.
        p: twice the share of resamples in which the difference has the other sign, or none.
    """

    a: float
    b: float
    interval_a: tuple[float, float] | None
    interval_b: tuple[float, float] | None
    interval: tuple[float, float] | None
    p: float | None

    @property
    def difference(self) -> float:
        return self.b - self.a

    def ahead(self, figure: Figure) -> str | None:
        """The model whose figure is better, "A" or "B", be it by chance; None where they are equal."""
        if not self.difference or math.isnan(self.difference):
            return None
        return "B" if (self.difference > 0) == (figure.better == "high") else "A"


def paired_figures(judge: AnswerJudge, a: Columns, b: Columns) -> dict[str, Paired | list[Paired]]:
    """All figures that a judge gives, of the answers of two models; of single labels a list with one for each.

    Args:
        a, b: what the judge keeps of each image (`AnswerJudge.of_batch`), of the same images in the same order.
    """
    (figures_a, drawn_a), (figures_b, drawn_b) = ((judge.figures(part), judge.draw_figures(part)) for part in (a, b))
    bounds_a, bounds_b = judge.bounds(a, drawn_a), judge.bounds(b, drawn_b)
    found: dict[str, Paired | list[Paired]] = {}
    for name in figures_a.keys() & drawn_a.keys():
        values = np.stack([figures_a[name], figures_b[name]], axis=-1)
        drawn = drawn_b[name] - drawn_a[name]
        if values.ndim == 1:
            found[name] = _paired(values, bounds_a.get(name), bounds_b.get(name), drawn)
            continue
        nothing = [None] * len(values)
        parts = zip(values, bounds_a.get(name, nothing), bounds_b.get(name, nothing), drawn.T, strict=True)
        found[name] = [_paired(*part) for part in parts]
    return found


def _paired(values: np.ndarray, interval_a: Any, interval_b: Any, drawn: np.ndarray) -> Paired:
    drawn = drawn[~np.isnan(drawn)]
    interval = p = None
    if len(drawn) and not np.isnan(values).any():
        low, high = middle(drawn)
        interval = float(low), float(high)
        # With one more of each kind, so that no number of resamples makes it 0.
        p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum()).item()) / (1 + len(drawn)))
    return Paired(*values.tolist(), interval_a, interval_b, interval, p)
