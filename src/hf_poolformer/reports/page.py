"""A report as one HTML file. Nothing else in this package writes HTML.

A `Page` is made of plain text, numbers and Pillow images; `write_page` escapes every character, so that names of
classes and files may hold anything. The file needs nothing from elsewhere and no script: scripts, where they run, sort
tables and enlarge images. Its Content-Security-Policy lets nothing else run, and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jinja2
from markupsafe import Markup
from PIL import Image

from ..foundation.files import best_effort, replace_text
from ..foundation.names import printable
from .charts import draw_svg
from .inlining import shrink


if TYPE_CHECKING:
    from matplotlib.axes import Axes


HERE = Path(__file__).parent
# Characters of a cell or a line below an image; of what is longer, the middle is left out. A path's end says most.
LONGEST = 160
# What stands for a missing figure.
MISSING = "—"
# Characters that a cell keeps on one line.
SHORT = 20


@dataclass
class Tile:
    """One image, or several that belong together, side by side.

    Attributes:
        lines: below the images; the first says what they are, also to those who cannot see them.
        note: a remark that stands out.
    """

    pictures: Sequence[Image.Image]
    lines: Sequence[str]
    note: str = ""


@dataclass
class Gallery:
    """
    Attributes:
        side: of an image, its longest, in CSS pixels. The file holds up to twice as many, for dense screens and for
            enlarging it: 200 photographs at 96 are about 1 MB, and whatever is to be seen on them below 2 MB.
    """

    tiles: Sequence[Tile]
    caption: str = ""
    side: int = 96


@dataclass
class Table:
    """
    Attributes:
        rows: a cell per heading; None and NaN are missing figures, and stand last whichever way a column is sorted.
        formats: of each column's numbers, like `.3f`; without, four significant digits. Text takes none.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]
    caption: str = ""
    formats: Sequence[str] | None = None


@dataclass
class Bars:
    """
    Attributes:
        rows: (name, value, what to write beside the bar); the longest bar is that of the largest value.
    """

    rows: Sequence[tuple[str, float, str]]
    caption: str = ""


@dataclass
class Facts:
    """Figures at a glance: (what, how much)."""

    pairs: Sequence[tuple[str, str]]


@dataclass
class Text:
    """Paragraphs, with an empty line between them."""

    text: str


@dataclass
class Commands:
    """Command lines to copy."""

    lines: Sequence[str]


@dataclass
class Chart:
    """What matplotlib draws, as SVG.

    Attributes:
        draw: on axes that are prepared. Text, lines and colours that it says nothing of, and the colours of
            `reports.charts`, follow dark and light; other colours stay as they are.
        alt: what is to be seen, for those who cannot see it.
        size: width and height, in inches.
    """

    draw: Callable[[Axes], None]
    alt: str
    caption: str = ""
    size: tuple[float, float] = (5.0, 3.5)


Part: TypeAlias = Gallery | Table | Bars | Facts | Text | Commands | Chart


@dataclass
class Section:
    """
    Attributes:
        level: whether what it says is good or bad; a word beside the title says so, too.
    """

    title: str
    parts: Sequence[Part]
    intro: str = ""
    level: Literal["plain", "good", "warning", "bad"] = "plain"


@dataclass
class Page:
    title: str
    subtitle: str
    sections: Sequence[Section]


def write_page(path: Path, page: Page) -> None:
    """Writes the HTML file, as a whole or not at all. The same page gives the same bytes.

    Raises:
        UserError: the file cannot be written.
    """
    replace_text(path, render(page))


def render(page: Page) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = itertools.count(1)
    environment.filters |= {
        "kind": lambda part: type(part).__name__,
        "line": line,
        "paragraphs": paragraphs,
        "cells": cells,
        "shares": shares,
        "shrink": shrink,
        "svg": lambda chart: chart_svg(chart, f"c{next(charts)}-"),
    }
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        page=page, SHORT=SHORT, style=style, script=script, style_hash=hash_of(style), script_hash=hash_of(script)
    )


def hash_of(text: str) -> str:
    """By which a Content-Security-Policy knows a script or a style sheet."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def shown(value: Any) -> Any:
    """What the template writes in the place of a value: of text, every character visible."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def line(text: str) -> str:
    """Text on one line, shortened where it is very long."""
    text = printable(text)
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]} … {text[-half:]}"


def paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def cells(table: Table) -> list[list[dict[str, Any]]]:
    """Of each cell its text and its classes; in a column of numbers the value, too."""
    formats = table.formats or [""] * len(table.headings)
    columns = zip(*table.rows, strict=True) if table.rows else [[] for _ in formats]
    numeric = [all(value is None or is_number(value) for value in column) for column in columns]
    return [[cell(*parts) for parts in zip(row, formats, numeric, strict=True)] for row in table.rows]


def cell(value: Any, form: str, numeric: bool) -> dict[str, Any]:
    text = cell_text(value, form)
    classes = {"number": numeric, "short": not numeric and len(text) <= SHORT, "missing": is_missing(value)}
    return {
        "text": text,
        "classes": " ".join(name for name, applies in classes.items() if applies),
        "key": float(value) if numeric and not is_missing(value) else None,
    }


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_missing(value: Any) -> bool:
    return value is None or (is_number(value) and math.isnan(value))


def cell_text(value: Any, form: str) -> str:
    if is_missing(value):
        return MISSING
    if not is_number(value):
        return line(str(value))
    whole = isinstance(value, numbers.Integral) or 1e4 <= abs(value) < 1e15
    return format(value, form or (",.0f" if whole else ".4g"))


def shares(bars: Bars) -> list[float]:
    """The length of each bar, in per cent of the longest."""
    values = [value if math.isfinite(value) and value > 0 else 0 for _, value, _ in bars.rows]
    longest = max(values, default=0) or 1
    return [round(100 * value / longest, 2) for value in values]


def chart_svg(chart: Chart, prefix: str) -> Markup | None:
    """None, and a warning, where it cannot be drawn: its description then stands alone."""
    with best_effort(f"the chart “{chart.alt}”"):
        return Markup(draw_svg(chart.draw, chart.size, prefix))
    return None
