"""How rows store what is learned of their images: one class, any number of classes, or numbers.

A `Storage` turns the values that a row has in its label columns into what a batch holds. Which storage it is, is
found out once, when a dataset is opened (`contents.py`); here rows are read by it, in the workers, too.
"""

from __future__ import annotations

import abc
import ast
import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from ..foundation.errors import UserError, one_line
from ..foundation.names import printable
from .classes import Classes, class_key, marks_nothing
from .decoding import BrokenImage


_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# numpy's way to print a list of texts: no commas, so that Python would take it for one text.
_WITHOUT_COMMAS = re.compile(r"""['"]\s+['"]""")


class Unlabelled(BrokenImage):
    """A row without a label."""


class Storage(abc.ABC):
    """What the values of a row's label columns mean."""

    @abc.abstractmethod
    def label(self, values: Sequence[Any], classes: Classes | None) -> np.ndarray | np.int64:
        """The label of a row, as it goes into a batch.

        Args:
            values: of the label columns, in their order.

        Raises:
            Unlabelled: it has none.
            UserError: it is none that this dataset can have.
        """

    def described(self) -> str:
        """How labels are stored, where the type of the column does not tell."""
        return ""


@dataclass(frozen=True)
class One(Storage):
    """One class: int64, its index."""

    def label(self, values: Sequence[Any], classes: Classes | None) -> np.int64:
        (value,) = values
        if value is None:
            raise Unlabelled("it has no label")
        index = classes.index(value)
        if index is None:
            raise Unlabelled(f"its label is {value}, which stands for none")
        return np.int64(index)


class Nothing(Storage):
    """No label, whatever columns there are: int64, 0, so that a batch has as many labels as images."""

    def label(self, values: Sequence[Any], classes: Classes | None) -> np.int64:
        return np.int64(0)


class Several(Storage):
    """Any number of classes: float32 (number of classes,), 1 for those that the image has, else 0."""

    def label(self, values: Sequence[Any], classes: Classes | None) -> np.ndarray:
        keys = self.keys(values)
        if keys is None:
            raise Unlabelled("it has no label")
        target = np.zeros(len(classes.names), dtype=np.float32)
        target[[classes.index(key) for key in keys]] = 1
        return target

    @abc.abstractmethod
    def keys(self, values: Sequence[Any]) -> frozenset[str] | None:
        """The keys (`class_key`) of a row's classes, each once; empty: none of them; None: nobody has looked."""


@dataclass(frozen=True)
class Lists(Several):
    """A list of classes."""

    def keys(self, values: Sequence[Any]) -> frozenset[str] | None:
        return None if values[0] is None else _keys(values[0])


@dataclass(frozen=True)
class Texts(Several):
    """A text with the names of classes.

    Args:
        separator: stands between them; empty for lists as JSON or Python write them. A name that contains it stands
            in double quotes, as in CSV.
        whole: names known to contain it.
    """

    separator: str
    whole: tuple[str, ...] = ()

    def keys(self, values: Sequence[Any]) -> frozenset[str] | None:
        text = values[0]
        if class_key(text) is None:
            return None
        if not isinstance(text, str):  # a split whose only labels are numbers, one each
            return _keys([text])
        if text.strip() == "[]":
            return frozenset()
        if not self.separator:
            return _keys(_listed(text))
        if '"' in text and len(self.separator) == 1:
            try:
                return _keys(next(csv.reader([text], delimiter=self.separator, skipinitialspace=True)))
            except csv.Error as error:
                raise UserError(f"the classes {printable(text)!r} cannot be told apart: {one_line(error)}") from error
        torn = next((name for name in self.whole if name in text), None)
        if torn is not None:
            raise UserError(
                f"the class {torn!r} contains {self.separator!r}, which separates the classes in {text!r}: put it in "
                "double quotes, choose another --label_separator, or store lists"
            )
        return _keys(text.split(self.separator))

    def described(self) -> str:
        return f"names separated by {self.separator!r}" if self.separator else "lists written as text"


@dataclass(frozen=True)
class Flags(Several):
    """A column for each class, with true and false, 1 and 0, yes and no.

    Args:
        names: of the classes, those of the columns.
    """

    names: tuple[str, ...]

    def keys(self, values: Sequence[Any]) -> frozenset[str] | None:
        told = [_flag(value, f"the column {name!r}") for name, value in zip(self.names, values, strict=True)]
        if None in told:
            return None
        return frozenset(class_key(name) for name, flag in zip(self.names, told, strict=True) if flag)

    def described(self) -> str:
        return "a column for each class"


@dataclass(frozen=True)
class Vector(Several):
    """A list of as many zeros and ones as there are classes."""

    length: int

    def keys(self, values: Sequence[Any]) -> frozenset[str] | None:
        if values[0] is None:
            return None
        told = [_flag(value, "a vector of zeros and ones") for value in values[0]]
        if len(told) != self.length:
            raise UserError(f"its label has {len(told)} zeros and ones, and there are {self.length} classes")
        return None if None in told else frozenset(str(index) for index, flag in enumerate(told) if flag)

    def described(self) -> str:
        return f"vectors of {self.length} zeros and ones"


@dataclass(frozen=True)
class Numbers(Storage):
    """Numbers: float32 (number of targets,).

    Args:
        order: places of the targets among the numbers of a row; of several columns, or of lists, one behind the other.
    """

    order: tuple[int, ...]

    def label(self, values: Sequence[Any], classes: Classes | None) -> np.ndarray:
        numbers = self.numbers(values)
        if numbers is None:
            raise Unlabelled("a number is missing, or is not finite")
        return np.array(numbers, dtype=np.float32)

    def numbers(self, values: Sequence[Any]) -> list[float] | None:
        """The targets of a row; None where one of them is missing or no finite number."""
        stored: list[Any] = []
        for value in values:
            stored += value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        if any(value is None or not math.isfinite(value) for value in stored):
            return None
        if len(stored) != len(self.order):
            raise UserError(f"its label has {len(stored)} numbers instead of {len(self.order)}")
        return [float(stored[place]) for place in self.order]


def _keys(values: Iterable[Any]) -> frozenset[str] | None:
    """Of the elements of a list. Fillers (None, -1) are no classes; where there is nothing else, nobody has looked."""
    keys = [class_key(value) for value in values]
    found = [key for key in keys if key is not None and not marks_nothing(key)]
    return None if keys and not found else frozenset(found)


def _listed(text: str) -> list[Any]:
    """A list that is written as text: JSON, or what Python prints."""
    try:
        values = json.loads(text)
    except ValueError:
        try:
            values = None if _WITHOUT_COMMAS.search(text) else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values = None
    if not isinstance(values, (list, tuple)):
        raise UserError(f'the label {text!r} is no list, such as ["cat", "dog"]')
    return list(values)


def _flag(value: Any, where: str) -> bool | None:
    """Whether a class is there; None if nobody has looked."""
    if isinstance(value, str):
        told = _WORDS.get(value.strip().lower())
        if told is None and value.strip():
            raise UserError(f"{where} holds {value!r}, and not true or false, 1 or 0")
        return told
    if value is None or (isinstance(value, (float, np.floating, Decimal)) and math.isnan(value)):
        return None
    if value not in (0, 1):
        raise UserError(
            f"{where} holds {value}: store 1 where an image has the class, 0 where it has not, and nothing where "
            "nobody has looked"
        )
    return bool(value)
