"""What matplotlib draws, as SVG in a page: it follows dark and light, and obeys a strict Content-Security-Policy."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ..foundation.names import printable


if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = ["FAINT", "INK", "PAPER", "SERIES", "draw_svg"]

# Colours that follow dark and light: text and lines, what stands back, and the page itself.
INK, FAINT, PAPER = "#1a1f29", "#5d6675", "#fefefe"
# Of lines and bars, one after the other; also as "C0" to "C7".
SERIES = ("#2463c5", "#ad4c08", "#1a7549", "#8645bd", "#bd2845", "#0d7382", "#7b5a0d", "#596273")
# Of a line of text; more find no room in a chart.
MOST_LETTERS = 60
# The variables of page.css that take their place.
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(SERIES, 1)
}


def draw_svg(draw: Callable[[Axes], None], size: tuple[float, float], prefix: str) -> str:
    """The `<svg>` element of a figure with one plot, the same each time.

    Text stays text, in the page's font; names are made printable, and a dollar in one is a dollar.

    Args:
        draw: on axes that are prepared.
        size: width and height, in inches.
        prefix: of the element's ids, its own in a page.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
        **{"legend.facecolor": PAPER, "legend.edgecolor": "none", "legend.framealpha": 0.8},
        **{"grid.color": FAINT, "grid.alpha": 0.35, "axes.axisbelow": True},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=SERIES)},
        **{"image.interpolation": "none", "svg.fonttype": "none", "svg.hashsalt": "hf-poolformer"},
    }
    file = io.StringIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's font may have it
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        _clean_texts(figure)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _for_page(file.getvalue(), prefix)


def _clean_texts(figure: Any) -> None:
    """Makes names on the axes and elsewhere printable, and takes mathematics for text, but for powers of ten."""
    from matplotlib.category import StrCategoryFormatter
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter, LogFormatter

    powers = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            inner = axis.get_major_formatter()
            if isinstance(inner, LogFormatter):
                powers.update(axis.get_ticklabels(which="both"))
            elif isinstance(inner, (FixedFormatter, FuncFormatter, StrCategoryFormatter)):
                axis.set_major_formatter(FuncFormatter(lambda x, place, inner=inner: _lines(inner(x, place))))
    for text in figure.findobj(Text):
        text.set_text(_lines(text.get_text()))
        if text not in powers:
            text.set_parse_math(False)


def _lines(text: str) -> str:
    return "\n".join(printable(line, MOST_LETTERS) for line in text.split("\n"))


def _for_page(text: str, prefix: str) -> str:
    """matplotlib's file as an element: style attributes, which the page's policy forbids, become attributes."""
    root = ElementTree.fromstring(text[text.index("<svg") :])
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text))
    used = {name for pair in used for name in pair if name}
    for parent in root.iter():
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        attributes |= _declarations(attributes.pop("style", ""))
        if attributes.get("id") in used:
            attributes["id"] = prefix + attributes["id"]
        else:
            attributes.pop("id", None)
        for name, value in attributes.items():
            if name == "href" and value.startswith("#"):
                value = f"#{prefix}{value[1:]}"
            attributes[name] = re.sub(r"url\(#", f"url(#{prefix}", value)
        element.attrib.clear()
        element.attrib.update(attributes)
    for name in ("height", "version"):
        del root.attrib[name]
    root.attrib |= {
        "width": f"{float(root.attrib['width'].removesuffix('pt')) * 96 / 72:g}",
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace, which HTML knows by itself."""
    return name.rpartition("}")[2]


def _declarations(style: str) -> Mapping[str, str]:
    pairs = (pair.partition(":") for pair in style.split(";") if ":" in pair)
    found = {name.strip(): value.strip() for name, _, value in pairs}
    found.pop("font-family", None)  # the page's
    return {name: _VARIABLES.get(value, value) for name, value in found.items()}
