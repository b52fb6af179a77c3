"""For the reference: docstrings as griffe reads them. An extension of griffe, named in zensical.toml.

Ours give several parameters at once (`weight, bias: (C,), the norm's`). Those of models and configurations have the
form of transformers: types and defaults in Markdown, parameters without a heading, the first sentence in a decorator.
"""

import ast
import re
from typing import Any

import griffe


SECTIONS = ("Args:", "Attributes:")
ANSWERS = ("Returns:", "Yields:")
# `name (`int`, *optional*, defaults to 3)`, one or several, each for one name or several.
ENTRY = re.compile(r"(\w+(?:, \w+)*)(?: \(((?:[^()`]|`[^`]*`)*)\))?(?:, |$)")
HEAD = re.compile(r"(?:\w+(?:, \w+)*(?: \((?:[^()`]|`[^`]*`)*\))?(?:, )?)+$")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        intro = intro_of(obj)
        if obj.docstring is None and intro:
            obj.docstring = griffe.Docstring("", parent=obj, lineno=obj.lineno)
        if obj.docstring is not None:
            untitled = "Attributes:" if obj.is_class else "Args:"
            text = "\n".join(tidied(obj.docstring.value.splitlines(), untitled))
            if obj.is_class and "__init__" not in obj.members:  # of configurations: fields are what one gives
                text = re.sub("^Args:$", "Attributes:", text, flags=re.MULTILINE)
            obj.docstring.value = f"{intro}\n\n{text}".strip()


def intro_of(obj: griffe.Object) -> str:
    """What transformers' `auto_docstring` was given as the first sentence."""
    for decorator in getattr(obj, "decorators", ()):
        call = ast.parse(str(decorator.value), mode="eval").body
        for keyword in call.keywords if isinstance(call, ast.Call) else ():
            if keyword.arg == "custom_intro":
                return " ".join(ast.literal_eval(keyword.value).split())
    return ""


def tidied(lines: list[str], untitled: str) -> list[str]:
    """The lines with one parameter an entry, each with its type before and its default behind it.

    Args:
        untitled: the heading of parameters that have none.
    """
    done: list[str] = []
    base = None  # indentation of the entries of a section, outside of one None
    rest = list(lines)
    while rest:
        line = rest.pop(0)
        if base is None and is_typed(line):
            done += ["", untitled]
            base = 0
        elif base is not None and line and (indent(line) < base or (base == 0 and not is_typed(line))):
            done += [""] * (base == 0)
            base = None
        if line in SECTIONS:
            base = 4
        if base is None or not line or indent(line) != base:
            done.append(line)
            if line in ANSWERS and rest:  # what stands before a colon would be taken for a type
                done.append(f"    : {rest.pop(0).strip()}")
            continue
        said = []
        while rest and (not rest[0] or indent(rest[0]) > base):
            said.append(rest.pop(0))
        done += one_by_one(line.strip(), [text[base:] for text in said])
    return done


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def is_typed(line: str) -> bool:
    """Whether this begins a parameter in the form of transformers."""
    return bool(re.match(r"\w+ \(`.*:$", line))


def one_by_one(text: str, more: list[str]) -> list[str]:
    """An entry as one for each of its parameters; the others point to the first.

    Args:
        text: its first line, without indentation.
        more: the others, indented.
    """
    colon = next((match.start() for match in re.finditer(":", text) if HEAD.match(text[: match.start()])), None)
    if colon is None:
        return [f"    {text}", *(f"    {line}" for line in more)]
    while more and not more[-1]:
        more.pop()
    done, first = [], None
    for names, about in ENTRY.findall(text[:colon]):
        kind = " | ".join(re.findall(r"`([^`]+)`", re.split(",| of shape", about)[0]))
        shape = re.search(r"of shape `([^`]+)`", about)
        default = re.search("defaults? to (.+)$", about)
        for name in names.split(", "):
            said = [text[colon + 1 :].strip(), *more] if first is None else [f"See `{first}`."]
            if shape:
                said[0] = f"{shape[1]}. {said[0]}".strip()
            if default:
                said[-1] += f" Default: {default[1]}."
            done.append(f"    {name} ({kind}): {said[0]}".rstrip() if kind else f"    {name}: {said[0]}".rstrip())
            done += [f"    {line}" if line else "" for line in said[1:]]
            first = first or name
    return done
