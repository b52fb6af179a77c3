"""Where images lie: the Hub, folders, Parquet, WebDataset tars and datasets saved on disk, all as streams.

A source knows its splits and opens each as a stream of undecoded rows. What the columns mean is decided in `data.py`.
"""

import abc
import glob
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from datasets import ClassLabel, Features, Image, IterableDataset, load_dataset

from .errors import UserError
from .files import IMAGE_SUFFIXES, PARQUET_SUFFIXES, TAR_SUFFIXES, is_saved_dataset, list_files, one_line


logger = logging.getLogger(__name__)

SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_METADATA_FILES = frozenset(["metadata.csv", "metadata.jsonl", "metadata.parquet"])
# Shards of a folder are only lists of paths: enough of them for any number of workers, and a power of two so that
# they divide evenly among processes.
_FOLDER_SHARDS = 1024
_HASHED_BYTES = 16384


@dataclass(frozen=True)
class Split:
    """One split of a source: rows as they are stored, and how many, if that could be had cheaply."""

    stream: IterableDataset
    num_examples: int | None


class Source(abc.ABC):
    """A dataset with named splits.

    Attributes:
        local_bytes: size of its files here, None for a remote one.
        reads_columns: a column can be had without reading the images, and is at hand.
    """

    name: str
    splits: list[str]
    local_bytes: int | None = None
    reads_columns: bool = True
    left_out: Mapping[str, int] = {}

    @abc.abstractmethod
    def open(self, split: str) -> Split:
        """Opens one of `splits`."""

    def split_origin(self, split: str) -> str:
        """What made these rows this split."""
        return ""

    def column(self, split: str, column: str) -> Iterator[Any]:
        """All values of one column, without reading the others where the format allows it."""
        for row in self.open(split).stream.select_columns([column]):
            yield row[column]

    def split_named(self, wanted: str) -> str | None:
        """The split that a person means by `wanted`: itself, or one by an alias (`val` for `validation`)."""
        if wanted in self.splits:
            return wanted
        alike = [split for split in self.splits if _canonical(split) == _canonical(wanted)]
        return alike[0] if len(alike) == 1 else None


class HubSource(Source):
    """A dataset repository on the Hub, streamed unless told otherwise."""

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
        self._arguments = {"path": dataset_name, "name": config_name, "revision": revision, "token": token}
        self._arguments["cache_dir"] = cache_dir
        self._opened = self._load()
        self.splits = list(self._opened)

    def _load(self, **arguments: Any) -> Any:
        try:
            return load_dataset(**self._arguments, streaming=self._streaming, **arguments)
        except Exception as error:
            raise UserError(_hub_failure(self.name, error)) from error

    def open(self, split: str) -> Split:
        opened = self._opened[split]
        if isinstance(opened, datasets.Dataset):
            return _from_memory_map(opened)
        described = (opened.info.splits or {}).get(split)
        return Split(opened, (described.num_examples or None) if described is not None else None)

    def column(self, split: str, column: str) -> Iterator[Any]:
        if not self._streaming:
            yield from self._opened[split].select_columns([column])[column]
            return
        try:
            rows = self._load(columns=[column])[split]  # a Parquet column can be had alone
        except UserError:
            rows = self._opened[split].select_columns([column])
        for row in rows:
            yield row[column]


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

    def column(self, split: str, column: str) -> Iterator[Any]:
        yield from self._opened[split].select_columns([column])[column]


class FileSource(Source):
    """Local Parquet files, WebDataset tars, or an image folder with a metadata file, read by `datasets`."""

    def __init__(self, name: str, builder: str, files: dict[str, list[Path]], cache_dir: str | None = None):
        self.name = name
        self.splits = list(files)
        self.reads_columns = builder != "webdataset"
        self._builder = builder
        self._files = files
        self._cache_dir = cache_dir
        self.local_bytes = sum(file.stat().st_size for paths in files.values() for file in paths)

    def _load(self, split: str, **arguments: Any) -> IterableDataset:
        paths = [glob.escape(str(path)) for path in self._files[split]]
        try:
            opened = load_dataset(
                self._builder, data_files={"data": paths}, streaming=True, cache_dir=self._cache_dir, **arguments
            )
        except Exception as error:
            raise UserError(f"{self.name} cannot be read as {self._builder}: {one_line(error)}") from error
        return opened["data"]

    def open(self, split: str) -> Split:
        return Split(self._load(split), self._count(split))

    def column(self, split: str, column: str) -> Iterator[Any]:
        if self._builder == "parquet":
            for path in self._files[split]:
                with pyarrow.parquet.ParquetFile(path) as file:
                    for batch in file.iter_batches(columns=[column]):
                        yield from batch.column(0).to_pylist()
            return
        for row in self._load(split).select_columns([column]):
            yield row[column]

    def _count(self, split: str) -> int | None:
        try:
            if self._builder == "parquet":
                return sum(pyarrow.parquet.read_metadata(path).num_rows for path in self._files[split])
            if self._builder == "webdataset":
                return sum(_count_tar_samples(path) for path in self._files[split])
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{self.name} has a damaged file: {one_line(error)}") from error
        return None


