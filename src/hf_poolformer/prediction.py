"""Top-k predictions for files, folders and datasets, written as a table row by row."""

import csv
import glob
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from .training.decoding import BrokenImage, decode_image, describe_source
from .training.errors import UserError
from .training.files import IMAGE_SUFFIXES, PARQUET_SUFFIXES, TAR_SUFFIXES, is_saved_dataset, list_files, one_line
from .training.initialisation import load_checkpoint
from .training.workers import prepare_worker


COLUMNS = ("path", "label", "score", "labels", "scores", "error")

_DATASET_SUFFIXES = PARQUET_SUFFIXES | TAR_SUFFIXES
_ROWS_AT_ONCE = 8192


@dataclass
class Summary:
    """What a call of `predict` did. `examples` describes the first few broken images."""

    output: Path
    predicted: int = 0
    broken: int = 0
    seconds: float = 0.0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rate = (self.predicted + self.broken) / max(self.seconds, 1e-9)
        broken = f", {self.broken} broken (see the column `error`)" if self.broken else ""
        return f"{self.predicted} images predicted{broken}, {rate:.1f} images/s, written to {self.output}"


@dataclass(frozen=True)
class Images:
    """One input: a name for each image beside its undecoded source; `count` is None where it is not known."""

    count: int | None
    items: Callable[[], Iterator[tuple[str, Any]]]


def predict(
    model: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    top_k: int = 5,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    num_workers: int | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    image_column_name: str | None = None,
    revision: str = "main",
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    should_stop: Callable[[], object] = lambda: False,
) -> Summary:
    """Classifies images and writes one row for each, in input order, into a table.

    The columns are `path`, `label` and `score` of the best class, the lists `labels` and `scores` of the best `top_k`,
    and `error`, null or the reason why an image could not be read. `path` is a file's; for a row of a dataset it is
    the dataset's, `#` and the row's number, or the name in a tar. Scores are softmax probabilities, for a model of
    another `problem_type` as in transformers' pipeline. The file appears under its name when it is complete.

    Args:
        model: folder or Hub id of an image classifier.
        inputs: image files, folders (searched to the bottom), globs, Parquet files, WebDataset tars, folders that
            `save_to_disk` wrote.
        output: `.parquet`, `.csv` or `.jsonl` by its suffix. In CSV the lists are JSON.
        device: `auto` takes the accelerator if there is one.
        dtype: of the model's weights and arithmetic.
        num_workers: processes that decode; chosen by the number of images and cores if None.
        dataset_name: a Hub dataset, in the place of inputs or after them; `split` and `dataset_config_name` choose
            within it.
        revision, token, cache_dir, trust_remote_code: for loading the model; the token also for the dataset.
        should_stop: asked after each batch; when it says so, KeyboardInterrupt is raised.

    Raises:
        UserError: no model, no images, an output that cannot be written. A broken image is a row, not an error.
    """
    output = Path(output)
    open_table = _table_for(output, overwrite)
    if top_k < 1 or batch_size < 1:
        raise UserError(f"top_k and batch_size must be at least 1, not {top_k} and {batch_size}")
    images = [*find_images(inputs, image_column_name=image_column_name, leave_out=output)]
    if dataset_name is not None:
        hub = {"config_name": dataset_config_name, "token": token, "cache_dir": cache_dir}
        images.append(_dataset(dataset_name, split=split, image_column_name=image_column_name, **hub))
    if not images:
        raise UserError("there is nothing to predict: give files, folders or a dataset")
    classifier, processor = _load(
        str(model), revision=revision, token=token, cache_dir=cache_dir, trust_remote_code=trust_remote_code
    )
    place = _device(device)
    try:
        classifier.to(place, getattr(torch, dtype), memory_format=torch.channels_last).eval()
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"the model cannot be put on {place} as {dtype}: {one_line(error)}") from error

    counts = [part.count for part in images]
    total = None if None in counts else sum(counts)
    loader = _loader(
        (item for part in images for item in part.items()), processor, batch_size, total, num_workers, place
    )
    summary = Summary(output)
    start = time.perf_counter()
    with open_table() as write, tqdm(total=total, unit=" images", disable=not progress) as bar:
        for batch in loader:
            rows = _classify(classifier, batch, top_k)
            write(rows)
            for row in rows:
                if row["error"] is None:
                    summary.predicted += 1
                else:
                    summary.broken += 1
                    if len(summary.examples) < 5:
                        summary.examples.append(f"{row['path']}: {row['error']}")
            bar.update(len(rows))
            if should_stop():
                raise KeyboardInterrupt
    summary.seconds = time.perf_counter() - start
    return summary


