"""Settings as dataclasses: each is said once, and flags, YAML files, checks and help come from it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .errors import UserError
from .names import near_names


def setting(
    default: Any,
    help: str,
    aliases: Sequence[str] = (),
    *,
    low: float | None = None,
    high: float = math.inf,
    shown: bool = False,
    path: bool = False,
    decides: bool = True,
    in_file: Literal["value", "list", "mapping"] = "value",
) -> Any:
    """A field of a dataclass of settings, and all that is to be known about it.

    Args:
        aliases: other flags that mean it.
        low, high: of a number, both included.
        shown: the model card of a run shows it.
        path: it may hold a place on this machine, which is nobody else's business.
        decides: the result of a run depends on it, and not only on what it names.
        in_file: what a YAML file may give in its place: a list of names, for names with commas between them, or a
            mapping, for a text of JSON.
    """
    marks = {"shown": shown, "path": path, "decides": decides, "in_file": in_file}
    known = {"help": help, "aliases": list(aliases), "low": low, "high": high, **marks}
    return dataclasses.field(default=default, metadata=known)


def altered(settings: type, name: str, default: Any, help: str | None = None, **changes: Any) -> Any:
    """A setting of these with another default and, where they are given, another help or limits."""
    known = settings.__dataclass_fields__[name].metadata
    return dataclasses.field(default=default, metadata={**known, "help": help or known["help"], **changes})


def names_of(settings: type) -> list[str]:
    return [field.name for field in dataclasses.fields(settings)]


def names_marked(settings: Iterable[type], mark: Literal["shown", "path", "decides"]) -> list[str]:
    """The settings of these dataclasses that have this mark, in the order of their fields."""
    marked = [field.name for kind in settings for field in dataclasses.fields(kind) if field.metadata.get(mark)]
    return list(dict.fromkeys(marked))


def check_values(settings: Any) -> None:
    """
    Raises:
        UserError: a setting has no value and needs one, lies outside of its limits, or is none of its words.
    """
    kinds = kinds_of(type(settings))
    for field in dataclasses.fields(settings):
        name, value, low = field.name, getattr(settings, field.name), field.metadata.get("low")
        if value is None:
            if type(None) not in kinds[name]:
                raise UserError(f"--{name} has no value: give one, or leave it out for the default.")
            continue
        words = words_of(kinds[name])
        if low is None:
            others = [kind for kind in kinds[name] if get_origin(kind) is not Literal and kind is not type(None)]
            if words and value not in words and not others:
                raise UserError(f"--{name} is one of {', '.join(words)}, not {value!r}.")
            continue
        high = field.metadata["high"]
        if value in words:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"--{name} takes {' or '.join(['a number', *words])}, not {value!r}.")
        if not (math.isfinite(value) and low <= value <= high):
            most = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"--{name} must be {most}, not {value}.")


def kinds_of(settings: type) -> dict[str, tuple[Any, ...]]:
    """The types that each setting can have."""
    hints, unions = get_type_hints(settings), (Union, UnionType)
    return {
        name: get_args(hints[name]) if get_origin(hints[name]) in unions else (hints[name],)
        for name in names_of(settings)
    }


def words_of(kinds: Sequence[Any]) -> tuple[str, ...]:
    """Those that a setting of these types takes, of a number beside the numbers."""
    return tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))


def flag_type(hint: Any) -> Any:
    """The type of a setting as argparse takes it, which has but one for a number that may be a word instead."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    words = words_of(kinds)
    return number_or(kinds[0], words) if words and kinds[0] in (int, float) else hint


def number_or(kind: type, words: Sequence[str]) -> Callable[[str], Any]:
    """What reads a flag whose value is a number of this kind or one of some words."""

    def read(text: str) -> Any:
        if text in words:
            return text
        try:
            return kind(text)
        except ValueError as error:
            number = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"it takes {' or '.join([number, *words])}, not {text!r}") from error

    read.__name__ = "|".join(["N" if kind is int else "X", *words])
    return read


@functools.cache  # a sweep parses one command line again and again
def in_groups(settings: type) -> list[type]:
    """The settings as dataclasses, one for each group of the help; a setting stands where it is said first."""
    hints, groups = get_type_hints(settings), {}
    for field in dataclasses.fields(settings):
        if field.init:
            first = next(kind for kind in reversed(settings.__mro__) if field.name in inspect.get_annotations(kind))
            flag = {key: field.metadata[key] for key in ("help", "aliases")}  # what argparse knows, too
            alone = dataclasses.field(default=field.default, metadata=flag)
            groups.setdefault(first._argument_group_name, []).append((field.name, flag_type(hints[field.name]), alone))
    return [
        dataclasses.make_dataclass("Group", fields, namespace={"_argument_group_name": name})
        for name, fields in groups.items()
    ]


