"""The search space of a sweep: which values of which settings are tried."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..foundation.errors import UserError
from ..foundation.settings import as_flags, check_names, kinds_of, names_marked, names_of, read_yaml, words_of
from ..settings.training import TrainingSettings


if TYPE_CHECKING:
    import optuna


FORMS = "low..high, log:low..high, low..high:step, or values with commas between them"
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"(log:)?({NUMBER})\.\.({NUMBER})(?::({NUMBER}))?")
MOST_COMBINATIONS = 10_000  # of a grid; nobody has the time for more

# What a sweep cannot change from one trial to the next.
FIXED = {
    "task": "trials of different tasks have no figure in common",
    "mixed_precision": "accelerate keeps to the precision of a process's first run. Make two sweeps",
    "dynamo_backend": "it changes how fast a run is, and not what comes out of it",
}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    step: float | None
    log: bool
    whole: bool

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def ends(self) -> list[Any]:
        return [self.low, self.high]

    def every(self) -> list[Any] | None:
        """All values, if they can be counted."""
        if self.log or not (self.whole or self.step):
            return None
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self.low + index * step for index in range(count)] if count <= MOST_COMBINATIONS else None


@dataclass(frozen=True)
class Choices:
    """Some values."""

    values: tuple[Any, ...]
    log = False

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)

    def ends(self) -> list[Any]:
        return list(self.values)

    def every(self) -> list[Any]:
        return list(self.values)


Space = dict[str, Range | Choices]


def read_texts(searches: Sequence[str], file: str | None) -> dict[str, Any]:
    """What `--search NAME=VALUES` and the YAML file of `--search_file` say, by names.

    Raises:
        UserError: one of them says nothing, or two say something of one setting.
    """
    texts = {str(name).replace("-", "_"): value for name, value in (read_yaml(file) if file else {}).items()}
    for search in searches:
        name, sign, text = search.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not (name and sign and text.strip()):
            raise UserError(f"--search {search}: it takes NAME=VALUES, and VALUES are {FORMS}.")
        if name in texts:
            raise UserError(f"--search {name} is there twice.")
        texts[name] = text.strip()
    if not texts:
        raise UserError(
            "say what to search: --search learning_rate=log:1e-4..1e-2 weight_decay=0.01,0.05,0.1, or --search_file."
        )
    return texts


def make_space(texts: Mapping[str, Any], kind: type[TrainingSettings]) -> Space:
    """The space of some settings of a task, before it is known whether the settings take these values.

    Raises:
        UserError: there is no such setting (the message names those that may have been meant), it is nothing to
            search, or its values cannot be read.
    """
    check_names(texts, names_of(kind), "setting to search")
    searchable = names_marked([kind], "decides")
    space: Space = {}
    for name, text in texts.items():
        if name in FIXED:
            raise UserError(f"--search {name}: {FIXED[name]}.")
        if name not in searchable:
            raise UserError(f"--search {name}: the result of a run does not depend on it. Give it as --{name}.")
        space[name] = dimension(name, text, kind)
    return space


def dimension(name: str, text: Any, kind: type[TrainingSettings]) -> Range | Choices:
    """What `text` says of a setting: a list of values, or text as --search takes it."""
    kinds = kinds_of(kind)[name]
    is_number = int in kinds or float in kinds
    if isinstance(text, str) and ".." in text and is_number:
        return number_range(name, text.replace(" ", ""), whole=float not in kinds)
    if isinstance(text, str) and text.startswith("["):
        try:
            text = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--search {name}: {text} is not JSON ({error}).") from error
    values = text if isinstance(text, list) else str(text).split(",")
    flags = [flag.partition("=")[2] for value in values for flag in as_flags({name: value}, kind)]
    plain = tuple(dict.fromkeys(plain_value(flag.strip(), kinds) for flag in flags))
    if len(plain) < 2:
        raise UserError(f"--search {name}={text}: that is one value. It takes {FORMS}.")
    return Choices(plain)


def number_range(name: str, text: str, whole: bool) -> Range:
    """
    Raises:
        UserError: it is none.
    """
    found = RANGE.fullmatch(text)
    if found is None:
        raise UserError(f"--search {name}={text}: it takes {FORMS}.")
    log, *ends = found.groups()
    numbers = [None if end is None else float(end) for end in ends]
    low, high, step = numbers
    if low >= high:
        raise UserError(f"--search {name}={text}: the first number must be less than the second.")
    if log and low <= 0:
        raise UserError(f"--search {name}={text}: on a logarithmic scale there is no {low:g}; begin above 0.")
    if log and step is not None:
        raise UserError(f"--search {name}={text}: a logarithmic scale has no steps.")
    if step is not None and step <= 0:
        raise UserError(f"--search {name}={text}: the step must be above 0.")
    if whole and any(number is not None and not number.is_integer() for number in numbers):
        raise UserError(f"--search {name}={text}: {name} takes whole numbers.")
    if step is not None:  # what is reached
        high = low + math.floor((high - low) / step + 1e-9) * step
    if whole:
        low, high, step = (None if number is None else int(number) for number in (low, high, step))
    return Range(low, high, step, bool(log), whole)


def plain_value(text: str, kinds: Sequence[Any]) -> Any:
    """A value as the study keeps it: a number where the setting takes numbers, else text."""
    if text not in words_of(kinds):
        for number in (int, float):
            if number in kinds and bool not in kinds:
                try:
                    return number(text)
                except ValueError:
                    continue
    return text


def check_space(space: Space, settings_of: Callable[[Mapping[str, Any]], TrainingSettings]) -> None:
    """Asks for the settings of each value, and of both ends of a range, with the others at their first.

    Raises:
        UserError: what the settings say of a value.
    """
    first = {name: one.ends()[0] for name, one in space.items()}
    settings_of(first)
    for name, one in space.items():
        for value in one.ends()[1:]:
            try:
                settings_of({**first, name: value})
            except UserError as error:
                raise UserError(f"--search {name}, {value}: {error}") from error


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations of values, in order.

    Raises:
        UserError: they cannot be counted, or are too many.
    """
    every = {name: one.every() for name, one in space.items()}
    for name, values in every.items():
        if values is None:
            raise UserError(
                f"--sampler grid tries all values, and those of {name} cannot be counted: give values with commas "
                "between them, or low..high:step."
            )
    count = math.prod(map(len, every.values()))
    if count > MOST_COMBINATIONS:
        raise UserError(f"--sampler grid: these are {count} combinations. Take --sampler tpe, or fewer values.")
    return [dict(zip(every, values, strict=True)) for values in itertools.product(*every.values())]


def value_text(value: Any) -> str:
    """A value for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe(one: Range | Choices) -> str:
    """As --search takes it."""
    if isinstance(one, Choices):
        return ",".join(map(value_text, one.values))
    step = f":{one.step:g}" if one.step is not None else ""
    return f"{'log:' if one.log else ''}{one.low:g}..{one.high:g}{step}"
