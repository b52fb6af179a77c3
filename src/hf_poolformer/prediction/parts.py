"""A folder of Parquet parts that any number of processes fill, and fill up again after a kill.

    part-SSSSS-of-NNNNN-CCCCC.parquet  piece C of shard S of the inputs; sorted by name they are in input order
    .manifest.json                     what is predicted by what; written first, compared at each start
    .broken.csv                        path and reason of each broken image, if any; written when all parts are there
    .summary.json                      counts, and every part with its rows; written last

What is no part is hidden, so that whatever reads a folder of Parquet files (pandas, pyarrow, datasets) reads this one.

The parts themselves are the only record of progress: each carries, in its own metadata, where its shard goes on and
what its images were like, and takes its name by one rename. So a part is there once or not at all, whatever was
killed when, and processes need not know of each other: shard S belongs to process S modulo their number. A batch never
spans two parts, so that a restart computes the same batches and writes the same rows. A shard whose images have
changed since is predicted anew.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..foundation.errors import UserError, one_line
from ..foundation.files import put_in_place
from ..foundation.strict_json import to_json
from .inference import Predictor
from .inputs import Position, Shard
from .tables import Write, cell, unwritable


logger = logging.getLogger(__name__)

MANIFEST, SUMMARY, BROKEN = ".manifest.json", ".summary.json", ".broken.csv"

_PART = re.compile(r"part-(\d{5,})-of-(\d{5,})-(\d{5,})\.parquet")
_KEY = "hf_poolformer"

Rows = list[dict[str, Any]]


@dataclass
class Part:
    """What a part says of itself: its rows, how many of them broken, where its shard goes on, and of what it is.

    Attributes:
        run: fingerprint of the job.
        inputs: state of the shard's images when they were predicted; "" where it is not known, in older parts too.
    """

    rows: int
    broken: int
    last: bool
    position: dict[str, int]
    run: str
    inputs: str = ""


@dataclass(frozen=True)
class Tag:
    """Which part a batch belongs to, and, with its final batch, what the part will say of itself."""

    shard: int
    chunk: int
    end: bool
    last: bool
    position: dict[str, int]


def describe_run(predictor: Predictor, shards: Sequence[Shard], part_size: int) -> dict[str, Any]:
    """All that decides what the parts hold; equal for every process and every start of one job."""
    return {
        "format": 1,
        "model": predictor.digest(),
        **describe_shards(shards),
        "part_size": part_size,
        "top_k": predictor.top_k,
        "threshold": predictor.threshold,
        "dtype": predictor.dtype,
        "device_preprocessing": predictor.preprocessing.where,
        "columns": list(predictor.columns),
    }


def describe_shards(shards: Sequence[Shard]) -> dict[str, Any]:
    """Which images these are, for the description of a run."""
    sha = hashlib.sha256()
    for shard in shards:
        sha.update(shard.key.encode("utf-8", "surrogateescape") + b"\n")
    counts = [shard.count for shard in shards]
    return {
        "inputs": sha.hexdigest(),
        "images": None if None in counts else sum(counts),
        "shards": len(shards),
    }


def claim_folder(folder: Path, run: dict[str, Any], about: dict[str, Any], what: str = "predictions") -> str:
    """Makes the folder this job's, or finds that it is already.

    Args:
        run: as `describe_run` gives it.
        about: what else a person would like to know of it; not compared.
        what: the folder holds, for messages.

    Returns:
        the job's fingerprint.

    Raises:
        UserError: it holds something else.
    """
    manifest = folder / MANIFEST
    text = offer_run(folder, run, about)
    try:
        there = json.loads(manifest.read_text(encoding="utf-8"))["run"]
        differing = [name for name in run.keys() | there.keys() if run.get(name) != there.get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not _all_parts_of(folder, fingerprint(run)):
            raise UserError(
                f"{manifest} cannot be read: {one_line(error)}. Give another --output, or --overwrite"
            ) from error
        logger.warning("%s was damaged and is written anew; the parts say what they are of.", manifest)
        _publish(manifest, text, replace=True)
        differing = []
    if differing:
        words = {"model": "another model", "inputs": "other images"}
        shown = [words.get(name, f"{name} {there.get(name)} instead of {run.get(name)}") for name in sorted(differing)]
        if "inputs" in differing:
            shown = [text for text in shown if not text.startswith(("images ", "shards "))]
        raise UserError(
            f"{folder} holds {what} with {', '.join(shown)}: give another --output, or --overwrite to replace them"
        )
    return fingerprint(run)


def offer_run(folder: Path, run: dict[str, Any], about: dict[str, Any]) -> str:
    """Makes the folder this job's unless it is somebody's already; gives the text of the manifest, this job's."""
    text = to_json({"run": run, **about}, indent=2, default=str)
    if not (folder / MANIFEST).exists():
        _publish(folder / MANIFEST, text)
    return text


