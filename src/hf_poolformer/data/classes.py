"""Stored value -> class: one table, the same in training, evaluation, prediction and the dense tasks.

A stored label is not a class index: files hold 1..N, 0.0 and 1.0, names in two spellings of Unicode, COCO's 1..90
without some. Whatever is stored has a key, a text; a table says which class has it. Where the table is more than the
classes' names, it is saved in the model's configuration.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from ..foundation.errors import UserError


# The field of a model's configuration that holds a table: `{"1": 0, "3": 1}`.
CONFIG_FIELD = "label_values"


class UnknownClass(UserError):
    """A stored label that belongs to no class."""


def class_key(value: Any) -> str | None:
    """The text under which a stored label is looked up; None where there is no label.

    True, 1 and 1.0 have one key, and so have the two ways in which Unicode writes an accented letter. Nothing that is
    not there is a label: None, NaN, an empty text.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value.strip()) or None
    if isinstance(value, (bool, np.bool_, int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating, Decimal)):
        if math.isnan(value):
            return None
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(float(value))
    raise UnknownClass(f"a label is {type(value).__name__}, not a number or a name")


def are_placeholders(names: Sequence[str]) -> bool:
    """Whether these are transformers' names for classes without a name: `LABEL_0`, `LABEL_1`, ..."""
    return set(names) == {f"LABEL_{index}" for index in range(len(names))}


def is_number(key: str) -> bool:
    """Whether the key is that of an integer."""
    return re.fullmatch(r"-?(0|[1-9]\d*)", key) is not None


def marks_nothing(key: str) -> bool:
    """Whether a key that no class has stands for `no label`: -1, -100 and their like do."""
    return is_number(key) and key.startswith("-")


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys as classes are numbered: integers by value, then names."""
    return sorted(keys, key=lambda key: (0, int(key), "") if is_number(key) else (1, 0, key))


@dataclass(frozen=True)
class Classes:
    """Names of classes, and which stored values mean which.

    Attributes:
        names: by index.
        table: key of a stored value -> index.
    """

    names: tuple[str, ...]
    table: Mapping[str, int]

    @classmethod
    def numbered(cls, names: Sequence[str]) -> Classes:
        """What is stored is the index: a `ClassLabel`."""
        return cls(tuple(names), {str(index): index for index in range(len(names))})

    @classmethod
    def stored(cls, keys: Iterable[str]) -> Classes:
        """What is stored is the name, or a number in its place: found by reading a column."""
        return cls.keyed({key: key for key in keys})

    @classmethod
    def keyed(cls, names: Mapping[str, str]) -> Classes:
        """Stored value -> name, as `id2label.json` has it: values may begin anywhere and have gaps."""
        keys = in_order(names)
        return cls(tuple(names[key] for key in keys), {key: index for index, key in enumerate(keys)})

    @classmethod
    def named(cls, names: Sequence[str]) -> Classes:
        """Only names are known: a text is a name, and a number a name, too, if all names are numbers, or an index."""
        table = {class_key(name): index for index, name in enumerate(names)}
        if None in table or len(table) < len(names):
            raise UserError(f"class names are empty or occur twice: {', '.join(map(str, names[:10]))}")
        if not any(map(is_number, table)):
            table |= {str(index): index for index in range(len(names))}
        return cls(tuple(names), table)

    @classmethod
    def of_config(cls, config: PretrainedConfig) -> Classes:
        """Those of a trained model: its saved table and its names."""
        classes = cls.named([config.id2label[index] for index in range(config.num_labels)])
        saved = getattr(config, CONFIG_FIELD, None)
        if not saved:
            return classes
        if not isinstance(saved, Mapping) or not all(
            isinstance(index, int) and 0 <= index < len(classes.names) for index in saved.values()
        ):
            raise UserError(f"{CONFIG_FIELD} in the model's configuration is no table of stored value: class index")
        # Numbers mean what the table says and nothing else; names stay names.
        texts = {key: index for key, index in classes.table.items() if not is_number(key)}
        return cls(classes.names, texts | {str(key): index for key, index in saved.items()})

    def for_config(self) -> dict[str, int] | None:
        """What `of_config` needs beside the names; None where the names tell everything."""
        known = Classes.named(self.names).table
        return None if self.table.items() <= known.items() else dict(self.table)

    def index(self, value: Any) -> int | None:
        """The class of a stored value; None if it stands for no label.

        Raises:
            UnknownClass: it is no class.
        """
        key = class_key(value)
        if key is None:
            return None
        found = self.table.get(key)
        if found is None and not marks_nothing(key):
            raise UnknownClass(f"label {value!r} is none of the {len(self.names)} classes: {self.shown()}")
        return found

    def shown(self) -> str:
        """For a message: the first classes, and how they are stored where that differs."""
        keys = {index: key for key, index in self.table.items() if is_number(key)}
        parts = [
            name if keys.get(index) in (None, name, str(index)) else f"{keys[index]} ({name})"
            for index, name in enumerate(self.names)
        ]
        return ", ".join(parts[:10]) + (", ..." if len(parts) > 10 else "")

    def renumbered(self, names: Sequence[str]) -> Classes:
        """The same stored values with the indices of other names, which contain these."""
        indices = {class_key(name): index for index, name in enumerate(names)}
        moved = [indices[class_key(name)] for name in self.names]
        return Classes(tuple(names), {key: moved[index] for key, index in self.table.items()})
