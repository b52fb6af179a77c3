"""Where images lie: the Hub, folders, Parquet, WebDataset tars and datasets saved on disk, all as streams.

A source knows its splits and opens each as a stream of undecoded rows. What the columns mean is decided in `data.py`,
and which source a folder is in `layouts.py`.
"""

import abc
import contextlib
import copy
import errno
import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Features, Image, IterableDataset, Value, load_dataset, load_dataset_builder
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from ..foundation.errors import UserError, one_line
from ..foundation.names import undecodable_escaped
from .classes import class_key
from .columns import ImageDataset
from .decoding import describe_source, read_bytes
from .files import image_suffixes
from .fingerprints import settled_state
from .hub_files import Reading, reading
from .parquet import ParquetRows
from .splits import canonical
from .tars import TarRanges


logger = logging.getLogger(__name__)

# Shards of a folder are only lists of paths: a power of two, so that they divide evenly among processes, and not too
# short, for opening one takes a millisecond.
_FOLDER_SHARDS = 1024
_FOLDER_ROWS = 32
_HASHED_BYTES = 16384
# Fields of WebDataset samples whose type their suffix tells, and how many .json are read to find out about theirs.
_TAR_TEXTS = frozenset(["txt", "text", "transcript"])
_TAR_NUMBERS = frozenset(["cls", "cls2", "index", "inx", "id"])
_STRUCTURES_READ = 100
# Tars are cut into ranges of at least so many bytes.
_RANGE = 1 << 22
# A dataset mapped into memory is cut into so many shards. Parquet with fewer row groups, one of them of so many bytes,
# is copied to be mapped, some rows at a time.
_SHARDS = 64
_LARGE_GROUP = 1 << 25
_COPIED_ROWS = 256
# Counting after a split by content means reading everything once; worth it up to this size.
_CHEAP_TO_READ = 1 << 30


@dataclass(frozen=True)
class Split:
    """One split of a source: rows as they are stored, and how many, if that could be had cheaply."""

    stream: IterableDataset
    num_examples: int | None


class Unit(NamedTuple):
    """What the stream of a split divides into: consecutive rows that can be read without those before them.

    Attributes:
        rows: how many.
        name: what its rows are called after: a file or folder; empty where each row is a file of its own.
        first: the number of its first row in what `name` names.
        files: that the rows lie in.
        other: what else is known of the rows, as text: their labels, where these lie in no file.
    """

    rows: int
    name: str
    first: int
    files: Sequence[Path]
    other: str = ""


