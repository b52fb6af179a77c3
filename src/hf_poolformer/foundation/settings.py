"""Settings as dataclasses: each is said once, and flags, YAML files, checks and help come from it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from .errors import UserError
from .names import near_names


def setting(default: Any, help: str, aliases: Sequence[str] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "aliases": list(aliases)})


def check_values(settings: Any, limits: Mapping[str, tuple[float, float]]) -> None:
    """
    Raises:
        UserError: a setting has no value and needs one, or lies outside of its limits.
    """
    for name, kinds in kinds_of(type(settings)).items():
        if getattr(settings, name) is None and type(None) not in kinds:
            raise UserError(f"--{name} has no value: give one, or leave it out for the default.")
    for name, (low, high) in limits.items():
        value = getattr(settings, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"--{name} takes a number, not {value!r}.")
        if not (math.isfinite(value) and low <= value <= high):
            most = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise UserError(f"--{name} must be {most}, not {value}.")


def kinds_of(settings: type) -> dict[str, tuple[Any, ...]]:
    """The types that each setting can have."""
    hints = get_type_hints(settings)
    fields = [field.name for field in dataclasses.fields(settings) if field.name in hints]
    unions = (Union, UnionType)
    return {name: get_args(hints[name]) if get_origin(hints[name]) in unions else (hints[name],) for name in fields}


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
    flags, kinds = [], kinds_of(settings)
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) and bool not in kinds[name]:
            value = "yes" if value else "no"  # YAML takes these words for booleans
        elif isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, list) and name in ("label_names", "lr_steps", "report_to"):
            if any("," in str(item) for item in value):
                raise UserError(f"{name} takes names without commas in them, not {value}.")
            value = ",".join(map(str, value))
        elif isinstance(value, (dict, list)):
            if name != "config_overrides" and str in kinds[name]:
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
    """HfArgumentParser that shows its help in groups and reports mistakes as UserError."""

    def __init__(self, groups: Sequence[type], **kwargs: Any) -> None:
        super().__init__(
            list(groups), formatter_class=SettingsFormatter, allow_abbrev=False, usage="%(prog)s [FLAGS]", **kwargs
        )

    def set_choices(self, name: str, choices: Sequence[str]) -> None:
        """Of a setting whose values stand in a table, and not in its type."""
        self._option_string_actions[f"--{name}"].choices = choices

    def names_in(self, argv: Sequence[str]) -> set[str]:
        return {text[2:].split("=")[0].replace("-", "_") for text in argv if text.startswith("--")}

    def parse(self, argv: Sequence[str] | None, names: Sequence[str]) -> tuple[Any, ...]:
        *parts, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        flags = [text.split("=")[0] for text in unknown if text.startswith("--")]
        known = {text[2:] for text in self._option_string_actions if text.startswith("--") and "-" not in text[2:]}
        check_names([flag[2:].replace("-", "_") for flag in flags], sorted(known.union(names)), "flag", "--")
        if unknown:
            raise UserError(f"what is {' '.join(unknown)!r} for? Values follow a flag: --name value.")
        return tuple(parts)
