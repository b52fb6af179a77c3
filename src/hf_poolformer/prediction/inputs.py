"""What is to be predicted: files, folders, globs and datasets, cut into shards that can be entered anywhere."""

from __future__ import annotations

import abc
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.decoding import BrokenImage, describe_source
from ..data.files import (
    PARQUET_SUFFIXES,
    TAR_SUFFIXES,
    count_by_suffix,
    counted,
    has_image_column,
    heif_hint,
    image_files,
    is_saved_dataset,
    list_files,
    match_pattern,
)
from ..data.fingerprints import hub_commit, state_of_files, state_of_path
from ..foundation.errors import UserError, one_line


logger = logging.getLogger(__name__)

DATASET_SUFFIXES = PARQUET_SUFFIXES | TAR_SUFFIXES

Item = tuple[str, Any]  # the name of an image beside its undecoded source, or beside a BrokenImage


@dataclass
class Position:
    """Where a shard is entered: unit of the storage (a Parquet row group), row within it, row within the shard."""

    group: int = 0
    offset: int = 0
    row: int = 0


class Shard(abc.ABC):
    """A run of consecutive images. `count` is None where it is not known, `key` tells it from every other."""

    key: str
    count: int | None

    def state(self) -> str:
        """Tells whether its images are still what they were; "" where that is not known."""
        return ""

    @abc.abstractmethod
    def read(self, position: Position) -> Iterator[Item]:
        """The images from `position` on; moves `position` behind each before it is handed out."""


class Images(abc.ABC):
    """One input."""

    count: int | None

    @abc.abstractmethod
    def shards(self, size: int | None) -> list[Shard]:
        """The input in order, in shards of about `size` images where it may be cut anywhere, whole if None."""


@dataclass
class FileShard(Shard):
    files: list[Path]

    def __post_init__(self) -> None:
        self.key = "\0".join(map(str, self.files))
        self.count = len(self.files)

    def state(self) -> str:
        return state_of_files(self.files)

    def read(self, position: Position) -> Iterator[Item]:
        for file in self.files[position.row :]:
            position.row += 1
            yield str(file), file


@dataclass
class Files(Images):
    files: list[Path]

    def __post_init__(self) -> None:
        self.count = len(self.files)

    def shards(self, size: int | None) -> list[Shard]:
        size = size or len(self.files)
        return [FileShard(self.files[start : start + size]) for start in range(0, len(self.files), size)]


@dataclass
class ClosedShard(Shard):
    """A dataset that cannot be opened: one row that says so."""

    name: str
    error: str

    def __post_init__(self) -> None:
        self.key = self.name
        self.count = 1

    def read(self, position: Position) -> Iterator[Item]:
        if position.row == 0:
            position.row = 1
            yield self.name, BrokenImage(self.error)


@dataclass
class StreamShard(Shard):
    """Rows of a streamed dataset.

    Attributes:
        stream: rows, of which `image_column` is read.
        groups: the units of the storage that belong to this shard, None for all.
        first: number of its first row in what `prefix` names.
        by_name: rows are called by their names (in a tar), not by their numbers.
        commit: of a dataset of the Hub.
    """

    stream: Any
    image_column: str
    prefix: str
    count: int | None
    by_name: bool
    groups: range | None = None
    first: int = 0
    commit: str | None = None
    key: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.key = f"{self.prefix} {self.groups} {self.count}"

    def state(self) -> str:
        return self.commit or state_of_path(self.prefix) or ""

    def read(self, position: Position) -> Iterator[Item]:
        from ..data.stream import DamagedShard, Piece, Shards

        units = Shards(
            self.stream, divided=True
        )  # Parquet: by row group, so that those that are done are not read again
        groups = self.groups if self.groups is not None else range(units.num_shards)
        try:
            for number in range(position.group, len(groups)):
                if number > position.group:
                    position.group, position.offset = number, 0
                for row in itertools.islice(units.rows(Piece(groups[number])), position.offset, None):
                    source = row.values[self.image_column]
                    name = describe_source(source) if self.by_name else None
                    index = self.first + position.row
                    position.offset, position.row = position.offset + 1, position.row + 1
                    yield f"{self.prefix}{':' if '#' in self.prefix else '#'}{name or index}", source
        except DamagedShard as error:
            # What was read until then counts, and so does what lies in other shards.
            message = f"reading failed after {self.first + position.row} images: {error}"
            position.row += 1
            yield self.prefix, BrokenImage(message)
        except Exception as error:  # whatever the storage raises
            # Not taken for the end of the shard: images that are merely out of reach would be lost for good.
            raise UserError(
                f"reading failed at {self.prefix} after {self.first + position.row} images: {one_line(error)}. What "
                "is finished in a folder is kept: run the same command again to go on."
            ) from error


