"""Tables that say what the images beside them are: metadata files, and the CSV files of competitions."""

import csv
import logging
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ..foundation.errors import UserError, one_line
from .columns import few
from .splits import parts_below


logger = logging.getLogger(__name__)

MANY_TABLES = 20  # more than these belong to single images
METADATA_FILES = frozenset(["metadata.csv", "metadata.jsonl", "metadata.parquet", "metadata.tsv"])
_TEXT_SUFFIXES = (".csv", ".tsv")
# A table that is only found, not named as metadata, names at least this share of its first rows' files.
_MATCHING = 0.5
_ROWS_TRIED = 200
_LARGEST = 1 << 28  # bytes
_WHOLE_NUMBER = r"^\s*-?(0|[1-9]\d*)\s*$"
_NUMBER = r"^\s*([+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[nN]a[nN])\s*$"


class Places:
    """Finds the files that the rows of tables name."""

    def __init__(self, root: Path, files: Iterable[Path]):
        self.root = root
        self._by_path: dict[str, Path] = {}
        self._by_name: dict[str, list[Path]] = {}
        top, parts_of = os.path.abspath(root), parts_below(root)
        for file in files:
            self._by_path[_normal(os.path.join(top, *parts_of(file)))] = file
            for name in {file.name, file.stem}:
                self._by_name.setdefault(_normal(name), []).append(file)

    def at(self, name: str | None, base: Path) -> Path | None:
        """The file at a path relative to `base`, or else to the root."""
        if not name:
            return None
        for text in dict.fromkeys((name, name.strip().replace("\\", "/"))):
            for place in (base, self.root):
                found = self._by_path.get(_normal(os.path.abspath(os.path.join(place, text))))
                if found is not None:
                    return found
        return None

    def called(self, name: str | None, base: Path) -> list[Path]:
        """The file at a path, or all of this name, with or without its suffix."""
        found = self.at(name, base)
        if found is not None or not name:
            return [found] if found is not None else []
        return self._by_name.get(_normal(name.strip().replace("\\", "/").rsplit("/", 1)[-1]), [])

    def meant(self, name: str | None, base: Path, preferred: Callable[[Path], bool]) -> Path | None:
        """The only file that is `called` so, or the only one of these that is preferred."""
        alike = self.called(name, base)
        if len(alike) > 1:
            alike = [file for file in alike if preferred(file)]
        return alike[0] if len(alike) == 1 else None


@dataclass
class Described:
    """Rows whose files are there.

    Attributes:
        files: column -> the file of each row; `image`, and other columns that name pictures.
        table: the other columns.
        origin: of each row, the table it comes from.
        missing: rows whose file is not there, and one for an example.
    """

    files: dict[str, list[Path | None]]
    table: pa.Table
    origin: list[Path]
    missing: int
    example: str


def read_metadata(paths: Sequence[Path], places: Places) -> Described:
    """The rows of metadata files: `file_name` is relative to its file; `mask_file_name` makes a column `mask`.

    Raises:
        UserError: they cannot be read, or do not name files.
    """
    tables = _read_alike(paths)
    columns = tables[paths[0]].column_names
    if "file_name" not in columns:
        raise UserError(
            f"{paths[0]} has no column file_name, only {few(columns)}: its first line must be file_name,label, and "
            "each other line a file and its label (001.jpg,cat)"
        )
    pictures = [name for name in columns if name.endswith("_file_name")]
    targets = {"file_name": "image", **{name: name.removesuffix("_file_name") for name in pictures}}
    return _rows(tables, targets, lambda path: lambda name: places.at(name, path.parent))


def names_files(paths: Sequence[Path]) -> bool:
    """Whether metadata files have their column `file_name`. If not, they may still name the images in another way."""
    return any("file_name" in _read(path).column_names for path in paths) or paths[0].suffix.lower() == ".jsonl"


def find_tables(others: Iterable[Path], root: Path, images: Sequence[Path]) -> tuple[dict[Path, str], Places | None]:
    """Tables that name the images, each with the column that does."""
    candidates = [file for file in others if file.suffix.lower() in (*_TEXT_SUFFIXES, ".parquet")]
    candidates = [file for file in candidates if "submission" not in file.stem.lower()]
    if not 0 < len(candidates) <= MANY_TABLES:
        return {}, None
    places = Places(root, images)
    found: dict[Path, str] = {}
    for path in candidates:
        if path.stat().st_size > _LARGEST:
            logger.warning("%s is too large to be looked at; call it metadata.csv if it describes the images", path)
            continue
        try:
            table = _read(path)
        except UserError as error:
            logger.warning("%s is not looked at: %s", path.name, error)
            continue
        if {"path", "score", "error"} <= set(table.column_names):
            continue  # our own predictions
        first, shares = table.slice(0, _ROWS_TRIED), {}
        for name, values in zip(first.column_names, first.columns, strict=True):
            if table.num_columns > 1 and values.type in (pa.string(), pa.large_string()) and len(values):
                known = [bool(places.called(value, path.parent)) for value in values.to_pylist()]
                shares[name] = sum(known) / len(known)
        best = max(shares, key=shares.get, default=None)
        if best is not None and shares[best] >= _MATCHING:
            found[path] = best
    return found, places


