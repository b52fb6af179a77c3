"""Files of the Hub, of which a stream fetches what it needs, and fetches it once.

A stream is read again and again: by every process that has a share of its files, in every epoch, and a few times
before the first. Under `hubfiles://` instead of `hf://` a file is read without reading ahead, and by way of a folder
that all processes of this machine share and which outlives them, unless the dataset is too large for that. Columns
that nobody needs are not fetched.

What is kept are blocks. A block is called after the hash by which the Hub knows the content of its file, so that it
never is another commit's. It is written aside and renamed, and a block without all its bytes counts as none: whoever
is killed leaves nothing that misleads.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from datasets import config
from datasets.data_files import DataFilesDict, DataFilesList
from fsspec.caching import BaseCache
from fsspec.spec import AbstractBufferedFile
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.hf_file_system import HfFileSystemFile
from huggingface_hub.utils import WeakFileLock

from ..foundation.errors import one_line


logger = logging.getLogger(__name__)

PROTOCOL = "hubfiles"
BLOCK = 1 << 22  # bytes
# Bytes that are read ahead where nothing is kept: labels lie behind their images, and take few bytes. The 5 MiB that
# `fsspec` would read are for nothing wherever a reader goes to another row group.
_AHEAD = 1 << 16
# Blocks that are asked for together, where reading goes on from one to the next.
_TOGETHER = 2
# Of a file, those that are held in memory: images and labels lie in different ones.
_HELD = 3
_LOCKS = 256
# What is kept of a dataset takes at most this share of the disk's free bytes, and leaves so many in any case.
SHARE = 0.1
_RESERVE = 1 << 30

_HASH = re.compile(r"[0-9a-f]{40,64}")
_COMMIT = re.compile(r"hf://datasets/[^@]+@[0-9a-f]{40}/")


class Reading(NamedTuple):
    """
    Attributes:
        files: the same ones, under other addresses.
        storage_options: for whoever opens these.
    """

    files: DataFilesDict
    storage_options: dict[str, dict[str, Any]]


class HubFiles(HfFileSystem):
    """The Hub's file system, for reading.

    Args:
        folder: where blocks are kept; None keeps none.
    """

    protocol = PROTOCOL

    def __init__(self, *args: Any, folder: str | None = None, **options: Any):
        super().__init__(*args, **options)
        self._folder = folder

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, revision: str | None = None, **others: Any
    ) -> AbstractBufferedFile:
        if self._folder is not None:
            return _KeptFile(self._folder, self, path, mode=mode, revision=revision, cache_type="none")
        # 0 asks for the whole file as one long answer.
        return super()._open(path, mode, 0 if block_size == 0 else _AHEAD, revision, **others)


fsspec.register_implementation(PROTOCOL, f"{__name__}.{HubFiles.__name__}", clobber=True)


class _KeptFile(HfFileSystemFile):
    def __init__(self, folder: str, fs: HubFiles, path: str, **options: Any):
        super().__init__(fs, path, **options)
        self.cache = _Blocks(Path(folder), _content(self.details), self._fetch_range, self.size)

    def read(self, length: int = -1) -> bytes:
        return AbstractBufferedFile.read(self, length)  # the other one asks for a whole file as one long answer


class _Blocks(BaseCache):
    """The bytes of one file.

    Args:
        content: the hash of the file's.
        fetcher: (start, stop) -> bytes, from the server.
    """

    name = PROTOCOL
    keeps = True

    def __init__(self, folder: Path, content: str, fetcher: Any, size: int):
        super().__init__(BLOCK, fetcher, size)
        self._folder, self._content = folder, content
        self._held: dict[int, bytes] = {}

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        start, stop = start or 0, self.size if stop is None else min(stop, self.size)
        if start >= stop:
            return b""
        numbers = range(start // BLOCK, -(-stop // BLOCK))
        return b"".join(
            self._block(number, numbers[-1])[max(start - number * BLOCK, 0) : stop - number * BLOCK]
            for number in numbers
        )

    def _block(self, number: int, last: int) -> bytes:
        """A block; the caller is going to ask for those up to `last`."""
        if number not in self._held and (data := self._read(number)) is not None:
            self._hold(number, data)
        if number not in self._held:
            goes_on = number - 1 in self._held
            end = -(-self.size // BLOCK) if goes_on else last + 1
            span = range(number, min(end, (number // _TOGETHER + 1) * _TOGETHER))
            with self._alone(number // _TOGETHER):
                self._ask(span)
        return self._held[number]

    def _ask(self, span: range) -> None:
        """Fetches what of these blocks is not there, unless another process has done so meanwhile."""
        missing = []
        for number in span:
            data = self._read(number)
            if data is None:
                missing.append(number)
            else:
                self._hold(number, data)
        if not missing:
            return
        start, stop = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, self.size)
        data = self.fetcher(start, stop)
        if len(data) != stop - start:
            raise ConnectionError(f"of {stop - start} bytes from {start} on, the server has sent {len(data)}")
        for number in missing:
            block = data[number * BLOCK - start : (number + 1) * BLOCK - start]
            self._keep(number, block)
            self._hold(number, block)

    def _hold(self, number: int, data: bytes) -> None:
        self._held[number] = data
        while len(self._held) > _HELD:
            del self._held[next(iter(self._held))]

    def _path(self, number: int) -> Path:
        return self._folder / self._content[:2] / f"{self._content}-{number}"

    def _read(self, number: int) -> bytes | None:
        with contextlib.suppress(OSError):
            data = self._path(number).read_bytes()
            if len(data) == min(BLOCK, self.size - number * BLOCK):
                return data
        return None

    def _keep(self, number: int, data: bytes) -> None:
        """Not keeping it costs a request later, and no more."""
        if not _Blocks.keeps:
            return
        path = self._path(number)
        partial = path.with_name(f"{path.name}.partial")  # nobody else writes it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < _RESERVE:
                raise OSError("the disk is almost full")
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            _Blocks.keeps = False
            logger.warning("%s: what is streamed is not kept any more: %s", self._folder, one_line(error))
            with contextlib.suppress(OSError):
                partial.unlink()

    @contextlib.contextmanager
    def _alone(self, group: int) -> Iterator[None]:
        """No other process, and no other thread, asks for the blocks of this group meanwhile."""
        locks = self._folder / "locks"
        place = (int(self._content[:8], 16) + group) % _LOCKS
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # where nothing can be written, each asks for itself
                locks.mkdir(parents=True, exist_ok=True)
                stack.enter_context(WeakFileLock(locks / str(place)))
            yield


def _content(details: Mapping[str, Any]) -> str:
    """The hash of a file's content, as the Hub tells it; it becomes the name of a file."""
    told = str((details.get("lfs") or {}).get("sha256") or details["blob_id"])
    # Whatever else a server may say is no path.
    return told if _HASH.fullmatch(told) else hashlib.sha256(told.encode()).hexdigest()