class Source(abc.ABC):
    """A dataset with named splits.

    Attributes:
        local_bytes: size of its files here, None for a remote one.
        reads_columns: a column can be had without reading the images, and is at hand.
        origins: split -> where it comes from, in words, where the source can tell.
        left_out: files and rows that are there and are not read: kind (".heic", "without suffix") -> how many.
        local: its bytes are on this machine.
        label_column: the column that must hold the labels, where its name does not tell; else None.
        class_names: names of the class ids that are stored, where the source has them (COCO's categories); else None.
        unlabelled: what to say to somebody who needs a label for each image, where it is known that there is none.
    """

    name: str
    splits: list[str]
    local: bool = True
    local_bytes: int | None = None
    reads_columns: bool = True
    origins: Mapping[str, str] = MappingProxyType({})
    left_out: Mapping[str, int] = MappingProxyType({})
    label_column: str | None = None
    class_names: Mapping[int, str] | None = None
    unlabelled: str | None = None

    @abc.abstractmethod
    def open(self, split: str) -> Split:
        """Opens one of `splits`."""

    def units(self, split: str) -> list[Unit] | None:
        """What `data.stream.Shards` finds in a split when it is divided, in order; None where only reading tells."""
        return None

    def columns(self, split: str, names: list[str], shared: bool = True) -> IterableDataset:
        """Rows of these columns only, without reading the others where the format allows it.

        Args:
            shared: several workers are going to read them.
        """
        return self.open(split).stream.select_columns(names)

    def values(self, split: str, names: list[str]) -> Iterator[tuple[Any, ...]]:
        """What each row has in these columns."""
        for row in self.columns(split, names):
            yield tuple(row[name] for name in names)

    def state(self, split: str) -> str | None:
        """A text that is another one when the rows of a split are others; None where that cannot be told, or where
        reading them again costs nothing."""
        return None

    def divide(self, split: str, images: ImageDataset, fraction: float) -> tuple[Split, Split]:
        """A training part and a held-out part of a split, told apart by the content of each image.

        Args:
            images: the split, as it was opened and understood.
            fraction: of the images, held out.
        """
        stream, column = images.stream, images.image_column
        first = next(iter(stream))[column]
        if first is not None and first["bytes"] is None:
            stream = stream.map(_Fetch(column, images.token), features=stream.features)
        choose = [_InPart(fraction, held_out) for held_out in (False, True)]
        counts = (None, None)
        if self.local_bytes is not None and self.local_bytes <= _CHEAP_TO_READ:
            verdicts = [choose[1](row[column]) for row in stream.select_columns([column])]
            counts = (len(verdicts) - sum(verdicts), sum(verdicts))
        parts = (stream.filter(part, input_columns=[column]) for part in choose)
        return tuple(Split(part, count) for part, count in zip(parts, counts, strict=True))

    def split_origin(self, split: str) -> str:
        """Where a split comes from, in words."""
        own = f"its own split {split}" if len(self.splits) > 1 else "everything there is"
        return self.origins.get(split, own)

    def split_named(self, wanted: str) -> str | None:
        """The split that a person means by `wanted`: itself, or one by an alias (`val` for `validation`)."""
        if wanted in self.splits:
            return wanted
        alike = [split for split in self.splits if canonical(split) == canonical(wanted)]
        return alike[0] if len(alike) == 1 else None


class HubSource(Source):
    """A dataset repository on the Hub, streamed unless told otherwise."""

    local = False

    def __init__(
        self,
        dataset_name: str,
        config_name: str | None,
        *,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | None,
        streaming: bool,
    ):
        self.name = dataset_name
        self.reads_columns = not streaming
        self._streaming = streaming
        arguments = {"path": dataset_name, "name": config_name, "revision": revision, "token": token}
        arguments["cache_dir"] = cache_dir
        try:
            if streaming:
                self._builder = load_dataset_builder(**arguments)
                self._reading = self._prepare(cache_dir)
                self._opened = self._load()
            else:
                self._opened = load_dataset(**arguments)
        except Exception as error:
            raise UserError(_hub_failure(self.name, error)) from error
        self.splits = list(self._opened)

    def _prepare(self, cache_dir: str | None) -> Reading | None:
        """How files are read of which each holds many images, for several readers."""
        builder, files = self._builder, self._builder.config.data_files
        if isinstance(builder, (Parquet, WebDataset)):
            return reading(self.name, files, builder.token, cache_dir)
        if isinstance(builder, FolderBasedBuilder):
            # Threads would decode the images, and hang in data workers that were forked.
            builder.config.decode_num_threads = 0
            every = {file for split in files.values() for file in split}
            single = sum(os.path.splitext(file)[1].lower() in image_suffixes() for file in every)
            if single and not int(os.environ.get("RANK", 0)):
                logger.warning(
                    "%s is streamed: each of its %d images is asked for by itself, in every epoch; --streaming false "
                    "downloads them first",
                    self.name,
                    single,
                )
        return None

    def _load(self, columns: list[str] | None = None) -> dict[str, IterableDataset]:
        """Streams of all splits. `columns` is heeded for Parquet, of which others are not even downloaded."""
        builder, options = self._builder, None if self._reading is None else self._reading.storage_options
        if isinstance(builder, Parquet):
            info, known = copy.deepcopy(builder.info), builder.config
            files = {"data_files": known.data_files, "base_path": builder.base_path, "repo_id": builder.repo_id}
            how = {"dataset_name": builder.dataset_name, "features": known.features, "token": builder.token}
            builder = ParquetRows(**files, **how, columns=columns, info=info, storage_options=options)
        if self._reading is not None:
            builder.config.data_files, builder.storage_options = self._reading
        return builder.as_streaming_dataset()

    def split_origin(self, split: str) -> str:
        return f"the Hub's split {split}"

    def open(self, split: str) -> Split:
        opened = self._opened[split]
        if isinstance(opened, datasets.Dataset):
            return _from_memory_map(opened)
        described = (opened.info.splits or {}).get(split)
        return Split(opened, (described.num_examples or None) if described is not None else None)

    def values(self, split: str, names: list[str]) -> Iterator[tuple[Any, ...]]:
        return super().values(split, names) if self._streaming else _values(self._opened[split], names)

    def state(self, split: str) -> str | None:
        if not self._streaming:
            return _state_of_maps(self._opened[split])
        builder = self._builder
        # Of a dataset on the Hub, its commit.
        commit = re.fullmatch(r"[0-9a-f]{40}", builder.hash or "")
        return f"{builder.repo_id} {builder.config_id} {commit[0]}" if commit and builder.repo_id else None

    def units(self, split: str) -> list[Unit] | None:
        return None if self._streaming else _units_of_maps(self.name, self._opened[split])

    def columns(self, split: str, names: list[str], shared: bool = True) -> IterableDataset:
        if not self._streaming:
            return super().columns(split, names)
        return self._load(names)[split].select_columns(names)