def read_tables(found: Mapping[Path, str], places: Places, belongs: Callable[[Path, Path], bool]) -> Described:
    """The rows of tables that `find_tables` found.

    Args:
        belongs: whether a table (first) means a file (second), where several have the name that it gives.
    """
    tables = _read_alike(list(found))
    names = set(found.values())
    if len(names) > 1:
        raise UserError(f"{few(list(map(str, found)))} name the images in different columns, {few(sorted(names))}")

    def finder(path: Path) -> Callable[[str | None], Path | None]:
        return lambda name: places.meant(name, path.parent, lambda file: belongs(path, file))

    return _rows(tables, {names.pop(): "image"}, finder)


def _rows(
    tables: Mapping[Path, pa.Table],
    targets: Mapping[str, str],
    finder: Callable[[Path], Callable[[str | None], Path | None]],
) -> Described:
    files: dict[str, list[Path | None]] = {target: [] for target in targets.values()}
    kept, origin, missing, example = [], [], 0, ""
    for path, table in tables.items():
        find = finder(path)
        named = {
            target: [None if name is None else find(str(name)) for name in table[column].to_pylist()]
            for column, target in targets.items()
        }
        there = [index for index, file in enumerate(named["image"]) if file is not None]
        if len(there) < len(table):
            missing += len(table) - len(there)
            lost = set(range(len(table))).difference(there)
            example = example or str(table[next(iter(targets))][min(lost)].as_py())
        for target, found in named.items():
            files[target] += [found[index] for index in there]
        # A column called as those that are made here would take their place.
        spare = [name for name in table.column_names if name in targets or name in files]
        kept.append(table.take(pa.array(there, pa.int64())).drop_columns(spare))
        origin += [path] * len(there)
    table = pa.concat_tables(kept, promote_options="permissive")
    if origin and origin[0].suffix.lower() in _TEXT_SUFFIXES:
        table = typed(table)
    return Described(files, table, origin, missing, example)


def _read_alike(paths: Sequence[Path]) -> dict[Path, pa.Table]:
    """Tables that one dataset consists of: of one format, with the same columns."""
    if len({path.suffix.lower() for path in paths}) > 1 or len({path.parent for path in paths}) < len(
        [path for path in paths if path.name in METADATA_FILES]
    ):
        raise UserError(f"there are several metadata files, {few(list(map(str, paths)))}: keep those of one kind")
    tables = {path: _read(path) for path in paths}
    for path, table in tables.items():
        if set(table.column_names) != set(tables[paths[0]].column_names):
            raise UserError(
                f"{paths[0]} and {path} have different columns: {few(tables[paths[0]].column_names)} against "
                f"{few(table.column_names)}"
            )
    try:
        pa.concat_tables(list(tables.values()), promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{few(list(map(str, paths)))} do not fit together: {one_line(error)}") from error
    return tables


def _read(path: Path) -> pa.Table:
    """One table. Those of text hold texts only, and null where a cell is empty: see `typed`."""
    suffix = path.suffix.lower()
    try:
        if suffix in _TEXT_SUFFIXES:
            table = _read_text(path)
        elif suffix == ".jsonl":
            size = path.stat().st_size
            table = pa.json.read_json(path, pa.json.ReadOptions(block_size=min(max(size, 1 << 16), (1 << 31) - 1)))
        else:
            table = pa.parquet.read_table(path)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    twice = [name for name in table.column_names if table.column_names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}")
    return table


def _read_text(path: Path) -> pa.Table:
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    header = head.decode(encoding, "replace").lstrip("\ufeff\r\n").splitlines()[:1] or [""]
    delimiter = max(",;\t", key=header[0].count)
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = pa.csv.ReadOptions(encoding=encoding, block_size=min(max(path.stat().st_size, 1 << 16), (1 << 31) - 1))
    names = next(csv.reader(header, delimiter=delimiter), [])
    texts = pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in names},
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    table = pa.csv.read_csv(path, read, parse, texts)
    return table.rename_columns([name.strip() for name in table.column_names])


def typed(table: pa.Table) -> pa.Table:
    """Columns of texts that are all numbers become numbers; `None`, `NA`, `007` and dates stay what they are."""
    for index, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if pa.types.is_null(column.type):
            table = table.set_column(index, name, column.cast(pa.string()))
        if not pa.types.is_string(column.type) or column.null_count == len(column):
            continue
        for pattern, kind in ((_WHOLE_NUMBER, pa.int64()), (_NUMBER, pa.float64())):
            if not pa.compute.all(pa.compute.match_substring_regex(column, pattern)).as_py():
                continue
            try:
                numbers = pa.compute.utf8_trim_whitespace(column).cast(kind)
            except pa.ArrowInvalid:  # beyond 64 bits
                break
            if pa.types.is_floating(kind):
                numbers = pa.compute.if_else(pa.compute.is_nan(numbers), None, numbers)
            if numbers.null_count < len(numbers):  # else there is nothing but NaN: words
                table = table.set_column(index, name, numbers)
            break
    return table


def _normal(path: str) -> str:
    # Some systems store accents apart from their letters.
    return unicodedata.normalize("NFC", path)