def find_images(
    inputs: Sequence[str | os.PathLike], *, image_column_name: str | None = None, leave_out: Path | None = None
) -> Iterator[Images]:
    """What is to be predicted, in the order given, folders and globs sorted, each file once.

    Raises:
        UserError: an input that matches nothing.
    """
    seen = {leave_out.absolute()} if leave_out is not None else set()
    files: list[Path] = []

    def flush() -> Iterator[Images]:
        if files:
            chosen = files.copy()
            files.clear()
            yield Images(len(chosen), lambda: ((str(file), file) for file in chosen))

    for text in map(os.fspath, inputs):
        path = Path(text).expanduser()
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        members = [member for match in found for member in _expand(match, named=match == path)]
        if not members:
            raise UserError(f"{text}: {'no images there' if found else 'no such file or directory'}")
        for member in members:
            if member.absolute() in seen:
                continue
            seen.add(member.absolute())
            if member.is_dir() or member.suffix.lower() in _DATASET_SUFFIXES:
                yield from flush()
                yield Images(_count_rows(member), lambda member=member: _rows(member, image_column_name))
            else:
                files.append(member)
    yield from flush()


def _expand(path: Path, named: bool) -> list[Path]:
    """Image files and datasets at or below `path`. A file that was named outright is tried whatever its suffix."""
    known = IMAGE_SUFFIXES | _DATASET_SUFFIXES
    if not path.is_dir():
        return [path] if named or path.suffix.lower() in known else []
    if is_saved_dataset(path):
        return [path]
    return [file for file in list_files(path) if file.suffix.lower() in known]


def _count_rows(path: Path) -> int | None:
    if path.suffix.lower() not in PARQUET_SUFFIXES:
        return None
    try:
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    except (ImportError, OSError, ValueError):
        return None  # reading it will say what is wrong