class SavedSource(Source):
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""

    def __init__(self, root: Path):
        self.name = str(root)
        try:
            opened = datasets.load_from_disk(str(root))
        except Exception as error:
            raise UserError(f"{root} looks like a saved dataset but cannot be opened: {one_line(error)}") from error
        self._opened = opened if isinstance(opened, datasets.DatasetDict) else {"train": opened}
        self.splits = list(self._opened)
        self.local_bytes = sum(file.stat().st_size for file in root.rglob("*.arrow"))

    def open(self, split: str) -> Split:
        return _from_memory_map(self._opened[split])

    def units(self, split: str) -> list[Unit]:
        name = os.path.join(self.name, split) if len(self.splits) > 1 else self.name
        return _units_of_maps(name, self._opened[split])

    def values(self, split: str, names: list[str]) -> Iterator[tuple[Any, ...]]:
        return _values(self._opened[split], names)

    def state(self, split: str) -> str | None:
        return _state_of_maps(self._opened[split])


@dataclass
class FileSource(Source):
    """Local files of which each holds many images.

    Args:
        files: of each split.
        cache_dir: where `datasets` keeps what it makes of them.
    """

    name: str
    files: dict[str, list[Path]]
    origins: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        self.splits = list(self.files)
        self.local_bytes = sum(file.stat().st_size for paths in self.files.values() for file in paths)

    def open(self, split: str) -> Split:
        stream = self._load(split)
        try:
            return Split(stream, self._count(split))
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{self.name} has a damaged file: {one_line(error)}") from error

    def state(self, split: str) -> str | None:
        return settled_state(self.files[split])

    @abc.abstractmethod
    def _load(self, split: str) -> IterableDataset: ...

    @abc.abstractmethod
    def _count(self, split: str) -> int: ...

    def _built(self, builder: type[datasets.DatasetBuilder], split: str, **arguments: Any) -> IterableDataset:
        """A stream of the files of a split, read by a builder of `datasets`."""
        try:
            return self._builder(builder, split, **arguments).as_streaming_dataset("data")
        except Exception as error:
            kind = builder.__mro__[1].__name__
            raise UserError(f"{self.name} cannot be read as {kind}: {one_line(error)}") from error

    def _builder(
        self, builder: type[datasets.DatasetBuilder], split: str, **arguments: Any
    ) -> datasets.DatasetBuilder:
        paths = [glob.escape(str(path)) for path in self.files[split]]
        return builder(data_files={"data": paths}, cache_dir=self.cache_dir, **arguments)