def reading(name: str, files: DataFilesDict, token: str | bool | None, cache_dir: str | None) -> Reading | None:
    """How to read files of a dataset by way of `HubFiles`; None where they do not lie in a commit on the Hub.

    Says so where they are going to take room on the disk.

    Args:
        name: of the dataset.
        files: those of each split, `hf://...`.
    """
    addresses = {address for split in files.values() for address in split}
    if not addresses or not all(map(_COMMIT.match, addresses)):
        return None
    other = {
        split: DataFilesList(
            [f"{PROTOCOL}://{address.removeprefix('hf://')}" for address in group], group.origin_metadata
        )
        for split, group in files.items()
    }
    options = {"endpoint": config.HF_ENDPOINT, "token": token}
    hub = HfFileSystem(**options)
    folders = {address.rpartition("/")[0] for address in addresses}
    known = {f"hf://{entry['name']}": entry for folder in folders for entry in hub.ls(folder)}
    if not addresses <= known.keys():
        return None
    folder = _room_for(name, [known[address] for address in addresses], cache_dir)
    return Reading(DataFilesDict(other), {PROTOCOL: {**options, "folder": folder}})


def _room_for(name: str, files: Sequence[Mapping[str, Any]], cache_dir: str | None) -> str | None:
    """The folder in which to keep files; None where they would take too much room, or it cannot be written."""
    folder = (Path(cache_dir).expanduser() if cache_dir else Path(constants.HF_HOME)) / "hf-poolformer" / "streamed"
    size = sum(file["size"] for file in files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > SHARE * free and size > SHARE * (free + _bytes_below(folder)):
            logger.info("%s is streamed anew in every epoch: its %d MiB would take much of the disk", name, size >> 20)
            return None
        begun = any(any((folder / key[:2]).glob(f"{key}-*")) for key in map(_content, files))
    except OSError as error:
        logger.info("%s is streamed anew in every epoch: it cannot be kept: %s", name, one_line(error))
        return None
    # Seen in a plain run, too, before it takes the disk.
    say = logger.info if begun or int(os.environ.get("RANK", 0)) else logger.warning
    say(
        "%s is streamed, and what is read of its %d MiB is kept in %s, so that other processes, epochs and runs do "
        "not fetch it again; delete it when you like",
        name,
        -(-size >> 20),
        folder,
    )
    return str(folder)


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
