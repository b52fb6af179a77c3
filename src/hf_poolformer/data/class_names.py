"""Names of classes as people give them: with commas between them, or in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..foundation.errors import UserError, one_line
from .classes import Classes, class_key, is_number


def told_names(names: str) -> tuple[list[Any] | dict[str, Any], str]:
    """What `--label_names` says, unchecked, and where it says it.

    Returns:
        a list of names, or stored value -> name.
    """
    if not names.endswith(".json"):
        return [part.strip() for part in names.split(",") if part.strip()], "--label_names"
    return parsed_names(read_names(Path(names)), names), names


def told_classes(names: str | None) -> Classes | None:
    """The classes that `--label_names` names; None where it is not given."""
    if not names:
        return None
    told, where = told_names(names)
    if isinstance(told, dict):
        checked_names(list(told.values()), where)
        return Classes.keyed({key.strip(): name for key, name in told.items()})
    return listed_classes(checked_names(told, where))


def listed_classes(names: list[str]) -> Classes:
    """Names that are numbers are what is stored; of a mixture only the places are certain."""
    numbers = [is_number(class_key(name)) for name in names]
    return Classes.named(names) if all(numbers) or not any(numbers) else Classes.numbered(names)


def read_names(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the names of the classes in {path}: {one_line(error)}.") from error


def parsed_names(text: str, where: str) -> list[Any] | dict[str, Any]:
    """A list of names, or stored value -> name: of id2label, of label2id, of COCO's categories."""

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise UserError(f"{where} has a key twice.")
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=no_key_twice)
        if isinstance(values, dict):
            values = values.get("id2label", values.get("categories", values))
        if isinstance(values, list) and values and all(isinstance(entry, dict) for entry in values):
            values = no_key_twice([(str(entry["id"]), entry["name"]) for entry in values])
        elif isinstance(values, dict) and values and all(type(index) is int for index in values.values()):
            values = no_key_twice([(str(index), name) for name, index in values.items()])
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} holds neither a list of names nor id2label: {one_line(error)}.") from error
    if not isinstance(values, (list, dict)):
        raise UserError(f"{where} holds neither a list of names nor id2label.")
    return values


def checked_names(names: Any, where: str) -> list[str]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"the names of the classes in {where} are not a list of texts.")
    keys = [class_key(name) for name in names]
    twice = [name for name, key in zip(names, keys, strict=True) if keys.count(key) > 1]
    if twice:
        raise UserError(f"{where} names the class {twice[0]!r} twice.")
    return names
