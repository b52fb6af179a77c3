"""What a place on this machine holds, told by its content, and the source that reads it.

Looked for in this order: what `save_to_disk` wrote, Parquet with images, WebDataset tars, metadata files, COCO's JSON,
images beside annotation maps, a table that names the images, and at last folders, of splits and of classes.
"""

import functools
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features

from ..foundation.errors import UserError, one_line
from ..foundation.strict_json import to_json
from .columns import few, find_label_column
from .files import (
    ARRAY_SUFFIX,
    IMAGE_SUFFIXES,
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
from .sources import (
    FileSource,
    FolderSource,
    HubSource,
    Listed,
    ParquetSource,
    SavedSource,
    Source,
    TarSource,
    rows_of_classes,
)
from .splits import SPLIT_ALIASES, canonical, parts_below, read_folders, split_finder
from .tables import (
    MANY_TABLES,
    METADATA_FILES,
    Described,
    Places,
    find_tables,
    names_files,
    read_metadata,
    read_tables,
)


logger = logging.getLogger(__name__)

_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
_IMAGE_FOLDERS = frozenset(["images", "image", "imgs", "img", "jpegimages", "photos", "pictures"])
_MAP_FOLDERS = frozenset(
    ["annotation", "annotations", "gt", "label", "labels", "mask", "masks", "seg", "segmentation", "segmentationclass"]
)
# What programs hang behind the name of an image to name its annotation map.
_MAP_ENDING = re.compile(r"[-_. ]?(annotation|gt|label|labels|mask|seg|segmentation)$", re.IGNORECASE)


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
        UserError: nothing there, or nothing that holds images, or it cannot be told what is what.
    """
    text = os.fspath(location)
    if "://" in text:
        raise UserError(_no_address(text))
    path = Path(text).expanduser()
    options = {"extra_splits": extra_splits, "whole": whole, "cache_dir": cache_dir}
    if path.is_dir():
        location = Location(text, path, list(list_files(path)), named=False, **options)
    elif matches := [path] if path.exists() else match_pattern(str(path)):
        files = [match for match in matches if match.is_file()]
        root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
        location = Location(text, root, files, named=True, **options)
    elif _looks_local(text):
        raise UserError(f"{text}: no such file or directory")
    else:
        return HubSource(text, config_name, revision=revision, token=token, cache_dir=cache_dir, streaming=streaming)
    found = (opened for layout in LAYOUTS if (opened := layout(location)) is not None)
    source = next(found, None)
    if source is None:
        raise UserError(_no_images(location))
    return source


@dataclass(frozen=True)
class Location:
    """Files on this machine, by what they may be good for.

    Attributes:
        name: as it was given, for messages.
        root: the folder below which all of them lie.
        named: they were named themselves, or by a pattern, so that folders mean nothing.
        extra_splits, whole, cache_dir: as `open_source` takes them.
    """

    name: str
    root: Path
    files: list[Path]
    named: bool
    extra_splits: tuple[str, ...]
    whole: bool
    cache_dir: str | None

    @functools.cached_property
    def images(self) -> list[Path]:
        return image_files(self.files)

    @functools.cached_property
    def others(self) -> list[Path]:
        return self.all_but(self.images)

    @property
    def parquet(self) -> list[Path]:
        """Files that hold images; beside images, a table without any is about them."""
        return [
            file
            for file in self.with_suffix(PARQUET_SUFFIXES)
            if file.name not in METADATA_FILES and (not self.images or has_image_column(file))
        ]

    @property
    def metadata(self) -> list[Path]:
        return [file for file in self.others if file.name in METADATA_FILES]

    @functools.cached_property
    def split_of(self) -> Callable[[str], str | None]:
        """The split that a word means."""
        return split_finder(self.extra_splits)

    def with_suffix(self, suffixes: Collection[str]) -> list[Path]:
        return [file for file in self.others if file.suffix.lower() in suffixes]

    def split_of_folder(self, file: Path) -> str | None:
        """The split that a directory of a file is named after."""
        if self.whole:
            return None
        folders = parts_below(self.root)(file)[:-1]
        return next((split for split in map(self.split_of, folders) if split), None)

    def all_but(self, read: Iterable[Path]) -> list[Path]:
        known = set(read)
        return [file for file in self.files if file not in known]


def _open_saved(place: Location) -> SavedSource | None:
    return SavedSource(place.root) if not place.named and is_saved_dataset(place.root) else None


def _open_parquet(place: Location) -> FileSource | None:
    return _open_files(place, place.parquet, ParquetSource)


def _open_tars(place: Location) -> FileSource | None:
    return _open_files(place, place.with_suffix(TAR_SUFFIXES), TarSource)


def _open_files(place: Location, members: list[Path], kind: type[FileSource]) -> FileSource | None:
    """Files that hold many images each."""
    if not members:
        return None
    files, origins = _file_splits(place, members)
    unread = place.all_but(file for paths in files.values() for file in paths)
    return kind(place.name, files, origins=origins, left_out=count_by_suffix(unread), cache_dir=place.cache_dir)


def _open_images(place: Location) -> FolderSource | None:
    """Images, and what tells of each of them."""
    if not place.images:
        return None
    if place.metadata and names_files(place.metadata):
        return _open_metadata(place)
    if place.named:
        return _listed(place, {"train": rows_of_classes([(image, None) for image in place.images])}, {}, place.others)
    source = _open_coco(place) or _open_maps(place) or _open_table(place)
    if source is None and place.metadata:
        return _open_metadata(place)  # which says what it lacks
    return source or _open_folders(place)


# Asked in this order; each gives the source if the files are its own. A new kind of file is one class and one line.
LAYOUTS: list[Callable[[Location], Source | None]] = [_open_saved, _open_parquet, _open_tars, _open_images]


def _listed(
    place: Location, rows: dict[str, Listed], origins: dict[str, str], unread: Sequence[Path], **others: Any
) -> FolderSource:
    left_out = {**count_by_suffix(unread), **others.pop("more_left_out", {})}
    if hint := heif_hint(left_out):
        logger.warning("%s: not read: %s%s", place.name, counted(left_out), hint)
    return FolderSource(place.name, rows, origins=origins, left_out=left_out, **others)


def _open_folders(place: Location) -> FolderSource:
    folders = read_folders(place.root, place.images, place.others, place.extra_splits, place.whole)
    for split, files in folders.files.items():
        if len(names := {label for _, label in files}) == 1 and str(names.pop()).lower() in _IMAGE_FOLDERS:
            folders.files[split] = [(file, None) for file, _ in files]  # `images` is no class
    rows = {split: rows_of_classes(files) for split, files in folders.files.items()}
    unread = [*place.others, *folders.left_out]
    return _listed(place, rows, folders.origins, unread, unlabelled=_no_labels(place))


def _file_splits(place: Location, files: list[Path]) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Files by the split that a directory or a word of the file's name tells (`data/train-00000-of-00002.parquet`)."""
    splits: dict[str, list[Path]] = {}
    origins: dict[str, str] = {}
    unnamed = []
    parts_of = parts_below(place.root)
    for file in () if place.whole else files:
        folders = parts_of(file)[:-1]
        exact = [name for name in folders if name in place.extra_splits or canonical(name) in SPLIT_ALIASES]
        words = [*exact, *re.split(r"[-._ 0-9]+", file.stem), *folders]
        split, word = next(((split, word) for word in words if (split := place.split_of(word))), (None, None))
        if split is None:
            unnamed.append(file)
        else:
            splits.setdefault(split, []).append(file)
            origins.setdefault(split, f"folder {word}" if word in folders else f"files named {word}")
    if not splits:
        return {"train": list(files)}, {"train": "everything there is"}
    if unnamed:
        logger.warning(
            "%s: %d of %d files are named after no split and are left out, %s for one",
            place.root,
            len(unnamed),
            len(files),
            unnamed[0].name,
        )
    return splits, origins


def _open_metadata(place: Location) -> FolderSource:
    described = read_metadata(place.metadata, Places(place.root, place.images))
    return _open_described(place, described, place.metadata, lambda row: None)


def _open_table(place: Location) -> FolderSource | None:
    """A table as competitions have it (labels.csv: id,breed), unless the classes are told by folders."""
    found, places = find_tables(place.others, place.root, place.images)
    if not found:
        return None
    tables = {path: place.split_of(path.stem) for path in found}
    if len(found) > 1 and (None in tables.values() or len(set(tables.values())) < len(tables)):
        raise UserError(
            f"{place.name} has several tables that name its images, {few([path.name for path in found])}: which is "
            "meant cannot be told. Move away the others, or name them after the splits (train.csv, val.csv)"
        )

    def belongs(table: Path, file: Path) -> bool:
        return place.split_of_folder(file) == tables[table]

    described = read_tables(found, places, belongs)
    folders = {image.parent.name for image in described.files["image"] if place.split_of(image.parent.name) is None}
    if len(folders) > 1 and not _goes_before_folders(place, described, folders, next(iter(found))):
        return None
    # Beside train.csv, the table of a test without labels has no rows here; where there is one table, folders decide.
    split_of_row = (lambda row: tables[described.origin[row]]) if len(tables) > 1 else (lambda row: None)
    return _open_described(place, described, list(found), split_of_row)


def _goes_before_folders(place: Location, described: Described, folders: set[str], path: Path) -> bool:
    """Whether a table tells the classes of images that lie in several folders; a table of anything else does not."""
    table = described.table
    try:
        column = find_label_column(Features.from_arrow_schema(table.schema), None, place.name)
    except UserError:
        column = None
    others = [name for name in table.column_names if name != "split"]
    alone = others[0] if column is None and len(others) == 1 and pa.types.is_string(table[others[0]].type) else None
    values = set(map(str, table[column or alone].unique().to_pylist())) if column or alone else set()
    how = "call it metadata.csv and its column of files file_name"
    if values and not folders & values and len(values) <= len(table) / 2:
        if column:
            return True
        raise UserError(
            f"{path} may tell the classes of the images ({alone}: {few(sorted(values))}), and so may their folders "
            f"({few(sorted(folders))}): to use the table, {how}; to use the folders, move the table away"
        )
    logger.warning("%s is not used, although it names images: the folders tell the classes. To use it, %s", path, how)
    return False


def _open_described(
    place: Location, described: Described, tables: Sequence[Path], split_of_row: Callable[[int], str | None]
) -> FolderSource:
    """Rows of tables, by the split of their table, the folder of their image, or a column `split`."""
    images, table = described.files["image"], described.table
    different = sorted({path.name for path in tables})
    names = few(different if len(different) < 3 else [f"{len(tables)} tables"])
    if not images:
        raise UserError(
            f"{place.name}: none of the {described.missing} files that {names} names is there, {described.example} "
            f"for one: names are relative to the folder of the table, {tables[0].parent}"
        )
    told = [split_of_row(row) or place.split_of_folder(image) for row, image in enumerate(images)]
    origin = "rows of {names} for folder {split}"
    if not any(told) and not place.whole and "split" in table.column_names:
        told = [place.split_of(str(value)) for value in table["split"].to_pylist()]
        if None in told:
            told = [None] * len(images)
        else:
            origin = "rows of {names} with split {split}"
    members: dict[str, list[int]] = {}
    if any(told) and not (None in told and set(told) == {None, "train"}):
        for row, split in enumerate(told):
            members.setdefault(split or "", []).append(row)
    else:
        members["train"] = list(range(len(images)))
        origin = "all rows of {names}"
    apart = members.pop("", [])
    more = {
        "rows whose file is not there": described.missing,
        "rows in no folder of a split": len(apart),
        "images without a row": len(set(place.images).difference(*described.files.values())),
    }
    more = {kind: count for kind, count in more.items() if count}
    if len(set(images)) < len(images):
        logger.warning("%s: %d files have several rows in %s", place.name, len(images) - len(set(images)), names)
    if more:
        example = f"; {described.example}, for one, is not there" if described.missing else ""
        logger.warning("%s: %s: left out %s%s", place.name, names, counted(more), example)
    everything = Listed(described.files, table if table.num_columns else None)
    rows = {split: everything.taken(np.array(chosen)) for split, chosen in members.items()}
    columns = [column for column in table.column_names if column != "split"]
    label_column = columns[0] if len(columns) == 1 else None
    origins = {split: origin.format(names=names, split=split) for split in rows}
    unread = [file for file in place.others if file not in tables]
    return _listed(place, rows, origins, unread, label_column=label_column, more_left_out=more)


def _open_maps(place: Location) -> FolderSource | None:
    """images/1.jpg beside masks/1.png, with folders of splits above or below these; None where it is not so."""
    images: dict[tuple[str, ...], Path] = {}
    maps: dict[tuple[str, ...], Path] = {}
    parts_of = parts_below(place.root)
    for file in place.images:
        parts = parts_of(file)
        folders = [part.lower() for part in parts[:-1]]
        of_images = [index for index, name in enumerate(folders) if name in _IMAGE_FOLDERS]
        of_maps = [index for index, name in enumerate(folders) if name in _MAP_FOLDERS]
        if len(of_images) + len(of_maps) != 1:
            continue
        above = [part for index, part in enumerate(parts[:-1]) if index not in (*of_images, *of_maps)]
        if of_images:
            images[(*above, file.stem)] = file
        else:
            maps.setdefault((*above, file.stem), file)
            maps.setdefault((*above, _MAP_ENDING.sub("", file.stem)), file)
    if not images or not maps:
        return None
    pairs = {key: (file, maps[key]) for key, file in images.items() if key in maps}
    if len(pairs) < len(images) / 2:
        image, map_ = next(iter(images.values())), next(iter(maps.values()))
        raise UserError(
            f"{place.name} has images beside annotation maps, but of {len(images)} images only {len(pairs)} have a "
            f"map of their name, {image.relative_to(place.root)} and {map_.relative_to(place.root)} for example: give "
            "both the same name (images/1.jpg, masks/1.png); or, if these folders are classes, other names"
        )
    members: dict[str, list[tuple[Path, Path]]] = {}
    for image, map_ in pairs.values():
        members.setdefault(place.split_of_folder(image) or "train", []).append((image, map_))
    rows = {
        split: Listed({"image": [image for image, _ in both], "annotation": [map_ for _, map_ in both]})
        for split, both in members.items()
    }
    unread = place.all_but(file for pair in pairs.values() for file in pair)
    origins = {split: f"images beside maps{f', folder {split}' if len(rows) > 1 else ''}" for split in rows}
    unlabelled = (
        f"{place.name} has images beside annotation maps, which are no labels: hf-poolformer train-dense --task "
        "semantic-segmentation learns from them"
    )
    return _listed(place, rows, origins, unread, unlabelled=unlabelled)


def _open_coco(place: Location) -> FolderSource | None:
    """COCO's JSON beside images, as rows of objects; None where there is none."""
    candidates = [file for file in place.others if file.suffix.lower() == ".json"]
    candidates = [
        file for file in candidates if re.search(r"instances|coco|annotation|^(train|val|valid|test)", file.stem)
    ]
    candidates = [file for file in candidates if file.stem.startswith("instances")] or candidates
    if len(candidates) > MANY_TABLES:
        return None  # one file for each image, of some other program
    documents = {path: document for path in candidates if (document := _coco_document(path)) is not None}
    if not documents:
        return None
    places = Places(place.root, place.images)
    rows: dict[str, Listed] = {}
    origins: dict[str, str] = {}
    names: dict[int, str] = {}
    missing = 0
    for path, document in documents.items():
        split = next(filter(None, (place.split_of(path.stem), place.split_of_folder(path))), "train")
        if place.whole or len(documents) == 1:
            split = "train"
        if split in rows:
            raise UserError(
                f"{place.name} has two files of COCO's for the split {split}: {origins[split]} and {path.name}. Name "
                "them after the splits (instances_train.json, instances_val.json), or move one away"
            )
        own = {category["id"]: str(category["name"]) for category in document["categories"]}
        if any(names.get(key, name) != name for key, name in own.items()):
            raise UserError(f"{path} gives the ids of categories other names than {few(list(origins.values()))}")
        names |= own
        rows[split], lost = _coco_rows(path, document, places, lambda file, split=split: _in_split(place, file, split))
        origins[split] = path.name
        missing += lost
    more = {"images in the JSON that are not there": missing} if missing else {}
    if not all(map(len, rows.values())):
        raise UserError(f"{place.name}: none of the images that {few(list(origins.values()))} names is there")
    if more:
        logger.warning("%s: left out %s", place.name, counted(more))
    unlabelled = (
        f"{place.name} has COCO's annotations of objects ({few(list(origins.values()))}), which are no labels: "
        "hf-poolformer train-dense --task object-detection or instance-segmentation learns from them. To learn from "
        "folders of classes, move the JSON away"
    )
    unread = place.all_but([*documents, *(image for split in rows.values() for image in split.images)])
    return _listed(place, rows, origins, unread, class_names=names, unlabelled=unlabelled, more_left_out=more)


def _in_split(place: Location, file: Path, split: str) -> bool:
    return place.split_of_folder(file) == split


def _coco_document(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    parts = (
        [document.get(name) for name in ("images", "annotations", "categories")] if isinstance(document, dict) else []
    )
    complete = parts and all(isinstance(part, list) for part in parts) and parts[0]
    return document if complete and all("bbox" in annotation for annotation in parts[1]) else None


def _coco_rows(
    path: Path, document: Mapping[str, Any], places: Places, preferred: Callable[[Path], bool]
) -> tuple[Listed, int]:
    """A row for each image that is there, and how many are not. Masks stay JSON text: polygons and run lengths."""
    try:
        objects: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in document["images"]}
        for entry in document["annotations"]:
            mask = entry.get("segmentation")
            objects[entry["image_id"]].append(
                {
                    "bbox": [float(value) for value in entry["bbox"]],
                    "category": entry["category_id"],
                    "segmentation": to_json(mask) if mask else None,
                    "iscrowd": int(entry.get("iscrowd") or 0),
                    "area": None if entry.get("area") is None else float(entry["area"]),
                }
            )
        entries = [(entry, places.meant(entry["file_name"], path.parent, preferred)) for entry in document["images"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not as COCO has it: {type(error).__name__} {one_line(error)}") from error
    there = [(entry, file) for entry, file in entries if file is not None]
    table = pa.table(
        {
            "image_id": pa.array([entry["id"] for entry, _ in there]),
            "width": pa.array([entry.get("width") for entry, _ in there], pa.int64()),
            "height": pa.array([entry.get("height") for entry, _ in there], pa.int64()),
            "objects": pa.array([objects[entry["id"]] for entry, _ in there], pa.list_(_COCO_OBJECT)),
        }
    )
    return Listed({"image": [file for _, file in there]}, table), len(entries) - len(there)


_COCO_OBJECT = pa.struct(
    {
        "bbox": pa.list_(pa.float64()),
        "category": pa.int64(),
        "segmentation": pa.string(),
        "iscrowd": pa.int64(),
        "area": pa.float64(),
    }
)


def _no_images(place: Location) -> str:
    archives = [file for file in place.files if file.name.lower().endswith(_ARCHIVES)]
    if archives:
        verb = "is" if place.named else "holds"
        return (
            f"{place.name} {verb} an archive ({archives[0].name}), which is not read as it is: unpack it, and name "
            "the folder"
        )
    left_out = count_by_suffix(place.files)
    if place.named:
        return f"{place.name} is neither an image nor a Parquet file nor a WebDataset tar{heif_hint(left_out)}"
    holds = f"{len(place.files)} files but " if place.files else ""
    kinds = f" ({counted(left_out)}){heif_hint(left_out)}" if place.files else ""
    return f"{place.name} holds {holds}no images, Parquet files or WebDataset tars{kinds}"


def _no_labels(place: Location) -> str:
    names = [os.path.relpath(image, place.root) for image in place.images[:2]]
    lines = ", ".join(f'"{line}"' for line in ["file_name,label", *(f"{name},cat" for name in names)])
    texts = sum(file.suffix.lower() == ".txt" for file in place.others)
    yolo = texts > len(place.images) / 2
    return (
        f"{place.name} has images but no label column and no folders for classes"
        + (" (boxes in .txt files, as YOLO has them, are not read: convert them to COCO's JSON)" if yolo else "")
        + f": put the images into one folder for each class, or write a file metadata.csv beside them: {lines}"
    )


def _no_address(text: str) -> str:
    hub = re.search(r"(?:huggingface\.co|hf\.co|hf:/)/datasets/([^/?#@]+/[^/?#@]+)", text)
    if hub:
        return f"{text} is an address: name the dataset by its id, --dataset_name {hub[1]}"
    return (
        f"{text} is an address, and data is read from this machine or from the Hub: download it and name the file or "
        "folder, or give the id of a dataset on the Hub (--dataset_name owner/name)"
    )


def _looks_local(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.count("/") > 1
        or glob.has_magic(text)
        or Path(text).suffix.lower() in IMAGE_SUFFIXES | PARQUET_SUFFIXES | TAR_SUFFIXES | {ARRAY_SUFFIX}
        or text.lower().endswith(_ARCHIVES)
    )