class ParquetSource(FileSource):
    """Local Parquet files.

    A row in the middle of a row group is had by decoding all that lies before it, and pages of it may be as large as
    the file. Where row groups are large and few, workers would decode the same bytes over and over: the columns that
    are needed are then written once, as `datasets` does for whatever it does not stream, and mapped into memory.
    """

    def units(self, split: str) -> list[Unit]:
        units = []
        for path in self.files[split]:
            known, first = pyarrow.parquet.read_metadata(path), 0
            for group in range(known.num_row_groups):
                units.append(Unit(known.row_group(group).num_rows, str(path), first, [path]))
                first += units[-1].rows
        return units

    def columns(self, split: str, names: list[str], shared: bool = True) -> IterableDataset:
        copied = self._copy(split, names) if shared and self._is_hard_to_share(split) else None
        stream = self._built(ParquetRows, split, columns=names) if copied is None else _from_memory_map(copied).stream
        return stream.select_columns(names)

    def values(self, split: str, names: list[str]) -> Iterator[tuple[Any, ...]]:
        for path in self.files[split]:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=names):
                    yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)

    def _is_hard_to_share(self, split: str) -> bool:
        known = [pyarrow.parquet.read_metadata(path) for path in self.files[split]]
        sizes = [file.row_group(group).total_byte_size for file in known for group in range(file.num_row_groups)]
        return len(sizes) < _SHARDS and max(sizes, default=0) >= _LARGE_GROUP

    def _copy(self, split: str, names: list[str]) -> datasets.Dataset | None:
        """These columns in a file that can be mapped, written unless it is there; None where that fails.

        Raises:
            UserError: it cannot be kept here, and there are other processes. Some might have it, and deal by it.
        """
        builder = self._builder(ParquetRows, split, columns=names, batch_size=_COPIED_ROWS)
        # Seen in a plain run, too, before it takes the disk.
        say = logger.info if os.path.isdir(builder.cache_dir) else logger.warning
        say(
            "%s has few and large row groups: data workers read a copy of what they need, at most %d MiB, in %s",
            self.name,
            self.local_bytes >> 20,
            builder.cache_dir,
        )
        # `datasets` refuses to begin if there is less room. As much again stays for what else is going to be written.
        builder.info.size_in_bytes = 2 * self.local_bytes
        try:
            builder.download_and_prepare()
            return builder.as_dataset("data")
        except Exception as error:
            reason = one_line(error.__cause__ or error)
            # What is damaged is so for everybody, and as a stream it is read up to the damage.
            full = getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            damaged = isinstance(error, datasets.exceptions.DatasetGenerationError) and not full
            if not damaged and int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise UserError(
                    f"{self.name} has few and large row groups, and a copy for the data workers cannot be kept in "
                    f"{builder.cache_dir}: {reason}. Give another --cache_dir, or write it with smaller row groups"
                ) from error
            logger.warning("%s is read without a copy, slowly if there are many workers: %s", self.name, reason)
            return None

    def _load(self, split: str) -> IterableDataset:
        return self._built(ParquetRows, split)

    def _count(self, split: str) -> int:
        return sum(pyarrow.parquet.read_metadata(path).num_rows for path in self.files[split])


class TarSource(FileSource):
    """WebDataset tars. Where one sample has its image as .jpg and the next as .png, both are the column `image`."""

    reads_columns = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._contents: dict[str, TarContents] = {}

    def _load(self, split: str) -> IterableDataset:
        try:
            contents = self._look(split)
            features, alternatives = contents.mixed_features(), contents.alternatives()
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{self.name} has a damaged file: {one_line(error)}") from error
        stream = self._built(TarRanges, split, features=features, starts=contents.starts)
        if features is None and "Value('null')" in repr(stream.features):
            # `datasets` looks at five samples, in which a list may be empty, or a field missing.
            stream = self._built(TarRanges, split, features=contents.features(), starts=contents.starts)
        if features is None or not alternatives:
            return stream
        merged = Features({"image": Image(decode=False)})
        merged.update({name: feature for name, feature in features.items() if name not in alternatives})
        undecoded = Features({**features, **dict.fromkeys(alternatives, Image(decode=False))})
        stream = stream.cast(undecoded)
        return stream.map(_OneImage(alternatives), remove_columns=alternatives, features=merged)

    def _count(self, split: str) -> int:
        return self._look(split).count

    def units(self, split: str) -> list[Unit]:
        known, units = self._look(split), []
        for path in self.files[split]:
            first = 0
            for rows in known.rows[os.path.abspath(path)]:
                units.append(Unit(rows, str(path), first, [path]))
                first += rows
        return units

    def _look(self, split: str) -> "TarContents":
        if split not in self._contents:
            self._contents[split] = TarContents(self.files[split])
        return self._contents[split]


