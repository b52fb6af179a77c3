"""One pass over a dataset: a row for each image, with all that its bytes and pixels can tell.

    FOLDER/images.parquet    the rows of all splits, written when the pass is complete
    FOLDER/.scan/            the parts it is put together from, as `prediction/parts.py` has them

Whatever kills a pass, the next one goes on after the last part. Of a complete one, only what has changed is read
again. Broken images are rows with their reason.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from ..data.columns import ImageDataset
from ..data.datasets import OpenedSplit
from ..data.decoding import BrokenImage, EncodedImage, broken_if_it_fails, describe_source, read_bytes
from ..data.fingerprints import state_of_files
from ..data.labels import Unlabelled
from ..data.sources import Unit
from ..data.stream import DamagedShard, Piece, Shards
from ..data.transforms import channels_of
from ..foundation.errors import UserError, one_line
from ..foundation.files import make_folder, put_in_place
from ..foundation.folders import hold
from ..foundation.loading import HERE
from ..foundation.names import printable
from ..foundation.origin import Origin
from ..foundation.strict_json import to_json
from ..prediction.inference import Predictor, make_loader
from ..prediction.inputs import Position, Shard
from ..prediction.parts import (
    Parts,
    claim_folder,
    claimed_run,
    clear_folder,
    describe_shards,
    fingerprint,
    remove_left_overs,
)
from ..prediction.tables import table, unwritable
from .near import SIDE, thumbnail_of


if TYPE_CHECKING:
    from .duplicates import Duplicates


IMAGES = "images.parquet"
PARTS = ".scan"
PART_SIZE = 2000  # rows of a part: what a kill costs at most

_KEY = b"hf_poolformer"
# Of a run: what differs where images came or went, or their files were cut in another way.
_OF_DATA = {"inputs", "images", "shards"}
# How labels are stored, by what is learned from them.
LABEL_COLUMNS = {
    "single_label_classification": ("label", pa.string()),
    "multi_label_classification": ("labels", pa.list_(pa.string())),
    "regression": ("targets", pa.list_(pa.float32())),
}


@dataclass(frozen=True)
class Scan:
    """What a pass over a dataset found.

    `images.parquet` has a row for each image, sorted by split, as `splits` has them, and position:

    - `path`: a file's; of a row of a dataset the dataset's file or folder, `#` and the row's number in it, or the name
      in a tar; of a dataset of the Hub, `#` and the file's number, `:` and the row's number in it.
    - `split`, and `position`: the number of the row in the split's stream, as `OpenedSplit.dataset.stream` yields it.
    - `label` (one class), `labels` (any number of classes) or `targets` (numbers, float32), null where there is none;
      none of these columns where the dataset has no labels. `label_error`: why a label cannot be read.
    - `format` and `mode`: as stored, in Pillow's words (`JPEG`, `RGB`). `width`, `height`: upright, in pixels.
      `bytes`: of the encoded image. Null where a broken image does not tell.
    - `error`: why the image cannot be read, else null. Then all that follows is null, but for `digest`.
    - `digest`: SHA-256 of the encoded bytes, `pixel_digest`: a hash of the decoded pixels; both hexadecimal.
    - `thumbnail`: uint8, `near.SIDE` x `SIDE` grey values, row by row, the whole picture squeezed into a square.
    - `mean`, `std`: of each channel, of values between 0 and 1.
    - `embedding`: features of the model, float32, if one was given.

    Attributes:
        file: images.parquet.
        splits: rows of each split.
        problem_type: what the labels are, as in a model's config; None for a dataset without labels.
        label_names: of the classes or targets.
        complete: every image was read, not a sample of them.
        remarks: what was odd about splits and labels, in words.
        opened: the splits, for who wants to read pictures again.
    """

    file: Path
    splits: dict[str, int]
    problem_type: str | None
    label_names: list[str] | None
    complete: bool
    remarks: list[str]
    opened: Mapping[str, OpenedSplit] = field(repr=False)

    @cached_property
    def table(self) -> pyarrow.dataset.Dataset:
        """The rows, which are read when asked for: `table.to_table(columns=[...])`, `table.to_batches(...)`."""
        return pyarrow.dataset.dataset(self.file)

    @property
    def label_column(self) -> str | None:
        """`label`, `labels` or `targets`; None where there are no labels."""
        return None if self.problem_type is None else LABEL_COLUMNS[self.problem_type][0]

    @property
    def embedded(self) -> bool:
        return "embedding" in self.table.schema.names

    def duplicates(self, **options: Any) -> Duplicates:
        """Images that are there several times, or nearly so; options as of `duplicates.find_duplicates`."""
        from .duplicates import find_duplicates

        return find_duplicates(self, **options)


def scan(
    folder: str | os.PathLike,
    opened: Mapping[str, OpenedSplit],
    *,
    num_channels: int = 3,
    model: str | None = None,
    origin: Origin = HERE,
    device: str = "auto",
    max_images: int | None = None,
    batch_size: int = 32,
    part_size: int = PART_SIZE,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    should_stop: Callable[[], object] = lambda: False,
) -> Scan:
    """Reads every image once, in bounded memory, and writes what it found.

    Args:
        folder: for images.parquet.
        opened: of `data.datasets.open_every_split`.
        num_channels: what images are decoded to; with a model, what it takes.
        model: folder or Hub id of a model whose features are wanted of each image.
        max_images: of each split at most so many, evenly spread over it.
        batch_size: images that go to a worker, and through the model, at once.
        part_size: rows after which what was found is safe.
        num_workers: processes that decode; chosen by the number of images and cores if None.
        overwrite: begin anew, whatever the folder holds.
        should_stop: asked after each batch; when it says so, KeyboardInterrupt is raised.

    Raises:
        UserError: the folder holds a scan of something else, or cannot be written; no such model; storage that is out
            of reach. A broken image is a row, not an error.
    """
    folder = Path(folder)
    predictor = None if model is None else Predictor(model, origin=origin, embeddings=True, device=device)
    if predictor is not None:
        num_channels = channels_of(predictor.processor)
    problem_type = next((split.dataset.problem_type for split in opened.values() if _is_labelled(split)), None)
    shards = [shard for name, split in opened.items() for shard in _shards(name, split, max_images, part_size)]
    run = {
        "format": 1,
        "dataset": sorted({split.source.name for split in opened.values()}),
        "splits": list(opened),
        "labels": {name: _understood(split.dataset) for name, split in opened.items()},
        "model": None if predictor is None else predictor.digest(),
        "num_channels": num_channels,
        "max_images": max_images,
        "part_size": part_size,
        **describe_shards(shards),
    }
    schema = _schema(problem_type, None if predictor is None else predictor.embedding_size)
    place = folder / PARTS
    make_folder(place)
    with hold(place):
        there = claimed_run(place)
        if overwrite or (there is not None and _only_data_changed(there, run)):
            clear_folder(place)
        claim_folder(place, run, {}, "what was found")
        remove_left_overs(place, range(len(shards)))
        parts = Parts(place, fingerprint(run), len(shards))
        states = {number: shard.state() for number, shard in enumerate(shards)}
        found = parts.progress(states)
        batches = parts.batches(shards, found, part_size, batch_size)
        left = [
            None if shard.count is None else shard.count - (part.position["row"] if part is not None else 0)
            for shard, (_, part) in zip(shards, found.values(), strict=True)
            if part is None or not part.last
        ]
        total = None if None in left else sum(left)
        load = partial(_examined, num_channels, None if predictor is None else predictor.preprocessing)
        pin_memory = predictor is not None and predictor.device.type == "cuda"
        loader = make_loader(load, batches, batch_size, total, num_workers, pin_memory)
        written = parts.write(partial(_with_embeddings, predictor), partial(_part, schema), loader)
        _follow(written, total, progress, should_stop)
        about = {
            "problem_type": problem_type,
            "label_names": next((split.dataset.label_names for split in opened.values() if _is_labelled(split)), None),
            "complete": max_images is None,
            "remarks": [f"{name}: {remark}" for name, split in opened.items() for remark in split.remarks],
        }
        file = folder / IMAGES
        splits = _put_together(file, parts, shards, states, run, schema, list(opened), about)
    return Scan(file, splits, opened=opened, **about)


class Picture(NamedTuple):
    """One image that is to be examined.

    Attributes:
        about: columns that are known without looking at it.
        source: encoded bytes, or where they are, or why they cannot be had.
    """

    about: dict[str, Any]
    source: Any
    token: str | bool | None = None


@dataclass
class SplitShard(Shard):
    """Consecutive rows of a split, whose place in it is known.

    Attributes:
        stream: rows.
        first: number of the first unit in the stream.
        units: what the stream divides into, those of this shard; None where that is not known.
        start: position of the first row in the split; 0 where it is not known.
        chosen: of each unit, the rows that are read; None for all.
        most: rows that are read at most.
        kept: state where it is no file's.
    """

    split: str
    dataset: ImageDataset
    stream: Any
    name: str
    first: int = 0
    units: list[Unit] | None = None
    start: int = 0
    chosen: list[list[int]] | None = None
    most: int | None = None
    kept: str = ""

    def __post_init__(self) -> None:
        self.count = self.most
        if self.units is not None:
            self.count = sum(map(len, self.chosen) if self.chosen else (unit.rows for unit in self.units))
        units = None if self.units is None else [(unit.rows, unit.name, unit.first) for unit in self.units]
        self.key = repr((self.split, self.name, self.first, units, self.chosen, self.most))

    def state(self) -> str:
        if self.units is None:
            return self.kept
        files = list(dict.fromkeys(file for unit in self.units for file in unit.files))
        other = "".join(unit.other for unit in self.units)
        return state_of_files(files) + hashlib.sha256(other.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def read(self, position: Position) -> Iterator[Picture]:
        stored = Shards(self.stream, divided=True)
        count = stored.num_shards if self.units is None else len(self.units)
        known = self.units or [Unit(0, self.name, 0, ())] * count
        starts = [self.start, *itertools.accumulate((unit.rows for unit in known), initial=self.start)][1:]
        for number in range(position.group, count):
            if number > position.group:
                position.group, position.offset = number, 0
            piece = Piece(self.first + number)
            if self.chosen is not None:
                piece = Piece.of_rows(self.first + number, self.chosen[number])
            try:
                for row in itertools.islice(stored.rows(piece), position.offset, None):
                    if position.row == self.most:
                        return
                    place = starts[number] + row.index if self.units is not None else position.row
                    in_file = known[number].first + row.index if self.units is not None else position.row
                    picture = self._picture(row.values, known[number].name, in_file, place)
                    position.offset, position.row = position.offset + 1, position.row + 1
                    yield picture
            except DamagedShard as error:
                # What lies behind it in other units is still read.
                place = starts[number] + error.rows if self.units is not None else position.row
                position.group, position.offset, position.row = number + 1, 0, position.row + 1
                reason = f"reading failed after {error.rows} images: {error}"
                yield Picture({**self._about(known[number].name or self.name, place)}, BrokenImage(reason))
            except Exception as error:  # whatever the storage raises
                raise UserError(
                    f"reading {self.name} failed after {position.row} images: {one_line(error)}. What was found is "
                    "kept: run the same command again to go on."
                ) from error

    def _picture(self, row: Mapping[str, Any], name: str, in_file: int, place: int) -> Picture:
        source = row[self.dataset.image_column]
        path = describe_source(source)
        if name:
            inside = path if path and name.lower().endswith(".tar") else in_file
            path = f"{name}{':' if '#' in name else '#'}{inside}"
        about = self._about(path or f"{self.name}#{in_file}", place)
        try:
            about |= _label(self.dataset, row)
        except UserError as error:
            about["label_error"] = str(error)
        return Picture(about, source, self.dataset.token)

    def _about(self, path: str, place: int) -> dict[str, Any]:
        return {"path": path, "split": self.split, "position": place}


def _shards(split: str, opened: OpenedSplit, max_images: int | None, size: int) -> list[SplitShard]:
    """A split in shards of about `size` rows where it can be cut there."""
    dataset, source, name = opened.dataset, opened.source, opened.name
    how = {"split": split, "dataset": dataset}
    units = source.units(name)
    if units is None:
        number = dataset.stream.num_shards
        files = list(range(number))
        if max_images is not None and max_images < number:
            files = [index * number // max_images for index in range(max_images)]
        most = None if max_images is None else -(-max_images // number)
        how |= {"most": most, "kept": source.state(name) or ""}
        whole = f"{source.name} ({name})" if len(source.splits) > 1 else source.name
        return [
            SplitShard(stream=dataset.stream.shard(number, index), name=f"{whole}#{index}", **how) for index in files
        ]
    rows = sum(unit.rows for unit in units)
    wanted = range(rows)
    if max_images is not None and max_images < rows:
        wanted = [(2 * index + 1) * rows // (2 * max_images) for index in range(max_images)]
    shards: list[SplitShard] = []
    begin, start, count = 0, 0, 0
    places = np.asarray(wanted)
    for stop in range(1, len(units) + 1):
        count += units[stop - 1].rows
        if stop < len(units) and count + units[stop].rows <= size:
            continue
        mine, chosen = units[begin:stop], None
        if len(places) < rows:
            ends = np.cumsum([start, *(unit.rows for unit in mine)])
            bounds = np.searchsorted(places, ends)
            chosen = [
                (places[low:high] - end).tolist()
                for low, high, end in zip(bounds[:-1], bounds[1:], ends[:-1], strict=True)
            ]
        if chosen is None or any(chosen):
            shards.append(
                SplitShard(
                    stream=dataset.stream, name=source.name, first=begin, units=mine, start=start, chosen=chosen, **how
                )
            )
        begin, start, count = stop, start + count, 0
    return shards


def _is_labelled(split: OpenedSplit) -> bool:
    return split.dataset.storage is not None


def _understood(dataset: ImageDataset) -> dict[str, Any]:
    """What decides the label columns of a split."""
    return {
        "image": dataset.image_column,
        "columns": list(dataset.label_columns),
        "kind": dataset.problem_type,
        "storage": repr(dataset.storage),
        "names": dataset.label_names,
    }


def _only_data_changed(there: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether it is a scan of the same dataset in the same way, which has other images or classes now."""
    differing = {name for name in run.keys() | there.keys() if run.get(name) != there.get(name)}
    return bool(differing) and differing <= {*_OF_DATA, "labels", "splits"}