class FolderSource(Source):
    """Image files; the class of each is the name of the first directory below the split's root."""

    def __init__(self, name: str, files: dict[str, list[tuple[Path, str | None]]]):
        self.name = name
        self.splits = list(files)
        self._files = files

    def open(self, split: str) -> Split:
        return self._stream(self._files[split], self._classes(split))

    def divide(self, split: str, fraction: float) -> tuple[Split, Split]:
        """Train and held-out parts by content hash. The files are read once, here, not at every pass."""
        files = self._files[split]

        def held_out(file: tuple[Path, str | None]) -> bool:
            return is_held_out(file_content_key(file[0]), fraction)

        with ThreadPoolExecutor(16) as pool:
            verdicts = list(pool.map(held_out, files))
        train = [file for file, verdict in zip(files, verdicts, strict=True) if not verdict]
        rest = [file for file, verdict in zip(files, verdicts, strict=True) if verdict]
        classes = self._classes(split)
        return self._stream(train, classes), self._stream(rest, classes)

    def _classes(self, split: str) -> list[str] | None:
        names = {label for _, label in self._files[split]}
        return None if names <= {None} else sorted(names)

    def _stream(self, files: list[tuple[Path, str | None]], classes: list[str] | None) -> Split:
        features = Features({"image": Image(decode=False)})
        if classes is not None:
            features["label"] = ClassLabel(names=classes)
        indices = {name: index for index, name in enumerate(classes or [])}
        # Files of one class lie together on disk: dealt out at random, every shard is a sample of the whole.
        order = np.random.default_rng(0).permutation(len(files))
        num_shards = min(_FOLDER_SHARDS, 1 << max(len(files).bit_length() - 1, 0))
        shards = []
        for shard in range(num_shards):
            chosen = [files[index] for index in order[shard::num_shards]]
            # One string and one array per shard, not a million small objects for each worker to copy.
            paths = "\0".join(str(path) for path, _ in chosen)
            shards.append((paths, np.array([indices.get(label, -1) for _, label in chosen], dtype=np.int32)))
        rows = _folder_rows if classes is not None else _unlabelled_folder_rows
        return Split(IterableDataset.from_generator(rows, features, gen_kwargs={"shards": shards}), len(files))