class TarContents:
    """What the samples of tars are made of.

    Attributes:
        count: samples.
        kinds: the sets of fields (`jpg`, `cls`) that samples have.
        starts: path -> the bytes at which it may be entered: at the first sample, and at others far enough apart.
        rows: path -> samples from each of these on.
    """

    def __init__(self, paths: Sequence[Path]):
        self.count = 0
        self.kinds: set[frozenset[str]] = set()
        self.starts: dict[str, list[int]] = {}
        self.rows: dict[str, list[int]] = {}
        self._structures: dict[str, list[Any]] = {}
        for path in paths:
            self._add(path)

    def alternatives(self) -> list[str]:
        """Fields that are images and of which each sample has at most one, if there are several."""
        images = sorted({name for kind in self.kinds for name in kind if f".{name.lower()}" in image_suffixes()})
        alone = all(len(kind.intersection(images)) <= 1 for kind in self.kinds)
        return images if alone and len(images) > 1 else []

    def mixed_features(self) -> Features | None:
        """Features of all fields where samples differ in theirs, which `datasets` does not read of itself."""
        return self.features() if len(self.kinds) > 1 else None

    def features(self) -> Features | None:
        """Features of all fields, by their names and by more samples than `datasets` looks at; None where these do
        not tell them."""
        features = Features({"__key__": Value("string"), "__url__": Value("string")})
        for name in sorted({name for kind in self.kinds for name in kind}):
            suffix = name.rsplit(".", 1)[-1].lower()
            if f".{suffix}" in image_suffixes():
                features[name] = Image()
            elif suffix in _TAR_TEXTS:
                features[name] = Value("string")
            elif suffix in _TAR_NUMBERS:
                features[name] = Value("int64")
            elif name in self._structures:
                known = pyarrow.Table.from_pylist([{name: value} for value in self._structures[name]])
                features.update(Features.from_arrow_schema(known.schema))
            else:
                return None
        return features

    def _add(self, path: Path) -> None:
        with open(path, "rb") as file:
            file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
            if file.read().strip(b"\0"):
                # Reading will not notice: to tarfile, an archive that breaks off has simply ended.
                logger.warning("%s has no end-of-archive mark, it is probably truncated", path)
        key, fields = None, set()
        starts = self.starts[os.path.abspath(path)] = [0]
        rows = self.rows[os.path.abspath(path)] = [0]
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # As WebDataset has it: a sample is what shares a path up to the first dot of the file's name.
                directory, name = os.path.split(member.name)
                stem, _, field = name.partition(".")
                if not member.isfile() or not field or name.startswith((".", "__")):
                    continue
                if (directory, stem) != key:
                    self._end(fields, rows)
                    if member.offset >= starts[-1] + _RANGE and not tar.pax_headers:  # these would be missed
                        starts.append(member.offset)
                        rows.append(0)
                    key, fields = (directory, stem), set()
                fields.add(field)
                known = self._structures.setdefault(field, []) if field.lower().endswith(("json", "jsn")) else None
                if known is not None and len(known) < _STRUCTURES_READ:
                    known.append(json.loads(tar.extractfile(member).read()))
        self._end(fields, rows)

    def _end(self, fields: set[str], rows: list[int]) -> None:
        if fields:
            self.count += 1
            rows[-1] += 1
            self.kinds.add(frozenset(fields))


class _OneImage:
    """Map: the image of a sample that has it under one of several names."""

    def __init__(self, alternatives: list[str]):
        self._alternatives = alternatives

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"image": next((row[name] for name in self._alternatives if row[name] is not None), None)}