@dataclass
class LocalDataset(Images):
    """A Parquet file, a tar, or what `save_to_disk` wrote."""

    path: Path
    image_column_name: str | None = None

    def __post_init__(self) -> None:
        self.count = None
        self._group_sizes: list[int] | None = None
        if self.path.suffix.lower() in PARQUET_SUFFIXES:
            try:
                import pyarrow.parquet

                metadata = pyarrow.parquet.read_metadata(self.path)
                self.count = metadata.num_rows
                self._group_sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            except (ImportError, OSError, ValueError):
                pass  # reading it will say what is wrong

    def shards(self, size: int | None) -> list[Shard]:
        try:
            dataset = open_dataset(str(self.path), image_column_name=self.image_column_name)
        except UserError as error:
            return [ClosedShard(str(self.path), str(error))]
        stream = dataset.stream.select_columns([dataset.image_column])
        how = {"image_column": dataset.image_column, "prefix": str(self.path)}
        how["by_name"] = self.path.suffix.lower() in TAR_SUFFIXES
        if size is not None and self._group_sizes is not None:
            sizes = self._group_sizes
        elif size is not None and self.path.is_dir():
            # As datasets divides a table into this many shards: the first ones one row longer.
            whole, rest = divmod(dataset.num_examples, stream.num_shards)
            sizes = [whole + (index < rest) for index in range(stream.num_shards)]
        else:
            return [StreamShard(stream, count=dataset.num_examples, **how)]
        shards, start, first = [], 0, 0
        for stop in range(1, len(sizes) + 1):
            count = sum(sizes[start:stop])
            if stop == len(sizes) or count + sizes[stop] > size:
                shards.append(StreamShard(stream, count=count, groups=range(start, stop), first=first, **how))
                start, first = stop, first + count
        return shards


@dataclass
class HubDataset(Images):
    """A dataset that is streamed from the Hub: a shard for each of its files."""

    name: str
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self._dataset = open_dataset(self.name, **self.options)
        self.count = self._dataset.num_examples
        self._commit = (
            None if Path(self.name).exists() else hub_commit(self.name, "dataset", None, self.options["token"])
        )

    def shards(self, size: int | None) -> list[Shard]:
        stream = self._dataset.stream.select_columns([self._dataset.image_column])
        how = {"image_column": self._dataset.image_column, "by_name": False, "commit": self._commit}
        number = stream.num_shards
        if size is None or number == 1:
            return [StreamShard(stream, count=self.count, prefix=self.name, **how)]
        # How many rows lie in the files before is not known: rows are numbered within their file.
        return [
            StreamShard(stream.shard(num_shards=number, index=index), count=None, prefix=f"{self.name}#{index}", **how)
            for index in range(number)
        ]


def find_images(
    inputs: Sequence[str | os.PathLike], *, image_column_name: str | None = None, leave_out: Path | None = None
) -> Iterator[Images]:
    """What is to be predicted, in the order given, folders and globs sorted, each file once.

    Args:
        leave_out: a file or folder that is not to be looked at: the output.

    Raises:
        UserError: an input that matches nothing.
    """
    seen: set[Path] = set()
    output = leave_out.absolute() if leave_out is not None else None
    files: list[Path] = []

    def flush() -> Iterator[Images]:
        if files:
            yield Files(files.copy())
            files.clear()

    for text in map(os.fspath, inputs):
        path = Path(text).expanduser()
        found = [path] if path.exists() else match_pattern(str(path))
        members = [member for match in found for member in _expand(match, named=match == path)]
        if not members:
            raise UserError(f"{text}: {'no images there' if found else 'no such file or directory'}")
        for member in members:
            absolute = member.absolute()
            if absolute in seen or absolute == output or output in absolute.parents:
                continue
            seen.add(absolute)
            if member.is_dir() or member.suffix.lower() in DATASET_SUFFIXES:
                yield from flush()
                yield LocalDataset(member, image_column_name)
            else:
                files.append(member)
    yield from flush()


def open_dataset(location: str, **how: Any) -> Any:
    """As `data.datasets.open_images`, with a UserError where the packages for it are missing."""
    try:
        from ..data.datasets import open_images
    except ImportError as error:
        raise UserError(
            f"reading datasets needs more packages ({error.name}): pip install 'hf-poolformer[train]'"
        ) from error
    return open_images(location, **how)


def _expand(path: Path, named: bool) -> list[Path]:
    """Image files and datasets at or below `path`. A file that was named outright is tried whatever its suffix."""
    if not path.is_dir():
        return [path] if named or path.suffix.lower() in DATASET_SUFFIXES or image_files([path]) else []
    if is_saved_dataset(path):
        return [path]
    files = list(list_files(path))
    images = set(image_files(files))
    parquet = [file for file in files if file.suffix.lower() in PARQUET_SUFFIXES]
    # Among images, a table that has none is about them.
    tables = {file for file in parquet if not has_image_column(file)} if images else set()
    datasets = {file for file in files if file.suffix.lower() in DATASET_SUFFIXES} - tables
    left_out = count_by_suffix([file for file in files if file not in images and file not in datasets])
    if left_out:
        logger.warning("%s: not read: %s%s", path, counted(left_out), heif_hint(left_out))
    return [file for file in files if file in images or file in datasets]