def _folder_rows(shards: list[tuple[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
    for paths, labels in shards:
        for path, label in zip(paths.split("\0") if paths else [], labels, strict=True):
            yield {"image": {"bytes": None, "path": path}, "label": int(label)}


def _unlabelled_folder_rows(shards: list[tuple[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
    for row in _folder_rows(shards):
        yield {"image": row["image"]}


def open_source(
    location: str | os.PathLike,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    streaming: bool = True,
    extra_splits: tuple[str, ...] = (),
    whole: bool = False,
) -> Source:
    """Opens whatever `location` names, told by content.

    Args:
        location: a directory, file or glob pattern here, otherwise a dataset id on the Hub.
        extra_splits: names, beside the usual ones, by which files or folders may be told apart.
        whole: take everything found as one split, `train`, whatever its names say.

    Raises:
        UserError: nothing there, or nothing that holds images.
    """
    text = os.fspath(location)
    path = Path(text).expanduser()
    if path.is_dir():
        return _open_directory(path, extra_splits, whole, cache_dir)
    matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if matches:
        return _open_files(text, [match for match in matches if match.is_file()], extra_splits, whole, cache_dir)
    if _looks_local(text):
        raise UserError(f"{text}: no such file or directory")
    return HubSource(text, config_name, revision=revision, token=token, cache_dir=cache_dir, streaming=streaming)


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


def _canonical(split: str) -> str:
    lowered = split.lower()
    return next((name for name, aliases in SPLIT_ALIASES.items() if lowered in aliases), split)


def _looks_local(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.count("/") > 1
        or glob.has_magic(text)
        or Path(text).suffix.lower() in IMAGE_SUFFIXES | PARQUET_SUFFIXES | TAR_SUFFIXES
    )


def _open_directory(root: Path, extra_splits: tuple[str, ...], whole: bool, cache_dir: str | None) -> Source:
    if is_saved_dataset(root):
        return SavedSource(root)
    files = list(list_files(root))
    source = _open_by_suffix(str(root), files, root, extra_splits, whole, cache_dir)
    if source is not None:
        return source
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise UserError(
            f"{root} holds {f'{len(files)} files but ' if files else ''}no images, Parquet files or WebDataset tars"
        )
    splits = {"train": (root, images)} if whole else _folder_splits(root, images, extra_splits)
    return FolderSource(
        str(root), {split: _with_classes(below, members) for split, (below, members) in splits.items()}
    )


def _open_files(
    name: str, files: list[Path], extra_splits: tuple[str, ...], whole: bool, cache_dir: str | None
) -> Source:
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    source = _open_by_suffix(name, files, root, extra_splits, whole, cache_dir)
    if source is not None:
        return source
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise UserError(f"{name} is neither an image nor a Parquet file nor a WebDataset tar")
    return FolderSource(name, {"train": [(file, None) for file in images]})


def _open_by_suffix(
    name: str, files: list[Path], root: Path, extra_splits: tuple[str, ...], whole: bool, cache_dir: str | None
) -> Source | None:
    """Parquet, tars and folders with a metadata file; None where none of these is found."""
    parquet = [file for file in files if file.suffix.lower() in PARQUET_SUFFIXES and file.name not in _METADATA_FILES]
    tars = [file for file in files if file.suffix.lower() in TAR_SUFFIXES]
    described = [file for file in files if file.name in _METADATA_FILES]
    if parquet:
        chosen, builder = parquet, "parquet"
    elif tars:
        chosen, builder = tars, "webdataset"
    elif described:
        chosen, builder = described + [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES], "imagefolder"
    else:
        return None
    splits = {"train": chosen} if whole else _file_splits(root, chosen, extra_splits)
    return FileSource(name, builder, splits, cache_dir)


def _file_splits(root: Path, files: list[Path], extra_splits: tuple[str, ...]) -> dict[str, list[Path]]:
    """Files by the split that a directory or a word of the file's name tells (`data/train-00000-of-00002.parquet`)."""
    splits: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        relative = file.relative_to(root)
        words = [*relative.parts[:-1], *re.split(r"[-._ 0-9]+", relative.stem)]
        split = next((name for name in map(_split_name(extra_splits), words) if name), None)
        if split is None:
            unnamed.append(file)
        else:
            splits.setdefault(split, []).append(file)
    if not splits:
        return {"train": unnamed}
    if unnamed:
        logger.warning(
            "%s: %d of %d files are named after no split and are left out, %s for one",
            root,
            len(unnamed),
            len(files),
            unnamed[0].name,
        )
    return splits


def _folder_splits(
    root: Path, images: list[Path], extra_splits: tuple[str, ...]
) -> dict[str, tuple[Path, list[Path]]]:
    """Splits are the top directories, if each is named after one; otherwise the top directories are classes."""
    by_top: dict[str | None, list[Path]] = {}
    for image in images:
        parts = image.relative_to(root).parts
        by_top.setdefault(parts[0] if len(parts) > 1 else None, []).append(image)
    name_of = _split_name(extra_splits)
    names = {top: name_of(top) if top else None for top in by_top}
    if all(names.values()):
        splits: dict[str, tuple[Path, list[Path]]] = {}
        for top, members in by_top.items():
            if names[top] in splits:
                raise UserError(f"{root} has two directories for one split: {splits[names[top]][0].name} and {top}")
            splits[names[top]] = (root / top, members)
        return splits
    return {"train": (root, images)}


def _split_name(extra_splits: tuple[str, ...]) -> Callable[[str], str | None]:
    def name_of(word: str) -> str | None:
        if word in extra_splits:
            return word
        canonical = _canonical(word)
        return canonical if canonical in SPLIT_ALIASES else None

    return name_of


def _with_classes(root: Path, images: list[Path]) -> list[tuple[Path, str | None]]:
    relative = [image.relative_to(root).parts for image in images]
    # A lone directory between the root and the classes (dataset/images/cat/1.jpg) says nothing.
    depth = 0
    while len({parts[depth] for parts in relative}) == 1 and all(len(parts) > depth + 2 for parts in relative):
        depth += 1
    loose = [image for image, parts in zip(images, relative, strict=True) if len(parts) == depth + 1]
    if len(loose) == len(images):
        return [(image, None) for image in images]
    if loose:
        raise UserError(
            f"{root} has {len(loose)} images beside its class directories, {loose[0].name} for one: "
            "move them into a directory named after their class, or away"
        )
    return [(image, parts[depth]) for image, parts in zip(images, relative, strict=True)]


def _from_memory_map(dataset: datasets.Dataset) -> Split:
    num_shards = max(1, min(64, len(dataset)))
    return Split(dataset.to_iterable_dataset(num_shards=num_shards), len(dataset))


def _count_tar_samples(path: Path) -> int:
    keys = set()
    with open(path, "rb") as file:
        file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        if file.read().strip(b"\0"):
            # Reading will not notice: to tarfile, an archive that breaks off has simply ended.
            logger.warning("%s has no end-of-archive mark, it is probably truncated", path)
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            # As WebDataset has it: a sample is what shares a path up to the first dot of the file's name.
            directory, name = os.path.split(member.name)
            if member.isfile() and "." in name and not name.startswith("."):
                keys.add((directory, name.split(".", 1)[0]))
    return len(keys)


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