@dataclass(frozen=True)
class Listed:
    """The rows of one split of a folder.

    Attributes:
        files: column -> the picture of each row; the first column holds the images.
        table: the other columns, if any.
        features: of the table, where its types do not tell them.
    """

    files: dict[str, list[Path | None]]
    table: pyarrow.Table | None = None
    features: Features | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def images(self) -> list[Path]:
        return next(iter(self.files.values()))

    def taken(self, indices: np.ndarray) -> "Listed":
        files = {column: [paths[index] for index in indices] for column, paths in self.files.items()}
        return Listed(files, None if self.table is None else self.table.take(indices), self.features)


@dataclass
class FolderSource(Source):
    """Image files, and what is known of each: its class, its annotations, the columns of a table.

    Args:
        rows: of each split.
    """

    name: str
    rows: dict[str, Listed]
    origins: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    label_column: str | None = None
    class_names: Mapping[int, str] | None = None
    unlabelled: str | None = None

    def __post_init__(self) -> None:
        self.splits = list(self.rows)

    def open(self, split: str) -> Split:
        return _stream(self.rows[split])

    def units(self, split: str) -> list[Unit]:
        units = []
        for rows in _in_shards(self.rows[split]):
            files = [path for paths in rows.files.values() for path in paths if path is not None]
            labels = "" if rows.table is None else repr(rows.table.to_pydict())
            units.append(Unit(len(rows), "", 0, files, labels))
        return units

    def values(self, split: str, names: list[str]) -> Iterator[tuple[Any, ...]]:
        table = self.rows[split].table
        if table is None or not set(names).issubset(table.column_names):
            return super().values(split, names)
        return zip(*(table[name].to_pylist() for name in names), strict=True)

    def divide(self, split: str, images: ImageDataset, fraction: float) -> tuple[Split, Split]:
        """As of any source; but the files are read once, here, not at every pass."""
        rows = self.rows[split]
        with ThreadPoolExecutor(16) as pool:
            keys = pool.map(file_content_key, rows.images)
            held_out = np.array([is_held_out(key, fraction) for key in keys], dtype=bool)
        return _stream(rows.taken(np.flatnonzero(~held_out))), _stream(rows.taken(np.flatnonzero(held_out)))


class _InPart:
    """Filter: the rows that belong to the held-out part, or to the rest."""

    def __init__(self, fraction: float, held_out: bool):
        self._fraction = fraction
        self._held_out = held_out

    def __call__(self, image: Mapping[str, Any] | None) -> bool:
        data = (image or {}).get("bytes")
        if data is None:
            data = (describe_source(image) or "").encode(errors="surrogateescape")
        return is_held_out(content_key(data), self._fraction) is self._held_out


class _Fetch:
    """Map: puts the bytes of a file into the row that names it, so that hashing and decoding read it once."""

    def __init__(self, image_column: str, token: str | bool | None):
        self._image_column = image_column
        self._token = token

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        image = row[self._image_column]
        if image is None or image["bytes"] is not None or image["path"] is None:
            return row
        with contextlib.suppress(Exception):  # left as it is, the decoder will meet the same error and report it
            row[self._image_column] = {**image, "bytes": read_bytes(image["path"], self._token)}
        return row


def rows_of_classes(files: Sequence[tuple[Path, str | None]]) -> Listed:
    """Images with the names of their classes, numbered by name; without labels where there are no classes.

    Names are text, and in one spelling of Unicode, however the file system has them.
    """
    spelled = {label: class_key(undecodable_escaped(label)) for label in {label for _, label in files} if label}
    paths, labels = [path for path, _ in files], [spelled.get(label) for _, label in files]
    classes = sorted({label for label in labels if label is not None})
    if not classes:
        return Listed({"image": paths})
    indices = {name: index for index, name in enumerate(classes)}
    numbers = np.array([indices.get(label, -1) for label in labels], dtype=np.int32)
    return Listed({"image": paths}, pyarrow.table({"label": numbers}), Features({"label": ClassLabel(names=classes)}))


def _stream(rows: Listed) -> Split:
    features = Features({column: Image(decode=False) for column in rows.files})
    if rows.table is not None:
        features.update(rows.features or Features.from_arrow_schema(rows.table.schema))
    shards = []
    for chosen in _in_shards(rows):
        # One string and one table per shard, not a million small objects for each worker to copy.
        paths = {column: "\0".join(map(_text, files)) for column, files in chosen.files.items()}
        shards.append((len(chosen), paths, chosen.table))
    return Split(IterableDataset.from_generator(_listed_rows, features, gen_kwargs={"shards": shards}), len(rows))