def _label(dataset: ImageDataset, row: Mapping[str, Any]) -> dict[str, Any]:
    """The label column of a row; empty where it has no label."""
    if dataset.storage is None:
        return {}
    try:
        label = dataset.label(row)
    except Unlabelled:
        return {}
    column = LABEL_COLUMNS[dataset.problem_type][0]
    if column == "targets":
        return {column: label.tolist()}
    names = dataset.classes.names
    return {column: names[label] if column == "label" else [names[index] for index in np.flatnonzero(label)]}


def _schema(problem_type: str | None, embedding_size: int | None) -> pa.Schema:
    text = pa.string()
    columns = [("path", text), ("split", text), ("position", pa.int64())]
    columns += [LABEL_COLUMNS[problem_type]] if problem_type is not None else []
    columns += [("label_error", text), ("format", text), ("mode", text)]
    columns += [("width", pa.int32()), ("height", pa.int32()), ("bytes", pa.int64())]
    columns += [("error", text), ("digest", text), ("pixel_digest", text)]
    columns += [("thumbnail", pa.list_(pa.uint8(), SIDE * SIDE))]
    columns += [("mean", pa.list_(pa.float32())), ("std", pa.list_(pa.float32()))]
    columns += [("embedding", pa.list_(pa.float32(), embedding_size))] if embedding_size else []
    return pa.schema(columns)


