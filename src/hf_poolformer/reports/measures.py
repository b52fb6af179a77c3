"""The figures of a scanned dataset: counted over its rows in a pass or two, in memory that does not grow with them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.loader import MIN_SEEN
from ..foundation.names import undecodable_escaped


# Sides of images are counted pixel by pixel up to here; what is longer counts as this long.
LONGEST_SIDE = 1 << 15
# Different sizes, and reasons of broken images, that are told apart.
_SIZES, _REASONS = 10_000, 200
# Examples kept of each reason, and extremes of each kind.
EXAMPLES, EXTREMES = 5, 6
# A picture whose brightness varies less than this, white being 1, shows nothing.
BLANK = 1 / 255
# Channels that differ less than this in mean and deviation are the same.
_SAME = 1e-5
# Bins of a histogram of numbers.
BINS = 40


@dataclass(frozen=True)
class Place:
    """Where an image is, and what it is called."""

    split: str
    position: int
    path: str


@dataclass
class Extremes:
    """The images with the highest values of something.

    Attributes:
        found: (value, image, what there is to say about it), highest first.
    """

    most: int = EXTREMES
    found: list[tuple[float, Place, str]] = field(default_factory=list)

    def add(self, values: np.ndarray, row: Callable[[int], tuple[Place, str]]) -> None:
        """
        Args:
            values: of some images; NaN for those that do not count.
            row: the image of a value, by its index.
        """
        values = np.where(np.isnan(values), -np.inf, values)
        best = np.argsort(-values, kind="stable")[: self.most]
        lowest = self.found[-1][0] if len(self.found) == self.most else -np.inf
        for index in best:
            if values[index] > lowest:
                self.found.append((float(values[index]), *row(int(index))))
        self.found.sort(key=lambda entry: -entry[0])
        del self.found[self.most :]


@dataclass
class SplitMeasures:
    """
    Attributes:
        images: rows; `broken` of them cannot be read, `unlabelled` of the others have no label.
        unusable_first: broken or unlabelled ones among the first rows, at which training looks before it begins.
        counts: of readable images, by class.
        per_image: how many labels -> how many readable images.
        sums, squares, least, most: of the numbers of a regression, over readable images with all of them.
        histogram: of each target, (targets, BINS).
    """

    name: str
    images: int = 0
    broken: int = 0
    unlabelled: int = 0
    unusable_first: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    per_image: Counter[int] = field(default_factory=Counter)
    sums: np.ndarray | None = None
    squares: np.ndarray | None = None
    least: np.ndarray | None = None
    most: np.ndarray | None = None
    histogram: np.ndarray | None = None

    @property
    def readable(self) -> int:
        return self.images - self.broken

    @property
    def labelled(self) -> int:
        return self.readable - self.unlabelled

    @property
    def mean(self) -> np.ndarray:
        return self.sums / max(self.labelled, 1)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.squares / max(self.labelled, 1) - self.mean**2, 0))


@dataclass
class Measures:
    """
    Attributes:
        kind: what labels are, as `foundation.tasks.Task.reads`; "nothing" without any.
        label_names: of the classes or of the numbers.
        channels: what images were decoded to.
        reasons: of broken images -> how many; and the first of them.
        label_errors: the same of labels that cannot be understood.
        together: images of training that have both of two classes: (classes, classes) of those in `common`.
        common: indices of the commonest classes.
        grey: images that are grey, `grey_as_rgb` of them stored in three channels.
        channel_sums, channel_squares: of the mean of each channel over images, and of its mean square.
    """

    kind: str
    label_names: list[str]
    splits: dict[str, SplitMeasures]
    channels: int = 3
    reasons: Reasons = field(default_factory=lambda: Reasons())
    label_errors: Reasons = field(default_factory=lambda: Reasons())
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    shorter: np.ndarray = field(default_factory=lambda: np.zeros(LONGEST_SIDE + 1, np.int64))
    longer: np.ndarray = field(default_factory=lambda: np.zeros(LONGEST_SIDE + 1, np.int64))
    oblong: int = 0
    bytes: int = 0
    bytes_known: int = 0
    grey: int = 0
    grey_as_rgb: int = 0
    blank: int = 0
    channel_sums: np.ndarray | None = None
    channel_squares: np.ndarray | None = None
    measured: int = 0
    smallest: Extremes = field(default_factory=Extremes)
    largest: Extremes = field(default_factory=Extremes)
    longest: Extremes = field(default_factory=Extremes)
    blanks: Extremes = field(default_factory=Extremes)
    common: list[int] = field(default_factory=list)
    together: np.ndarray | None = None

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits.values())

    @property
    def broken(self) -> int:
        return sum(split.broken for split in self.splits.values())

    @property
    def readable(self) -> int:
        return self.images - self.broken

    @property
    def total_counts(self) -> np.ndarray:
        return sum((split.counts for split in self.splits.values()), np.zeros(len(self.label_names), np.int64))

    @property
    def channel_mean(self) -> np.ndarray:
        return self.channel_sums / max(self.measured, 1)

    @property
    def channel_std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.channel_squares / max(self.measured, 1) - self.channel_mean**2, 0))

    def __post_init__(self) -> None:
        self.channel_sums, self.channel_squares = np.zeros(self.channels), np.zeros(self.channels)


@dataclass
class Reasons:
    """Why something cannot be read, alike reasons together.

    Attributes:
        counts: reason -> how often.
        examples: reason -> the first of them, with the image and the reason in full.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, path: str, text: str) -> None:
        reason = grouped_reason(text)
        if reason not in self.counts and len(self.counts) >= _REASONS:
            reason = "other reasons"
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append((path, text))


