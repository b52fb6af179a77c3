"""Rows into Parquet, CSV and JSON lines; files that are complete or not there at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..foundation.errors import UserError, one_line
from ..foundation.files import make_folder, put_in_place
from ..foundation.names import undecodable_escaped
from ..foundation.strict_json import to_json


Write = Callable[[Iterable[dict[str, Any]]], None]

_ROWS_AT_ONCE = 8192
_LISTS = ("labels", "scores", "embedding")


def check_table(output: Path, overwrite: bool) -> None:
    """Raises a UserError, before any work is done, if a table cannot be written there."""
    if output.suffix.lower() not in WRITERS:
        raise UserError(
            f"the output must end in {', '.join(WRITERS)}, or be a folder's name without a suffix, not as in "
            f"{output.name!r}"
        )
    if output.is_dir():
        raise UserError(f"{output} is a directory")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: give another --output, or --overwrite to replace it")
    if output.suffix.lower() == ".parquet":
        check_parquet()
    make_folder(output.parent)


def check_parquet() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(
            "writing Parquet needs pyarrow: pip install 'hf-poolformer[train]', or write .csv or .jsonl"
        ) from error


@contextmanager
def table(
    output: Path,
    columns: Any,
    embedding_size: int | None = None,
    metadata: Callable[[], dict[str, str]] | None = None,
) -> Iterator[Write]:
    """A function that appends rows to a table; the table takes its name when the block ends without an exception.

    Args:
        columns: names, of each row, `path` first and `error` last; or an Arrow schema, Parquet only.
        metadata: asked at the end, for the file's own key-value metadata; Parquet only.

    Raises:
        UserError: it cannot be written (a full disk, say); what was there before is as it was.
    """
    # Complete or not there at all: whatever interrupts, no partial table takes the final name.
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    foreign = None
    try:
        with WRITERS[output.suffix.lower()](partial, columns, embedding_size, metadata) as write:

            def write_or_explain(rows: Iterable[dict[str, Any]]) -> None:
                try:
                    write(map(_encodable, rows))
                except OSError as error:
                    raise unwritable(output, error) from error

            try:
                yield write_or_explain
            except OSError as error:
                foreign = error
                raise
        put_in_place(partial, output)
    except OSError as error:
        if error is foreign:
            raise
        raise unwritable(output, error) from error
    finally:
        partial.unlink(missing_ok=True)


def unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"{output} cannot be written: {error.strerror or one_line(error)}")


def parquet_schema(columns: Sequence[str], embedding_size: int | None) -> Any:
    """Arrow schema of these columns; one of no other name is a target of a regression."""
    import pyarrow as pa

    types = {
        "path": pa.string(),
        "label": pa.string(),
        "score": pa.float32(),
        "labels": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "embedding": pa.list_(pa.float32(), embedding_size or 0),
        "error": pa.string(),
    }
    return pa.schema([(column, types.get(column, pa.float32())) for column in columns])


@contextmanager
def _parquet(path: Path, columns: Any, embedding_size: int | None, metadata: Any) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = columns if isinstance(columns, pa.Schema) else parquet_schema(columns, embedding_size)
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema) as writer:

        def write(rows: Iterable[dict[str, Any]]) -> None:
            waiting.extend(rows)
            if len(waiting) >= _ROWS_AT_ONCE:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        yield write
        flush()
        if metadata is not None:
            writer.add_key_value_metadata(metadata())


def cell(value: Any) -> Any:
    """For a CSV, which no reader takes with a NUL in it, nor the writer of Python 3.10."""
    return value.replace("\0", r"\x00") if isinstance(value, str) else value


@contextmanager
def _csv(path: Path, columns: Sequence[str], embedding_size: int | None, metadata: Any) -> Iterator[Write]:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writerow({column: cell(column) for column in columns})

        def write(rows: Iterable[dict[str, Any]]) -> None:
            for row in map(_plain, rows):
                lists = {key: to_json(row[key], ensure_ascii=False) for key in _LISTS if row.get(key)}
                writer.writerow({key: cell(value) for key, value in {**row, **lists}.items()})

        yield write


@contextmanager
def _jsonl(path: Path, columns: Sequence[str], embedding_size: int | None, metadata: Any) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8") as file:

        def write(rows: Iterable[dict[str, Any]]) -> None:
            for row in map(_plain, rows):
                file.write(to_json(row, ensure_ascii=False) + "\n")

        yield write


WRITERS: dict[str, Callable[..., AbstractContextManager[Write]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".jsonl": _jsonl,
}


def _encodable(row: dict[str, Any]) -> dict[str, Any]:
    """Names of files, and of classes after folders, are bytes; those that are no UTF-8 are written as escapes."""
    row = {**row, "path": undecodable_escaped(row["path"])}
    if row.get("label") is not None:
        row["label"] = undecodable_escaped(row["label"])
    if row.get("labels") is not None:
        row["labels"] = [undecodable_escaped(label) for label in row["labels"]]
    return row


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    embedding = row.get("embedding")
    return row if embedding is None else {**row, "embedding": embedding.tolist()}