def _examined(num_channels: int, preprocessing: Any, pictures: Sequence[Picture]) -> tuple[list[dict[str, Any]], Any]:
    """In a worker: rows, and what the model takes of them, if there is one."""
    rows, images = [], []
    for picture in pictures:
        row, image = examine(picture.source, num_channels, picture.token)
        rows.append({**picture.about, **row})
        images.append((picture.about["path"], image))
    return rows, None if preprocessing is None else preprocessing.load(images)


def examine(source: Any, num_channels: int = 3, token: str | bool | None = None) -> tuple[dict[str, Any], Any]:
    """What one image tells of itself: columns of `Scan`, and its pixels for `decode_image`, or why there are none."""
    row: dict[str, Any] = {"error": None}
    try:
        if isinstance(source, BrokenImage):
            raise source
        if source is None:
            raise BrokenImage("there is no image in this row")
        path, data = describe_source(source), source.get("bytes") if isinstance(source, Mapping) else None
        if data is None:
            with broken_if_it_fails():
                data = read_bytes(path, token)
        row |= {"bytes": len(data), "digest": hashlib.sha256(data).hexdigest()}
        with EncodedImage({"bytes": data, "path": path}, num_channels=num_channels) as encoded:
            row |= {"format": encoded.format, "mode": encoded.mode}
            row |= {"width": encoded.width, "height": encoded.height}
            pixels, _ = encoded.pixels()
    except BrokenImage as error:
        return {**row, "error": printable(one_line(error))}, error
    pixels = np.ascontiguousarray(pixels)
    image = Image.fromarray(pixels) if num_channels == 3 else None
    sha = hashlib.blake2b(repr((pixels.shape, pixels.dtype.str)).encode(), digest_size=16)
    sha.update(pixels)
    mean, std = _moments(pixels, image)
    thumbnail = thumbnail_of(pixels if image is None else image).ravel()
    row |= {"pixel_digest": sha.hexdigest(), "mean": mean, "std": std, "thumbnail": thumbnail}
    return row, {"bytes": data, "path": path} if image is None else image