def grouped_reason(text: str) -> str:
    """The reason of a broken image without what differs from image to image: numbers, addresses, quoted names."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"|<[^>]*>", "…", " ".join(text.split()))
    return re.sub(r"0x[0-9a-f]+|\d+", "N", text)[:200]


def quantile(counts: np.ndarray, share: float) -> int:
    """Of values that were counted one by one, the one below which such a share of them lies."""
    total = int(counts.sum())
    return int(np.searchsorted(counts.cumsum(), share * total, side="left")) if total else 0


# What `measure` reads of a scan; labels come in addition.
COLUMNS = ("path", "split", "position", "format", "mode", "width", "height", "bytes", "error", "mean", "std")


def measure(batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]], about: Measures) -> Measures:
    """Fills in measures that know only what labels are, from the rows of a scan.

    Args:
        batches: rows of some columns, as often as it is called.
        about: whose `kind`, `label_names` and names of `splits` are known.
    """
    for split in about.splits.values():
        split.counts = np.zeros(len(about.label_names), np.int64)
    label_columns = [LABELS[about.kind], "label_error"] if about.kind in LABELS else []
    for batch in batches([*COLUMNS, *label_columns]):
        for part in by_split(batch):
            _add(about, part)
    if about.kind == "classes":
        _add_together(about, batches)
    if about.kind == "numbers":
        _add_histograms(about, batches)
    return about


def by_split(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in parts of one split each."""
    for name in pc.unique(batch["split"]).to_pylist():
        yield batch.filter(pc.equal(batch["split"], name))


