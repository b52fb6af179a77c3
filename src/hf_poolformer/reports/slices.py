"""Slices: the images that share a value of a column, and whether a model does worse on them than chance would have it.

A slice is tested against the rest of the images: shares by Fisher's exact test, means by how far the mean of as many
images taken at random would lie from that of all. Of many slices some look bad by chance; so the p-values are Holm's
(1979): below LEVEL, at most one report in twenty calls any slice worse or better that is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


LEVEL = 0.05
# Of a column: a number with more values than this is divided into quarters; of other values only the most frequent are
# looked at.
MOST_NUMBERS, MOST_VALUES = 12, 200


@dataclass(frozen=True)
class Slice:
    """
    Attributes:
        column, value: which images it is of; a range for numbers.
        images: how many.
        figures: by name, a number, or (value, low, high) where there is an interval.
        p: of the test of this slice against the rest, by Holm's method for all slices of the report; NaN where nothing
            can be compared.
        badness: how much worse than the rest, for the order.
    """

    column: str
    value: str
    images: int
    figures: dict[str, Any]
    p: float
    badness: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.p):
            return "no other images to compare with"
        if self.p >= LEVEL:
            return "within chance"
        return "worse" if self.badness > 0 else "better"


def divide(values: Sequence[Any]) -> tuple[np.ndarray, list[str], int]:
    """Which slice each image is in, -1 for none, the names of the slices, and how many values were left out."""
    known = [value for value in values if value is not None]
    numbers = bool(known) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    if numbers and len(set(known)) > MOST_NUMBERS:
        return (*quarters(np.array([np.nan if value is None else value for value in values], dtype=np.float64)), 0)
    texts = ["none" if value is None else str(value) for value in values]
    names, codes, counts = np.unique(np.array(texts, dtype=object), return_inverse=True, return_counts=True)
    kept = np.argsort(-counts, kind="stable")[:MOST_VALUES]
    place = np.full(len(names), -1)
    place[kept] = np.arange(len(kept))
    return place[codes.reshape(-1)], [str(names[index]) for index in kept], len(names) - len(kept)


def quarters(numbers: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Numbers divided into four ranges with as many images each, or fewer where values repeat; NaN is none of them."""
    finite = np.isfinite(numbers)
    if not finite.any():
        return np.full(len(numbers), -1), []
    # Bounds are values that occur, so that equal numbers are together.
    bounds = np.unique(np.quantile(numbers[finite], [0.25, 0.5, 0.75], method="lower"))
    codes = np.where(finite, np.searchsorted(bounds, numbers, side="left"), -1)
    present = np.unique(codes[finite])
    names = [range_text(numbers[codes == code].min(), numbers[codes == code].max()) for code in present]
    return np.where(finite, np.searchsorted(present, codes), -1), names


def range_text(low: float, high: float) -> str:
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


def slices_of(
    columns: dict[str, Sequence[Any]],
    figures: Callable[[np.ndarray], dict[str, Any]],
    faults: np.ndarray,
) -> tuple[list[Slice], dict[str, int]]:
    """All slices of some columns, those first that are worse than the rest beyond chance, then by how much.

    Args:
        columns: by name, a value for each image.
        figures: what to tell of a slice, by the numbers of its images.
        faults: (images,), of each image how wrong the model is on it: True and False, or numbers from 0 on.

    Returns:
        the slices; and of each column with too many values how many were left out.
    """
    faults = np.asarray(faults)
    slices, left_out = [], {}
    for column, values in columns.items():
        codes, names, rest = divide(values)
        if rest:
            left_out[column] = rest
        for code, name in enumerate(names):
            members = np.flatnonzero(codes == code)
            if len(members):
                mean = float(faults[members].mean())
                others = (float(faults.sum()) - mean * len(members)) / max(len(faults) - len(members), 1)
                slices.append((column, name, members, mean - others, against_the_rest(faults, members)))
    adjusted = holm([p for *_, p in slices])
    found = [
        Slice(column, name, len(members), figures(members), p, badness)
        for (column, name, members, badness, _), p in zip(slices, adjusted, strict=True)
    ]
    return sorted(found, key=lambda part: (part.verdict != "worse", -part.badness)), left_out


def against_the_rest(faults: np.ndarray, members: np.ndarray) -> float:
    """p-value of a slice having as many faults as it has, or more unusual a number, if it were taken at random."""
    count, of_slice = len(faults), len(members)
    if of_slice == count:
        return math.nan
    if faults.dtype == bool:
        return fisher(int(faults[members].sum()), of_slice, int(faults.sum()), count)
    spread = float(faults.var(ddof=1)) * (1 / of_slice - 1 / count)
    if spread <= 0:
        return 1.0
    return math.erfc(abs(float(faults[members].mean() - faults.mean())) / math.sqrt(2 * spread))


def fisher(hits: int, drawn: int, all_hits: int, count: int) -> float:
    """Two-sided p-value of Fisher's exact test: `hits` among `drawn` of `count`, of which `all_hits` are hits."""
    possible = np.arange(max(0, drawn - (count - all_hits)), min(drawn, all_hits) + 1)
    # The factorials by which the chances differ are sums of logarithms, begun at the likeliest number.
    step = np.log((all_hits - possible[:-1]) * (drawn - possible[:-1]) * 1.0) - np.log(
        possible[1:] * (count - all_hits - drawn + possible[1:]) * 1.0
    )
    logs = np.concatenate([[0.0], np.cumsum(step)])
    chances = np.exp(logs - logs.max())
    chances /= chances.sum()
    # As likely as what was seen, but for rounding, is as unusual.
    return float(min(chances[chances <= chances[hits - possible[0]] * (1 + 1e-7)].sum(), 1.0))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values; what is NaN stays, and does not count."""
    values = np.array(p, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    times = len(order) - np.arange(len(order))
    values[order] = np.minimum(np.maximum.accumulate(values[order] * times), 1)
    return values.tolist()