def _moments(pixels: np.ndarray, image: Image.Image | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of values between 0 and 1."""
    if image is None:
        values = pixels.reshape(-1, pixels.shape[2])
        return values.mean(0, dtype=np.float64) / 255, values.std(0, dtype=np.float64) / 255
    counts = np.array(image.histogram(), dtype=np.float64).reshape(3, 256) / (image.width * image.height)
    values = np.arange(256) / 255
    mean = counts @ values
    return mean, np.sqrt(np.maximum(counts @ values**2 - mean**2, 0))


def _with_embeddings(predictor: Predictor | None, batch: tuple[list[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    rows, prepared = batch
    if predictor is not None:
        for row, predicted in zip(rows, predictor.rows(prepared), strict=True):
            row["embedding"] = predicted["embedding"]
    return rows


def _part(schema: pa.Schema, path: Path, metadata: Callable[[], dict[str, str]]) -> Any:
    return table(path, schema, metadata=metadata)


def _follow(
    written: Iterator[list[dict[str, Any]]], total: int | None, progress: bool, should_stop: Callable[[], object]
) -> None:
    """Goes through what is written, shows how far it is, and stops when asked to."""
    interval, broken = 0.5 if sys.stderr.isatty() else 10, 0
    bar = tqdm(total=total, unit=" images", disable=not progress, mininterval=interval)
    # Closed, not left to the garbage collector: an unfinished file is removed when its generator is.
    with bar, closing(written):
        for rows in written:
            bar.update(len(rows))
            broken += sum(row["error"] is not None for row in rows)
            if broken:
                bar.set_postfix_str(f"{broken} broken", refresh=False)
            if should_stop():
                raise KeyboardInterrupt


def _put_together(
    file: Path,
    parts: Parts,
    shards: Sequence[SplitShard],
    states: Mapping[int, str],
    run: dict[str, Any],
    schema: pa.Schema,
    splits: Sequence[str],
    about: Mapping[str, Any],
) -> dict[str, int]:
    """Writes all parts into one file, unless it is there; the rows of each split."""
    complete = parts.complete()
    whole = fingerprint({"run": run, "states": list(states.values()), "rows": [part.rows for _, part in complete]})
    known = _known(file, whole)
    if known is not None:
        return known
    counts = dict.fromkeys(splits, 0)
    with _appearing(file, schema) as writer:
        before: tuple[int, int] = (-1, 0)  # a shard, and the rows of its split that come before it
        for path, _ in complete:
            number = int(path.name.split("-")[1])
            split = shards[number].split
            if number != before[0]:
                before = (number, 0 if shards[number].units is not None else counts[split])
            for batch in pq.ParquetFile(path).iter_batches():
                counts[split] += len(batch)
                if before[1]:  # rows were numbered within their file
                    place = batch.schema.get_field_index("position")
                    moved = pa.compute.add(batch.column("position"), before[1])
                    batch = batch.set_column(place, schema.field("position"), moved)
                writer.write_batch(batch)
        writer.add_key_value_metadata({_KEY: to_json({"scan": whole, "splits": counts, **about})})
    return counts


def _known(file: Path, whole: str) -> dict[str, int] | None:
    """The rows of each split, if the file is put together from the same parts."""
    import json

    try:
        told = json.loads(pq.read_metadata(file).metadata[_KEY])
        return told["splits"] if told["scan"] == whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _appearing(file: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet file that takes its name when it is whole."""
    unfinished = file.with_name(f".{file.name}.partial")
    try:
        with pq.ParquetWriter(unfinished, schema) as writer:
            yield writer
        put_in_place(unfinished, file)
    except OSError as error:
        raise unwritable(file, error) from error
    finally:
        unfinished.unlink(missing_ok=True)