def check_names(given: Any, known: Sequence[str], what: str, dashes: str = "") -> None:
    """Raises a UserError for the first name that is not known, with those that may have been meant.

    Args:
        dashes: what stands before each name where users write it.
    """
    for name in given:
        if name not in known:
            near = near_names(str(name), known, 3)
            hint = f"; did you mean {' or '.join(dashes + other for other in near)}?" if near else "."
            if not near and len(known) < 10:
                hint = f"; there are {', '.join(known)}."
            raise UserError(f"unknown {what}: {dashes}{name}{hint}")


def read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the settings in {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of settings to values.")
    if "hub_token" in values:
        raise UserError(f"{path} holds hub_token; an access token does not belong in a file: use HF_TOKEN.")
    return values


def as_flags(values: dict[str, Any], settings: type) -> list[str]:
    """YAML values as flags of these settings, so that one parser checks both.

    Raises:
        UserError: several values where one is wanted.
    """
    flags, kinds, fields = [], kinds_of(settings), settings.__dataclass_fields__
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) and bool not in kinds[name]:
            value = "yes" if value else "no"  # YAML takes these words for booleans
        elif isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, list) and fields[name].metadata["in_file"] == "list":
            if any("," in str(item) for item in value):
                raise UserError(f"{name} takes names without commas in them, not {value}.")
            value = ",".join(map(str, value))
        elif isinstance(value, (dict, list)):
            if fields[name].metadata["in_file"] != "mapping" and str in kinds[name]:
                raise UserError(f"{name} takes one value, not {value}.")
            value = json.dumps(value)
        flags.append(f"--{name}={value}")
    return flags


class QuietParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message + ("" if message.endswith(".") else "."))


class SettingsFormatter(argparse.HelpFormatter):
    """Shows each flag once, with its default where it has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        # Of a setting's own name only the spelling with underscores; what else it may be called, too.
        names = ", ".join(text for text in action.option_strings if "-" not in text[2:])
        if action.choices:
            return f"{names} {{{','.join(map(str, action.choices))}}}"
        kind = getattr(action.type, "__name__", "value")
        value = {"str": "TEXT", "int": "N", "float": "X", "string_to_bool": "true|false"}.get(kind, kind)
        return f"{names} {value}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, argparse.SUPPRESS) and action.option_strings and action.nargs != 0
        return text + (f" (default: {str(action.default).replace('%', '%%')})" if shown else "")


class SettingsParser(HfArgumentParser, QuietParser):
    """HfArgumentParser that shows its help in groups and reports mistakes as UserError.

    Args:
        positional: how the help names what has no flag, in order; `add_argument` is still to say what it is.
    """

    def __init__(self, settings: type, *, positional: str = "", **kwargs: Any) -> None:
        super().__init__(
            in_groups(settings),
            formatter_class=SettingsFormatter,
            allow_abbrev=False,
            usage=" ".join(["%(prog)s", *positional.split(), "[FLAGS]"]),
            **kwargs,
        )
        self.settings = settings

    def set_choices(self, name: str, choices: Sequence[str]) -> None:
        """Of a setting whose values stand in a table, and not in its type."""
        self._option_string_actions[f"--{name}"].choices = choices

    def take_dataset(self) -> None:
        """`--dataset_name` may also be given behind the other positional arguments, without its flag."""
        self.add_argument("dataset", metavar="DATASET", nargs="?", help="The same as --dataset_name.")

    def names_in(self, argv: Sequence[str]) -> set[str]:
        return {text[2:].split("=")[0].replace("-", "_") for text in argv if text.startswith("--")}

    def parse(self, argv: Sequence[str] | None, others: Sequence[str] = ()) -> dict[str, Any]:
        """What flags say, by their names.

        Args:
            others: flags that the caller has taken out of `argv`; they may be meant by a misspelt one.
        """
        *parts, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        flags = [text.split("=")[0] for text in unknown if text.startswith("--")]
        known = {text[2:] for text in self._option_string_actions if text.startswith("--") and "-" not in text[2:]}
        known = known.union(names_of(self.settings), others)
        check_names([flag[2:].replace("-", "_") for flag in flags], sorted(known), "flag", "--")
        if unknown:
            raise UserError(f"what is {' '.join(unknown)!r} for? Values follow a flag: --name value.")
        told = {name: value for part in parts for name, value in vars(part).items()}
        dataset = told.pop("dataset", None) if "dataset_name" in told else None
        if None not in (dataset, told.get("dataset_name")):
            raise UserError(f"two datasets are named: {dataset} and, by --dataset_name, {told['dataset_name']}.")
        return told if dataset is None else {**told, "dataset_name": dataset}