def claimed_run(folder: Path) -> dict[str, Any] | None:
    """The description of the run that the folder belongs to; None where there is none that can be read."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_claimed(folder: Path) -> bool:
    """Whether a job has begun to fill the folder."""
    return (folder / MANIFEST).exists()


def _all_parts_of(folder: Path, run: str) -> bool:
    """Whether every part that can be read is this job's."""
    parts = [_read_part(path) for path in folder.iterdir() if _PART.fullmatch(path.name)]
    return all(part is None or part.run == run for part in parts)


def _read_part(path: Path) -> Part | None:
    import pyarrow.parquet as pq

    try:
        part = Part(**json.loads(pq.read_metadata(path).metadata[_KEY.encode()]))
        Position(**part.position)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and will be made again: %s", path, one_line(error))
        return None
    return part


def fingerprint(run: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(run, sort_keys=True).encode()).hexdigest()[:16]


def clear_folder(folder: Path) -> None:
    """Removes what an earlier job wrote there, and nothing else; the manifest last."""
    parts = [path for path in folder.iterdir() if _PART.fullmatch(path.name) or path.name.endswith(".partial")]
    for path in [folder / SUMMARY, folder / BROKEN, *parts, folder / MANIFEST]:  # parts are nobody's without it
        path.unlink(missing_ok=True)


class Parts:
    """The parts of a job in its folder, as far as they are there."""

    def __init__(self, folder: Path, run: str, num_shards: int):
        self.folder = folder
        self._run = run
        self._num_shards = num_shards
        self._states: Mapping[int, str] = {}

    def path(self, shard: int, chunk: int) -> Path:
        return self.folder / f"part-{shard:05d}-of-{self._num_shards:05d}-{chunk:05d}.parquet"

    def list(self) -> dict[int, list[int]]:
        """Numbers of the pieces of each shard that are there without a gap."""
        found: dict[int, set[int]] = {}
        for entry in os.scandir(self.folder):
            match = _PART.fullmatch(entry.name)
            if match and int(match[2]) == self._num_shards:
                found.setdefault(int(match[1]), set()).add(int(match[3]))
        return {shard: list(range(_first_gap(chunks))) for shard, chunks in found.items()}

    def read(self, shard: int, chunk: int) -> Part | None:
        """What the part says, None if it is damaged or another job's: it is to be made again."""
        part = _read_part(self.path(shard, chunk))
        return part if part is not None and part.run == self._run else None

    def progress(self, states: Mapping[int, str]) -> dict[int, tuple[int, Part | None]]:
        """Of each of these shards the number of its next piece, and the piece before that.

        The pieces of a shard whose images have changed are removed.

        Args:
            states: number of a shard -> the state of its images now.
        """
        self._states = states
        there = self.list()
        found = {shard: self._progress(there.get(shard, [])[::-1], shard) for shard in states}
        changed = [shard for shard, (_, part) in found.items() if part is not None and part.inputs != states[shard]]
        if changed:
            logger.warning(
                "Images of %d of %d shards have changed since they were read: these shards are read anew.",
                len(changed),
                self._num_shards,
            )
            (self.folder / SUMMARY).unlink(missing_ok=True)  # no longer true
            (self.folder / BROKEN).unlink(missing_ok=True)
        for shard in changed:
            # The last first: what is left by a kill has no gap, and is known by its state again.
            for chunk in reversed(there[shard]):
                self.path(shard, chunk).unlink(missing_ok=True)
            found[shard] = (0, None)
        return found

    def _progress(self, chunks: Sequence[int], shard: int) -> tuple[int, Part | None]:
        for chunk in chunks:
            part = self.read(shard, chunk)
            if part is not None:
                return chunk + 1, part
        return 0, None

    def batches(
        self,
        shards: Sequence[Shard],
        progress: dict[int, tuple[int, Part | None]],
        part_size: int,
        batch_size: int,
    ) -> Iterator[tuple[list[Any], Tag]]:
        """`(items, Tag)` for everything that is not there yet of the shards in `progress`."""
        for number, (chunk, before) in progress.items():
            if before is not None and before.last:
                continue
            position = Position(**before.position) if before is not None else Position()
            for items, end, last, after in _cut(shards[number], position, part_size, batch_size):
                yield items, Tag(number, chunk, end, last, dataclasses.asdict(after))
                chunk += end

    def write(
        self,
        rows_of: Callable[[Any], Rows],
        table: Callable[[Path, Callable[[], dict[str, str]]], AbstractContextManager[Write]],
        loader: Any,
    ) -> Iterator[Rows]:
        """Writes the rows of what the loader yields into parts; hands out those of each batch once written.

        Args:
            rows_of: makes rows of a batch, each with `error`.
            table: opens a part, given its path and what says, in the end, its metadata: see `tables.table`.
        """
        batches = iter(loader)
        for decoded, tag in batches:  # the first of a part
            part = Part(0, 0, False, {}, self._run, self._states[tag.shard])

            def metadata(part: Part = part) -> dict[str, str]:
                return {_KEY: to_json(dataclasses.asdict(part))}

            with table(self.path(tag.shard, tag.chunk), metadata) as write:
                while True:
                    rows = rows_of(decoded)
                    write(rows)
                    part.rows += len(rows)
                    part.broken += sum(row["error"] is not None for row in rows)
                    part.last, part.position = tag.last, tag.position
                    yield rows
                    if tag.end:  # not one batch further: reading that may fail, and is no fault of this part
                        break
                    decoded, tag = next(batches)

    def complete(self) -> list[tuple[Path, Part]] | None:
        """All parts in order; None while some are missing."""
        there = self.list()
        parts: list[tuple[Path, Part]] = []
        for shard in range(self._num_shards):
            pieces = [(self.path(shard, chunk), self.read(shard, chunk)) for chunk in there.get(shard, [])]
            if not pieces or any(part is None for _, part in pieces) or not pieces[-1][1].last:
                return None
            parts += pieces
        return parts

    def finish(self) -> dict[str, Any] | None:
        """Writes `broken.csv` and `summary.json` if every shard is complete; returns the summary, else None.

        Every process asks when it is through with its own shards, so the last one finds all of them complete.
        """
        parts = self.complete()
        if parts is None:
            return None
        broken = sum(part.broken for _, part in parts)
        if broken:
            _publish(self.folder / BROKEN, _broken_rows([path for path, part in parts if part.broken]), replace=True)
        summary = {
            "predicted": sum(part.rows for _, part in parts) - broken,
            "broken": broken,
            "parts": {path.name: part.rows for path, part in parts},
        }
        _publish(self.folder / SUMMARY, to_json(summary, indent=2), replace=True)
        return summary


