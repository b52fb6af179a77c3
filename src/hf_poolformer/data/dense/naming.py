"""Classes of annotation maps and objects: their names, and which stored values mean which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel
from huggingface_hub import hf_hub_download

from ...foundation.errors import UserError
from ...foundation.names import first_few
from ...settings.data import AnnotationSettings
from ..class_names import checked_names, listed_classes, parsed_names, read_names, told_names
from ..classes import Classes, class_key, in_order, is_number


# What annotation maps call pixels that belong to no class, where their id2label has a name for 255.
_NOTHING = ("void", "ignore", "ignored", "unlabeled", "unlabelled")
_IGNORED = "255"
# Of an annotation map; 16 bits have fewer.
_MAX_VALUE = 1_000_000


def known_classes(
    settings: AnnotationSettings, feature: Any, name: str, own: Mapping[int, str] | None = None
) -> tuple[Classes | None, bool]:
    """The classes as told, from the dataset's ClassLabel, or from the id2label.json beside it; None if nobody knows.
    And whether 255 is said to be no class.

    Of names with keys (id2label) the keys are what is stored; names without are counted from 0. With `reduce_labels`
    what is stored is larger by one, but keys that begin at 1 are stored as they are.

    Args:
        feature: of the objects' class; None for annotation maps.
        name: what messages call the dataset.
        own: stored class -> name, where the dataset brings that beside its rows.
    """
    told, where = _told(settings, None if isinstance(feature, ClassLabel) else name)
    if told is None and own is not None:
        told, where = {str(stored): text for stored, text in own.items()}, name
    if told is None:
        return (
            Classes.numbered(checked_names(feature.names, name)) if isinstance(feature, ClassLabel) else None
        ), False
    void = feature is None and isinstance(told, Mapping) and str(told.get(_IGNORED)).lower() in _NOTHING
    if isinstance(told, Mapping):
        text = "string" in str(getattr(feature, "dtype", ""))
        kept = {key.strip(): value for key, value in told.items() if not (void and key == _IGNORED)}
        classes = _keyed(kept, where, maps=feature is None, text=text, reduced=settings.reduce_labels)
    else:
        classes = listed_classes(checked_names(told, where))
    if isinstance(feature, ClassLabel) and sorted(feature.names) == sorted(classes.names):
        classes = Classes.numbered(feature.names).renumbered(classes.names)  # the same classes in another order
    return classes, void


def unknown_classes(name: str, seen: Iterable[str]) -> UserError:
    """What to say where nobody knows the classes; `seen` are keys of stored values."""
    values = in_order(seen)
    found = f" The first rows hold {first_few(values, 10)}." if values else ""
    return UserError(
        f"{name} does not name its classes: give them with --label_names background,road,... or as a JSON file with "
        f"id2label, whose keys are the stored values.{found}"
    )


def _told(settings: AnnotationSettings, dataset: str | None) -> tuple[Any, str]:
    """Names as they were given, and where; those beside the data only if `dataset`, its name, is given."""
    names = settings.label_names
    if names:
        return told_names(names)
    path = id2label(settings) if dataset else None
    return (None, "") if path is None else (parsed_names(read_names(path), "id2label.json"), "id2label.json")


def id2label(settings: AnnotationSettings) -> Path | None:
    """The dataset's id2label.json, where transformers' examples keep the names of segmentation classes."""
    folder = Path(settings.dataset_name).expanduser()
    if folder.exists():
        path = (folder if folder.is_dir() else folder.parent) / "id2label.json"
        return path if path.is_file() else None
    try:
        path = hf_hub_download(
            settings.dataset_name,
            "id2label.json",
            repo_type="dataset",
            revision=settings.dataset_revision,
            token=settings.hub_token,
            cache_dir=settings.cache_dir,
        )
    except Exception:  # not there, whatever the reason: the names are then asked for
        return None
    return Path(path)


def _keyed(names: Mapping[str, Any], where: str, *, maps: bool, text: bool, reduced: bool) -> Classes:
    """Classes by the keys of their names; of `text` also by the names."""
    wrong = [key for key in names if not is_number(key)]
    if wrong:
        raise UserError(f"{where} holds neither a list of names nor id2label: its key {wrong[0]!r} is no number.")
    checked_names(list(names.values()), where)
    large = [key for key in names if maps and int(key) > _MAX_VALUE]
    if large:
        raise UserError(f"{where} has the key {large[0]}, which no annotation map holds.")
    if reduced and "0" not in names:
        names = {str(int(key) - 1): name for key, name in names.items()}
    classes = Classes.keyed(names)
    if not text:
        return classes
    by_name = {class_key(name): index for index, name in enumerate(classes.names)}
    return Classes(classes.names, {key: i for key, i in by_name.items() if not is_number(key)} | dict(classes.table))
