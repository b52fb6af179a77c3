"""Images that a dataset has several times: the same bytes, the same pixels, or nearly the same picture.

What belongs together, directly or by way of others, is a group. A group that lies in several splits is a leak: a model
is tested on what it was trained on. A group whose images have different labels contradicts itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from .near import FLAT, SIDE, near_pairs


if TYPE_CHECKING:
    from .scan import Scan


Kind = Literal["bytes", "pixels", "near"]


@dataclass(frozen=True)
class Group:
    """Images that belong together, in the order of images.parquet.

    Attributes:
        kind: all have the same bytes; or the same pixels, encoded otherwise; or some only look alike.
        rows: numbers of their rows in images.parquet.
        splits, positions, paths: of each image.
        labels: of each image what the label column holds, None where there is no label.
        identical: how many of them have the same bytes as an earlier one.
        score: of the pair that is least alike among those that make the group, 1 unless `kind` is "near".
        mirrored: some are mirror images of others.
        flat: the pictures show nothing, all black say.
    """

    kind: Kind
    rows: tuple[int, ...]
    splits: tuple[str, ...]
    positions: tuple[int, ...]
    paths: tuple[str, ...]
    labels: tuple[Any, ...]
    identical: int
    score: float
    mirrored: bool
    flat: bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def leaks(self) -> bool:
        """Whether it lies in several splits."""
        return len(set(self.splits)) > 1

    @property
    def contradicts(self) -> bool:
        """Whether its images have different labels; those without a label do not count."""
        return len({_hashable(label) for label in self.labels if label is not None}) > 1


@dataclass(frozen=True)
class Duplicates:
    """All groups of a dataset: those that leak first, then the larger ones."""

    groups: list[Group]

    @property
    def exact(self) -> list[Group]:
        """Groups of the same bytes or pixels."""
        return [group for group in self.groups if group.kind != "near"]

    @property
    def near(self) -> list[Group]:
        """Groups with images that look alike."""
        return [group for group in self.groups if group.kind == "near"]

    @property
    def leaks(self) -> list[Group]:
        return [group for group in self.groups if group.leaks]

    @property
    def within(self) -> list[Group]:
        """Groups that have several images of one split."""
        return [group for group in self.groups if len(set(group.splits)) < len(group)]

    @property
    def contradictions(self) -> list[Group]:
        return [group for group in self.groups if group.contradicts]


def find_duplicates(scan: Scan, *, near: bool = True) -> Duplicates:
    """Groups the images of a scan. Broken images belong to none.

    Time of the near-duplicates grows with the square of the number of images: see `near.near_pairs`. Memory: about
    500 bytes for each image, and its embedding if there is one.

    Args:
        near: look for pictures that look alike, too.
    """
    label = [scan.label_column] if scan.label_column else []
    table = scan.table.to_table(columns=["path", "split", "position", "digest", "pixel_digest", *label])
    bytes_of, pixels_of = (_numbered(table[name]) for name in ("digest", "pixel_digest"))
    readable = np.flatnonzero(pixels_of >= 0)
    links = _Links(table.num_rows)
    _, first, inverse = np.unique(pixels_of[readable], return_index=True, return_inverse=True)
    same = readable[first][inverse]
    for row in np.flatnonzero(same != readable):
        links.join(int(same[row]), int(readable[row]))
    different = np.sort(readable[first])
    scores: dict[int, float] = {}
    mirrored: set[int] = set()
    with tempfile.TemporaryFile(dir=scan.file.parent) as file:
        lively, thumbnails, embeddings = _pictures(scan, different, file)
        found = zip(*near_pairs(thumbnails, embeddings), strict=True) if near and len(lively) else ()
        for left, right, score, flipped in found:
            both = int(lively[left]), int(lively[right])
            links.join(*both)
            scores |= {row: min(scores.get(row, 1.0), float(score)) for row in both}
            mirrored.update(both if flipped else ())
    flat = set(different.tolist()).difference(lively.tolist())
    groups = []
    for rows in links.groups():
        some = table.take(pa.array(rows))
        kinds = len(set(pixels_of[rows].tolist())), len(set(bytes_of[rows].tolist()))
        groups.append(
            Group(
                kind="near" if kinds[0] > 1 else "pixels" if kinds[1] > 1 else "bytes",
                rows=tuple(rows),
                splits=tuple(some["split"].to_pylist()),
                positions=tuple(some["position"].to_pylist()),
                paths=tuple(some["path"].to_pylist()),
                labels=tuple(some[label[0]].to_pylist() if label else [None] * len(rows)),
                identical=len(rows) - kinds[1],
                score=min(scores.get(row, 1.0) for row in rows),
                mirrored=not mirrored.isdisjoint(rows),
                flat=rows[0] in flat,
            )
        )
    groups.sort(key=lambda group: (not group.leaks, -len(group), group.rows))
    return Duplicates(groups)


def _numbered(column: Any) -> np.ndarray:
    """A number for each different text, -1 for null."""
    return column.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()


def _pictures(scan: Scan, rows: np.ndarray, file: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Those of the rows, ascending, whose pictures show something; their thumbnails, in a file, and embeddings."""
    columns = ["thumbnail", "embedding"] if scan.embedded else ["thumbnail"]
    thumbnails = np.memmap(file, np.uint8, "w+", shape=(max(len(rows), 1), SIDE, SIDE))
    size = scan.table.schema.field("embedding").type.list_size if scan.embedded else 0
    embeddings = np.zeros((len(rows), size), np.float32)
    lively: list[np.ndarray] = []
    first = count = 0
    for batch in scan.table.to_batches(columns=columns, batch_size=4096):
        mine = rows[slice(*np.searchsorted(rows, [first, first + len(batch)]))]
        chosen = batch.take(pa.array(mine - first))
        pictures = chosen["thumbnail"].flatten().to_numpy().reshape(-1, SIDE, SIDE)
        shows = pictures.std(axis=(1, 2), dtype=np.float32) >= FLAT
        stop = count + int(shows.sum())
        thumbnails[count:stop] = pictures[shows]
        if size:
            chosen = chosen.filter(pa.array(shows))
            known = chosen["embedding"].is_valid().to_numpy(zero_copy_only=False)
            embeddings[count:stop][known] = chosen["embedding"].flatten().to_numpy().reshape(-1, size)
        lively.append(mine[shows])
        first, count = first + len(batch), stop
    found = np.concatenate([np.zeros(0, np.int64), *lively])
    return found, thumbnails[:count], embeddings[:count] if size else None


class _Links:
    """Which rows belong together (union-find)."""

    def __init__(self, number: int):
        self._above = np.arange(number)

    def join(self, one: int, other: int) -> None:
        one, other = self._top(one), self._top(other)
        self._above[max(one, other)] = min(one, other)

    def groups(self) -> Iterator[list[int]]:
        """Of two rows and more, each ascending."""
        members: dict[int, list[int]] = {}
        for row in np.flatnonzero(self._above != np.arange(len(self._above))).tolist():
            members.setdefault(self._top(row), []).append(row)
        for top, rows in members.items():
            yield [top, *rows]

    def _top(self, row: int) -> int:
        while self._above[row] != row:
            self._above[row] = self._above[self._above[row]]
            row = int(self._above[row])
        return row


def _hashable(label: Any) -> Any:
    return tuple(label) if isinstance(label, list) else label