def array(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column of numbers, NaN where one is missing."""
    return batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False)


def lists(column: pa.Array, width: int) -> np.ndarray:
    """A column of lists of numbers as (rows, width); NaN where a list is missing or of another length."""
    values = np.full((len(column), width), np.nan)
    fits = pc.fill_null(pc.equal(pc.list_value_length(column), width), False).to_numpy(zero_copy_only=False)
    flat = column.filter(pa.array(fits)).flatten().to_numpy(zero_copy_only=False)
    values[fits] = flat.reshape(-1, width)
    return values


def _add(measures: Measures, batch: pa.RecordBatch) -> None:
    split = measures.splits[batch["split"][0].as_py()]
    errors = batch["error"]
    readable = errors.is_null().to_numpy(zero_copy_only=False)
    positions = batch["position"].to_numpy(zero_copy_only=False)
    split.images += len(batch)
    split.broken += int((~readable).sum())
    _add_reasons(measures.reasons, batch, "error")
    if "label_error" in batch.schema.names:
        _add_reasons(measures.label_errors, batch, "label_error")
    labelled = _add_labels(measures, split, batch.filter(pa.array(readable)))
    usable = readable.copy()
    usable[readable] = labelled
    split.unlabelled += int((~labelled).sum())
    split.unusable_first += int((~usable & (positions < MIN_SEEN)).sum())
    _add_pixels(measures, batch.filter(pa.array(readable)))


def _add_reasons(reasons: Reasons, batch: pa.RecordBatch, column: str) -> None:
    told = batch.filter(batch[column].is_valid())
    for path, text in zip(told["path"].to_pylist(), told[column].to_pylist(), strict=True):
        reasons.add(path, text)


def _add_labels(measures: Measures, split: SplitMeasures, batch: pa.RecordBatch) -> np.ndarray:
    """Counts the labels of readable images; which of these have one."""
    names = len(measures.label_names)
    if measures.kind == "class":
        labels = class_indices(batch, measures.label_names)
        split.counts = split.counts + np.bincount(labels[labels >= 0], minlength=names)
        return labels >= 0
    if measures.kind == "classes":
        offsets, labels, known = several_indices(batch, measures.label_names)
        split.counts = split.counts + np.bincount(labels, minlength=names)
        split.per_image.update(np.diff(offsets)[known].tolist())
        return known
    if measures.kind == "numbers":
        values = lists(batch[LABELS["numbers"]], names)
        known = np.isfinite(values).all(1)
        values = values[known]
        if split.sums is None:
            split.sums, split.squares = np.zeros(names), np.zeros(names)
            split.least, split.most = np.full(names, np.inf), np.full(names, -np.inf)
        split.sums += values.sum(0)
        split.squares += (values**2).sum(0)
        split.least = np.minimum(split.least, values.min(0, initial=np.inf))
        split.most = np.maximum(split.most, values.max(0, initial=-np.inf))
        return known
    return np.ones(len(batch), bool)


def _add_pixels(measures: Measures, batch: pa.RecordBatch) -> None:
    if not len(batch):
        return
    for name, counter in (("format", measures.formats), ("mode", measures.modes)):
        for found in pc.value_counts(batch[name]).to_pylist():
            counter[found["values"] or "unknown"] += found["counts"]
    width, height = (batch[name].to_numpy(zero_copy_only=False).astype(np.int64) for name in ("width", "height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    measures.shorter += np.bincount(np.minimum(shorter, LONGEST_SIDE), minlength=LONGEST_SIDE + 1)
    measures.longer += np.bincount(np.minimum(longer, LONGEST_SIDE), minlength=LONGEST_SIDE + 1)
    measures.oblong += int((longer >= 2 * shorter).sum())
    pairs, counts = np.unique(np.stack([width, height], 1), axis=0, return_counts=True)
    for pair, count in zip(map(tuple, pairs.tolist()), counts.tolist(), strict=True):
        if pair in measures.sizes or len(measures.sizes) < _SIZES:
            measures.sizes[pair] += count
    stored = array(batch, "bytes")
    measures.bytes += int(np.nansum(stored))
    measures.bytes_known += int(np.isfinite(stored).sum())

    paths, positions = batch["path"], batch["position"]
    split = batch["split"][0].as_py()

    def image(index: int) -> tuple[Place, str]:
        place = Place(split, positions[index].as_py(), paths[index].as_py())
        return place, f"{width[index]} x {height[index]}"

    measures.smallest.add(-(width * height).astype(float), image)
    measures.largest.add((width * height).astype(float), image)
    measures.longest.add(np.where(longer >= 2 * shorter, longer / np.maximum(shorter, 1), np.nan), image)
    mean, std = (lists(batch[name], measures.channels) for name in ("mean", "std"))
    told = np.isfinite(mean).all(1)
    mean, std = np.nan_to_num(mean), np.nan_to_num(std)
    measures.channel_sums += mean[told].sum(0)
    measures.channel_squares += (mean[told] ** 2 + std[told] ** 2).sum(0)
    measures.measured += int(told.sum())
    alike = told & (np.ptp(mean, 1) < _SAME) & (np.ptp(std, 1) < _SAME)
    single = pc.is_in(batch["mode"], pa.array(GREY_MODES)).to_numpy(zero_copy_only=False)
    measures.grey += int(alike.sum())
    measures.grey_as_rgb += int((alike & ~single).sum())
    blank = told & (std.max(1) < BLANK)
    measures.blank += int(blank.sum())
    measures.blanks.add(np.where(blank, -std.max(1), np.nan), image)


# Modes of Pillow with one channel.
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L")
# What labels are -> the column of a scan that has them.
LABELS = {"class": "label", "classes": "labels", "numbers": "targets"}


def stored_names(names: Sequence[str]) -> pa.Array:
    """As a table has them, whose texts are UTF-8."""
    return pa.array(map(undecodable_escaped, names), pa.string())


def class_indices(batch: pa.RecordBatch, names: Sequence[str]) -> np.ndarray:
    """The class of each row; -1 for none."""
    found = pc.index_in(batch[LABELS["class"]], value_set=stored_names(names))
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def several_indices(batch: pa.RecordBatch, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes of all rows one behind the other, where those of each row begin and end, and which rows have been
    looked at by whoever labelled them."""
    column = batch[LABELS["classes"]]
    known = column.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    labels = pc.index_in(column.flatten(), value_set=stored_names(names))
    return np.concatenate([[0], np.cumsum(lengths)]), labels.to_numpy(zero_copy_only=False).astype(np.int64), known


def _add_together(
    measures: Measures, batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]], most: int = 8
) -> None:
    """How often the commonest classes come together."""
    total = measures.total_counts
    measures.common = [int(index) for index in np.argsort(-total, kind="stable")[:most] if total[index]]
    place = np.full(len(total), -1)
    place[measures.common] = range(len(measures.common))
    measures.together = np.zeros((len(measures.common),) * 2, np.int64)
    for batch in batches(["error", LABELS["classes"]]):
        offsets, labels, _ = several_indices(batch.filter(batch["error"].is_null()), measures.label_names)
        has = np.zeros((len(offsets) - 1, len(measures.common) + 1), np.int64)
        has[np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), place[labels]] = 1  # the last is for the others
        measures.together += has[:, :-1].T @ has[:, :-1]


def _add_histograms(measures: Measures, batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch]]) -> None:
    known = [split for split in measures.splits.values() if split.labelled and split.sums is not None]
    if not known:
        return
    edges = number_edges(measures)
    for split in known:
        split.histogram = np.zeros((len(edges), BINS), np.int64)
    for batch in batches(["split", "error", LABELS["numbers"]]):
        for part in by_split(batch.filter(batch["error"].is_null())):
            split = measures.splits[part["split"][0].as_py()]
            values = lists(part[LABELS["numbers"]], len(edges))
            values = values[np.isfinite(values).all(1)]
            for target, edge in enumerate(edges):
                split.histogram[target] += np.histogram(values[:, target], edge)[0]


def number_edges(measures: Measures) -> list[np.ndarray]:
    """The borders of the bins of each target, the same for all splits."""
    known = [split for split in measures.splits.values() if split.labelled and split.sums is not None]
    least = np.min([split.least for split in known], 0)
    most = np.max([split.most for split in known], 0)
    return [np.linspace(low, high if high > low else low + 1, BINS + 1) for low, high in zip(least, most, strict=True)]