def _rows(path: Path, image_column_name: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of a dataset on this machine; a damaged one ends in an item that says so."""
    try:
        dataset = _dataset(str(path), image_column_name=image_column_name)
        yield from dataset.items()
    except UserError as error:
        yield str(path), BrokenImage(str(error))


def _dataset(location: str, **how: Any) -> Images:
    try:
        from .training.data import open_images
    except ImportError as error:
        raise UserError(
            f"reading datasets needs more packages ({error.name}): pip install 'hf-poolformer[train]'"
        ) from error
    dataset = open_images(location, **how)
    in_tar = Path(location).suffix.lower() in TAR_SUFFIXES

    def items() -> Iterator[tuple[str, Any]]:
        rows = enumerate(dataset.stream.select_columns([dataset.image_column]))
        index = -1
        while True:
            try:
                index, row = next(rows, (index, None))
            except Exception as error:  # whatever the storage raises; what was read until then counts
                yield location, BrokenImage(f"reading failed after {index + 1} images: {one_line(error)}")
                return
            if row is None:
                return
            source = row[dataset.image_column]
            name = describe_source(source) if in_tar else None
            yield f"{location}#{name or index}", source

    return Images(dataset.num_examples, items)


def _load(name: str, **where: Any) -> tuple[PreTrainedModel, Any]:
    model, processor, fresh = load_checkpoint(name, **where)
    if fresh:
        raise UserError(f"{name} is not a trained classifier: it has no weights for {', '.join(fresh[:3])}")
    return model, processor


def _device(wanted: str | torch.device) -> torch.device:
    if str(wanted) == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"there is no device {str(wanted)!r}") from error


class _Decoder(Dataset):
    """Runs in the workers: names and sources to pixels.

    The loader's sampler hands out the sources themselves, not indices: they are read once, in order, by the main
    process, undecoded, and everything costly is done here.
    """

    def __init__(self, processor: Any):
        self._processor = processor

    def __getitems__(self, items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        groups: dict[tuple[int, ...], tuple[list[int], list[torch.Tensor]]] = {}
        errors: list[str | None] = []
        for index, (_, source) in enumerate(items):
            try:
                if isinstance(source, BrokenImage):
                    raise source
                image = decode_image(source)
                pixels = self._processor(image, return_tensors="pt")["pixel_values"][0]
            except (BrokenImage, ValueError) as error:
                errors.append(one_line(error))
                continue
            errors.append(None)
            # A processor that does not crop leaves images of many sizes.
            indices, tensors = groups.setdefault(tuple(pixels.shape), ([], []))
            indices.append(index)
            tensors.append(pixels)
        stacked = [(indices, torch.stack(tensors)) for indices, tensors in groups.values()]
        return {"names": [name for name, _ in items], "errors": errors, "groups": stacked}


def _loader(
    items: Iterator[tuple[str, Any]],
    processor: Any,
    batch_size: int,
    total: int | None,
    num_workers: int | None,
    device: torch.device,
) -> DataLoader:
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = 0 if total is not None and total <= batch_size else min(8, max(1, cores - 1))
    batches = iter(lambda: list(islice(items, batch_size)), [])
    return DataLoader(
        _Decoder(processor),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_is,
        worker_init_fn=prepare_worker,
        pin_memory=device.type == "cuda",
    )


def _as_is(batch: Any) -> Any:
    return batch


@torch.inference_mode()
def _classify(model: PreTrainedModel, batch: dict[str, Any], top_k: int) -> list[dict[str, Any]]:
    config = model.config
    rows = [
        {"path": name, "label": None, "score": None, "labels": None, "scores": None, "error": error}
        for name, error in zip(batch["names"], batch["errors"], strict=True)
    ]
    for indices, pixel_values in batch["groups"]:
        pixel_values = pixel_values.to(model.device, model.dtype, memory_format=torch.channels_last, non_blocking=True)
        try:
            logits = model(pixel_values=pixel_values).logits.float()
        except torch.OutOfMemoryError as error:
            raise UserError(f"{len(pixel_values)} images at once need too much memory: lower --batch_size") from error
        if config.problem_type == "regression":
            scores = logits
        elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
            scores = logits.sigmoid()
        else:
            scores = logits.softmax(dim=-1)
        best = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
        for index, values, classes in zip(indices, best.values.tolist(), best.indices.tolist(), strict=True):
            labels = [config.id2label[label] for label in classes]
            rows[index] |= {"label": labels[0], "score": values[0], "labels": labels, "scores": values}
    return rows


Write = Callable[[Iterable[dict[str, Any]]], None]


def _table_for(output: Path, overwrite: bool) -> Callable[[], AbstractContextManager[Write]]:
    """Checks, before any work is done, that the table can be written, and how."""
    writers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}
    writer = writers.get(output.suffix.lower())
    if writer is None:
        raise UserError(f"the output must end in {', '.join(writers)}, not as in {output.name!r}")
    if output.is_dir():
        raise UserError(f"{output} is a directory")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: give another --output, or --overwrite to replace it")
    if writer is _parquet:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(
                "writing Parquet needs pyarrow: pip install 'hf-poolformer[train]', or write .csv or .jsonl"
            ) from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output.parent} cannot be made: {error.strerror}") from error
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"{output.parent} cannot be written to")

    @contextmanager
    def table() -> Iterator[Write]:
        # Complete or not there at all: whatever interrupts, no partial table takes the final name.
        partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
        foreign = None
        try:
            with writer(partial) as write:

                def write_or_explain(rows: Iterable[dict[str, Any]]) -> None:
                    try:
                        write(rows)
                    except OSError as error:
                        raise _unwritable(output, error) from error

                try:
                    yield write_or_explain
                except OSError as error:
                    foreign = error
                    raise
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, output)
        except OSError as error:
            if error is foreign:
                raise
            raise _unwritable(output, error) from error
        finally:
            partial.unlink(missing_ok=True)

    return table


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"{output} cannot be written: {error.strerror or one_line(error)}")


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    strings, numbers = pa.list_(pa.string()), pa.list_(pa.float32())
    types = (pa.string(), pa.string(), pa.float32(), strings, numbers, pa.string())
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as writer:

        def write(rows: Iterable[dict[str, Any]]) -> None:
            waiting.extend({**row, "path": _printable(row["path"])} for row in rows)
            if len(waiting) >= _ROWS_AT_ONCE:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        yield write
        flush()


@contextmanager
def _csv(path: Path) -> Iterator[Write]:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()

        def write(rows: Iterable[dict[str, Any]]) -> None:
            for row in rows:
                lists = {key: json.dumps(row[key], ensure_ascii=False) for key in ("labels", "scores") if row[key]}
                writer.writerow({**row, **lists, "path": _printable(row["path"])})

        yield write


@contextmanager
def _jsonl(path: Path) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8") as file:

        def write(rows: Iterable[dict[str, Any]]) -> None:
            for row in rows:
                file.write(json.dumps({**row, "path": _printable(row["path"])}, ensure_ascii=False) + "\n")

        yield write


def _printable(path: str) -> str:
    """File names are bytes; those that are not UTF-8 are written with escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