def remove_left_overs(folder: Path, mine: Sequence[int]) -> None:
    """Deletes what a killed process left of parts that are this process's to write."""
    own = set(mine)
    for path in folder.glob(".part-*.partial"):
        match = re.match(r"\.part-(\d+)-", path.name)
        if match and int(match[1]) in own:
            path.unlink(missing_ok=True)


def _cut(
    shard: Shard, position: Position, part_size: int, batch_size: int
) -> Iterator[tuple[list[Any], bool, bool, Position]]:
    """Batches of a shard: items, whether they end a part, whether they end the shard, where it goes on then."""
    reader = shard.read(position)
    batch: list[Any] = []
    count = 0
    item = next(reader, None)
    if item is None:
        yield [], True, True, dataclasses.replace(position)
    while item is not None:
        after = dataclasses.replace(position)
        # One image ahead: a part must know whether it is the last of its shard.
        following = next(reader, None)
        batch.append(item)
        count += 1
        end = count == part_size or following is None
        if end or len(batch) == batch_size:
            yield batch, end, following is None, after
            batch, count = [], 0 if end else count
        item = following


def _first_gap(chunks: set[int]) -> int:
    return next(number for number in range(len(chunks) + 1) if number not in chunks)


def _broken_rows(paths: Sequence[Path]) -> str:
    import pyarrow.parquet as pq

    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["path", "error"])
    for path in paths:
        rows = pq.read_table(path, columns=["path", "error"])
        for row in rows.filter(rows["error"].is_valid()).to_pylist():
            writer.writerow([cell(row["path"]), cell(row["error"])])
    return buffer.getvalue()


def _publish(path: Path, text: str, replace: bool = False) -> None:
    """Writes a file whole or not at all; of several processes that do so at once, the first wins unless `replace`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        if replace:
            put_in_place(partial, path)
            return
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                put_in_place(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
