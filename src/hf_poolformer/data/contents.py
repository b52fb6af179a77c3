"""What the label columns of a split hold, found by one pass over them: classes with counts, or numbers and their mean.

A pass may take as long as reading the data does. Its result is kept, for whoever opens the same data again, where
it took long, and where it can be told whether the data is still the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel
from huggingface_hub import constants

from .. import __version__
from ..foundation.errors import UserError, one_line
from ..foundation.files import let_others_read
from ..foundation.names import printable
from .classes import Classes, class_key
from .columns import ImageDataset, PerImage, element_of, feature_of, few, field_of, holds_fractions, root_of
from .labels import Flags, Lists, Numbers, Several, Storage, Texts, Vector
from .sources import Source


logger = logging.getLogger(__name__)

# A pass that took so many seconds is worth a file.
WORTH_KEEPING = 1.0
# Of the files that keep results: with another number they say something else.
_FORMAT = 1
# Rows that are looked at where the classes are known and a pass would read the whole dataset.
_FIRST_ROWS = 256
_SEPARATORS = ("|", ";", ",")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one label per image, or of several.

    Attributes:
        keys: key of a stored class (`class_key`) -> images that have it; None -> rows without a label.
        storage: of several labels; None of one.
        labelled, per_image: of several labels, images that have any or are known to have none.
        file: that knew this from an earlier run; empty where it was read.
    """

    keys: Counter[str | None]
    storage: Several | None = None
    labelled: int = 0
    per_image: PerImage | None = None
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of numbers: see `ImageDataset`.

    Attributes:
        lengths: how many numbers each column holds.
    """

    lengths: tuple[int, ...]
    labelled: int
    unlabelled: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: tuple[tuple[float, float], ...]
    file: str = ""


def count_one(dataset: ImageDataset, source: Source, split: str, cache_dir: str | None) -> Counts:
    """How many rows have which class, by one pass."""

    def read() -> dict[str, Any]:
        keys: Counter[str | None] = Counter()
        for (value,), count in Counter(_rows(dataset, source, split)).items():
            keys[class_key(value)] += count
        return {"keys": list(keys.items())}

    found, file = _kept(dataset, source, split, {}, read, cache_dir)
    return Counts(Counter(dict(map(tuple, found["keys"]))), file=file)


def count_several(
    dataset: ImageDataset,
    source: Source,
    split: str,
    cache_dir: str | None,
    *,
    separator: str | None = None,
    known: Classes | None = None,
    like: Storage | None = None,
    whole: bool = True,
) -> Counts:
    """How several labels per image are stored, and how many images have which class, by one pass.

    Args:
        separator: between the names in a text, where it is known.
        known: the classes, where they are.
        like: how training's labels are stored, of a validation split.
        whole: look at all rows; else at the first, for the sake of the storage.

    Raises:
        UserError: how they are stored cannot be told.
    """

    def read() -> dict[str, Any]:
        stored = Counter(
            tuple(tuple(value) if isinstance(value, (list, np.ndarray)) else value for value in values)
            for values in _rows(dataset, source, split, None if whole else _FIRST_ROWS)
        )
        storage = _storage(dataset, stored, separator, known, like)
        keys: Counter[str | None] = Counter()
        lengths: Counter[int] = Counter()
        for values, count in stored.items():
            try:
                own = storage.keys(values)
            except UserError as error:
                raise UserError(f"{dataset.name}: {error}") from error
            lengths[-1 if own is None else len(own)] += count
            keys.update(dict.fromkeys([None] if own is None else own, count))
        del lengths[-1]
        labels = sum(length * count for length, count in lengths.items())
        per_image = (labels / max(lengths.total(), 1), min(lengths, default=0), max(lengths, default=0), lengths[0])
        return {
            "storage": [type(storage).__name__, dataclasses.asdict(storage)],
            "keys": list(keys.items()),
            "labelled": lengths.total(),
            "per_image": per_image,
        }

    names = None if known is None else [list(known.names), dict(known.table)]
    question = {"separator": separator, "known": names, "like": repr(like)}
    found, file = _kept(dataset, source, split, question, read, cache_dir) if whole else (read(), "")
    kind, fields = found["storage"]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    storage = {kind.__name__: kind for kind in (Lists, Texts, Flags, Vector)}[kind](**fields)
    keys = Counter(dict(map(tuple, found["keys"])))
    return Counts(keys, storage, found["labelled"], PerImage(*found["per_image"]), file)


def read_numbers(
    dataset: ImageDataset, source: Source, split: str, cache_dir: str | None, *, whole: bool = True
) -> Moments:
    """Mean and spread of numbers, by one pass: in float64, and the same whatever the order of the rows.

    Raises:
        UserError: rows differ in how many numbers they have, or no row has all of them.
    """

    def read() -> dict[str, Any]:
        known, unlabelled, lengths, storage = array("d"), 0, (), None
        for values in _rows(dataset, source, split, None if whole else _FIRST_ROWS):
            if not known:
                lengths = tuple(len(value) if isinstance(value, (list, np.ndarray)) else 1 for value in values)
                storage = Numbers(tuple(range(sum(lengths))))
            try:
                numbers = storage.numbers(values)
            except UserError as error:
                raise UserError(f"{dataset.name}: {error}, as in the rows before") from error
            if numbers is None:
                unlabelled += 1
            else:
                known.extend(numbers)
        if not known:
            raise UserError(f"{dataset.name}: no row has a label: choose another split, or --label_column_name")
        targets = np.frombuffer(known).reshape(-1, sum(lengths)).T
        if np.abs(targets).max() > np.finfo(np.float32).max:
            raise UserError(f"{dataset.name}: a label is {np.abs(targets).max():g}, more than 32 bits hold")
        rows = targets.shape[1]
        mean = [math.fsum(numbers) / rows for numbers in targets]
        spread = [math.fsum((numbers - centre) ** 2) for numbers, centre in zip(targets, mean, strict=True)]
        return {
            "lengths": lengths,
            "labelled": rows,
            "unlabelled": unlabelled,
            "mean": mean,
            "std": [math.sqrt(total / rows) for total in spread],
            "range": [[float(numbers.min()), float(numbers.max())] for numbers in targets],
        }

    found, file = _kept(dataset, source, split, {}, read, cache_dir) if whole else (read(), "")
    lists = {name: tuple(found[name]) for name in ("lengths", "mean", "std")}
    ranges = tuple(map(tuple, found["range"]))
    return Moments(**lists, range=ranges, labelled=found["labelled"], unlabelled=found["unlabelled"], file=file)


def _rows(dataset: ImageDataset, source: Source, split: str, number: int | None = None) -> Iterator[tuple[Any, ...]]:
    """The values of the label columns, of all rows or of the first ones."""
    features = dataset.stream.features
    roots = list(dict.fromkeys(root_of(features, column) for column in dataset.label_columns))
    what = f"the label column{'s' if len(dataset.label_columns) > 1 else ''} of {dataset.name}"
    if number is None and not source.reads_columns:
        logger.info("%s: reading %s once", dataset.name, few([repr(column) for column in dataset.label_columns]))
    try:
        if number is None:
            rows = source.values(split, roots)
        else:
            rows = (tuple(map(row.get, roots)) for row in itertools.islice(source.columns(split, roots), number))
        if roots == list(dataset.label_columns):
            yield from rows
            return
        for values in rows:
            row = dict(zip(roots, values, strict=True))
            yield tuple(field_of(row, column) for column in dataset.label_columns)
    except Exception as error:
        raise UserError(f"{what} cannot be read: {one_line(error)}") from error


def _storage(
    dataset: ImageDataset,
    stored: Counter[tuple[Any, ...]],
    separator: str | None,
    known: Classes | None,
    like: Storage | None,
) -> Several:
    """How several labels per image are stored; what might be meant in two ways is refused."""
    features, columns = dataset.stream.features, dataset.label_columns
    feature = feature_of(features, columns[0])
    element = element_of(feature)
    if len(columns) > 1 or getattr(feature, "dtype", "") == "bool":
        return Flags(short_names(features, columns))
    values = [value for (value,) in stored if value is not None]
    if element is None:
        return _text_storage(dataset, values, separator, known, like)
    if any(isinstance(item, str) for value in values for item in value) or not any(values):
        return Lists()
    what = f"the lists in the column {columns[0]!r} of {dataset.name}"
    typed, truths = isinstance(element, ClassLabel), element.dtype == "bool"
    numbers = {number for value in values for number in value if number is not None and number == number}
    if holds_fractions(element) and not all(float(number).is_integer() for number in numbers):
        raise UserError(f"{what} hold fractions, which are no classes: to learn numbers, --task image-regression")
    # A list of classes has none twice; a list of zeros and ones that is longer than two has one of these twice.
    known_twice = [[number for number in value if number is not None and number >= 0] for value in values]
    repeated = sum(len(set(own)) < len(own) for own in known_twice)
    length, alike = len(values[0]), len(set(map(len, values))) == 1
    binary = alike and length > 1 and numbers <= {0, 1}
    if truths or (binary and (repeated or holds_fractions(element) or isinstance(like, Vector))):
        if typed:
            raise UserError(
                f"{what} look like a zero or one for each class, but their ClassLabel has {few(element.names)}: store "
                "them as booleans, or store the indices of the classes"
            )
        if not alike:
            raise UserError(f"{what} differ in length, and each must have one truth for each class")
        if known is not None and len(known.names) != length:
            raise UserError(f"{what} have {length} zeros and ones, and there are {len(known.names)} classes")
        return Vector(length)
    if typed or isinstance(like, Lists):
        return Lists()
    if alike and repeated > len(values) / 2:
        raise UserError(
            f"{what} have {length} numbers each, some of them twice, so they are no lists of classes: for each class "
            "store 1 where an image has it, 0 where it has not, and nothing where nobody has looked; to learn the "
            "numbers, --task image-regression"
        )
    if alike and length == 2 and numbers <= {-1, 0, 1} and (known is None or len(known.names) == 2):
        raise UserError(
            f"{what} may be the indices of classes, or a zero or one for each of two: store these as booleans, or the "
            "names of the classes"
        )
    return Lists()


def _text_storage(
    dataset: ImageDataset, values: Sequence[Any], separator: str | None, known: Classes | None, like: Storage | None
) -> Texts:
    what = f"the texts in the column {dataset.label_columns[0]!r} of {dataset.name}"
    texts = [value for value in values if isinstance(value, str) and class_key(value)]
    if separator is None and isinstance(like, Texts):
        separator = like.separator
    if separator is None and texts and all(text.strip().startswith("[") and text.strip()[-1] == "]" for text in texts):
        separator = ""
    if separator is None:
        separator = _separator(what, texts, known)
    whole = () if known is None or not separator else tuple(name for name in known.names if separator in name)
    return Texts(separator, whole)


def _separator(what: str, texts: Sequence[str], known: Classes | None) -> str:
    """Which character stands between the names, where that is certain."""
    present = [separator for separator in _SEPARATORS if any(separator in text for text in texts)]
    if known is not None:
        # A text that is a name as a whole is not divided.
        divided = [text for text in texts if class_key(text) not in known.table]
        fitting = [
            separator
            for separator in present or _SEPARATORS[:1]
            if all(known.table.keys() >= (_parts(separator, text) or set()) for text in divided)
        ]
        if fitting:
            return fitting[0]
    if not present:
        raise UserError(
            f"{what} have one name each, {few(sorted(texts))}: to learn one class for each image, --task "
            "image-classification; if something stands between several names, say what with --label_separator"
        )
    if len(present) > 1:
        raise UserError(
            f"{what} contain {' and '.join(map(repr, present))}: say with --label_separator which of them stands "
            "between the names"
        )
    (separator,) = present
    parts = set().union(*(_parts(separator, text) or () for text in texts))
    if len(parts) > len(texts):
        example = next(text for text in texts if separator in text)
        raise UserError(
            f"{what} would be {len(parts)} names if {separator!r} stood between them, but there are only {len(texts)} "
            f"different texts, {example!r} for one: if that is meant, say so with --label_separator {separator!r}"
        )
    return separator


def looks_divided(names: Sequence[str]) -> tuple[str, int] | None:
    """What seems to stand between several names in class names like "cat;dog", and how many names these are.

    Names that are lists, as ImageNet's with their synonyms, have more parts than there are of them. Where labels were
    put together, the same parts come again and again.
    """
    for separator in _SEPARATORS:
        divided = [name for name in names if separator in name]
        parts = {part.strip() for name in names for part in name.split(separator)}
        if len(divided) > 1 and len(parts) < len(names):
            return separator, len(parts)
    return None


def _parts(separator: str, text: str) -> frozenset[str] | None:
    return Texts(separator).keys([text])


def short_names(features: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    """Names of columns, without that of the structure which they are fields of, unless two were alike then."""
    short = [column if column in features else column.partition(".")[2] for column in columns]
    return tuple(short if len(set(short)) == len(short) else columns)


def _kept(
    dataset: ImageDataset,
    source: Source,
    split: str,
    question: Mapping[str, Any],
    read: Callable[[], dict[str, Any]],
    cache_dir: str | None,
) -> tuple[dict[str, Any], str]:
    """What `read` gives, from a file of an earlier run where there is one for the same data and the same question.

    Returns:
        the result, and the file where it was there.
    """
    state = source.state(split)
    if state is None:
        return read(), ""
    kinds = [repr(feature_of(dataset.stream.features, column)) for column in dataset.label_columns]
    asked = [_FORMAT, __version__, state, split, dataset.label_columns, kinds, dataset.problem_type, question]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    folder = Path(cache_dir).expanduser() if cache_dir else Path(constants.HF_HOME)
    file = folder / "hf-poolformer" / f"labels-{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        entry = json.loads(file.read_text(encoding="utf-8"))
        if entry["question"] == json.loads(json.dumps(asked)):
            return entry["result"], str(file)
    start = time.perf_counter()
    result = read()
    # What changed while it was read, or so lately that a further change might have the same time, is not kept.
    if time.perf_counter() - start >= WORTH_KEEPING and source.state(split) == state:
        try:
            _write(file, {"question": asked, "result": result})
        except OSError as error:  # a full disk, a folder of somebody else's
            logger.info("%s: what the labels are is not kept: %s", dataset.name, printable(one_line(error)))
    return json.loads(json.dumps(result)), ""


def _write(file: Path, entry: dict[str, Any]) -> None:
    """Another process may write the same file at the same time: each has its own until it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{file.stem}-", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(entry, stream)
        let_others_read(Path(partial))
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