def _in_shards(rows: Listed) -> Iterator[Listed]:
    """Files of one class lie together on disk: dealt out at random, every shard is a sample of the whole."""
    order = np.random.default_rng(0).permutation(len(rows))
    num_shards = min(_FOLDER_SHARDS, 1 << max((len(rows) // _FOLDER_ROWS).bit_length() - 1, 0))
    return (rows.taken(order[shard::num_shards]) for shard in range(num_shards))


def _text(path: Path | None) -> str:
    return "" if path is None else str(path)


def _listed_rows(shards: list[tuple[int, dict[str, str], pyarrow.Table | None]]) -> Iterator[dict[str, Any]]:
    for count, paths, table in shards:
        columns = {column: text.split("\0") for column, text in paths.items()}
        others = [{}] * count if table is None else table.to_pylist()
        for index in range(count):
            pictures = {
                column: {"bytes": None, "path": texts[index]} if texts[index] else None
                for column, texts in columns.items()
            }
            yield {**pictures, **others[index]}


def content_key(data: bytes) -> bytes:
    """A hash of an image's encoded bytes: length, beginning and end, enough to tell photographs apart."""
    return _key(len(data), data[:_HASHED_BYTES], data[max(_HASHED_BYTES, len(data) - _HASHED_BYTES) :])


def file_content_key(path: Path) -> bytes:
    """`content_key` of a file, reading its ends only. A file that cannot be read counts as empty."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HASHED_BYTES)
            file.seek(max(_HASHED_BYTES, size - _HASHED_BYTES))
            return _key(size, head, file.read(_HASHED_BYTES))
    except OSError:
        return content_key(b"")


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether the image with this content key belongs to the held-out `fraction` of a dataset."""
    return int.from_bytes(key[:8], "big") < fraction * 2.0**64


def _key(size: int, head: bytes, tail: bytes) -> bytes:
    return hashlib.blake2b(size.to_bytes(8, "big") + head + tail, digest_size=16).digest()


def _values(dataset: datasets.Dataset, names: list[str]) -> Iterator[tuple[Any, ...]]:
    columns = dataset.select_columns(names)
    return zip(*(columns[name] for name in names), strict=True)


def _state_of_maps(dataset: datasets.Dataset) -> str | None:
    return settled_state([file["filename"] for file in dataset.cache_files])


def _units_of_maps(name: str, dataset: datasets.Dataset) -> list[Unit]:
    """As datasets divides a table into so many shards: the first ones one row longer."""
    number = _shards_of_maps(dataset)
    whole, rest = divmod(len(dataset), number)
    sizes = [whole + (index < rest) for index in range(number)]
    files = [Path(file["filename"]) for file in dataset.cache_files]
    return [Unit(size, name, sum(sizes[:index]), files) for index, size in enumerate(sizes)]


def _shards_of_maps(dataset: datasets.Dataset) -> int:
    return max(1, min(_SHARDS, len(dataset)))


def _from_memory_map(dataset: datasets.Dataset) -> Split:
    return Split(dataset.to_iterable_dataset(num_shards=_shards_of_maps(dataset)), len(dataset))


def _hub_failure(name: str, error: Exception) -> str:
    reason = one_line(error)
    kind = type(error).__name__
    if "gated" in reason.lower() or "401" in reason or "403" in reason:
        return f"no access to dataset {name!r}: {reason} (accept its terms on the Hub, then `hf auth login`)"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"there is no dataset {name!r}, neither here nor on the Hub (or it needs `hf auth login`): {reason}"
    if isinstance(error, ConnectionError) or "offline" in reason.lower() or "Connect" in kind:
        return f"dataset {name!r} is not here, and the Hub cannot be reached: {reason}"
    if "Config name is missing" in reason:
        return f"dataset {name!r} has several configurations, choose one with --dataset_config_name: {reason}"
    return f"dataset {name!r} cannot be opened: {reason}"
