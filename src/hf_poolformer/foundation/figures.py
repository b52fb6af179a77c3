"""Pictures drawn by matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .names import printable


def new_figure(size: tuple[float, float], columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    # A figure of its own rather than pyplot's: no display, no global state, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def add_legend(figure: Any, entries: Sequence[tuple[Any, str]], columns: int) -> None:
    """Colours and the names of their classes below a figure, of at most 20."""
    from matplotlib.patches import Patch

    if not entries:
        return
    # Named afterwards: matplotlib leaves out names that begin with an underscore.
    handles = [Patch(color=colour, label=str(index)) for index, (colour, _) in enumerate(entries[:20])]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns), fontsize=9)
    for text, (_, name) in zip(legend.get_texts(), entries, strict=False):
        text.set_parse_math(False)  # a dollar in a name is a dollar
        text.set_text(printable(name, 40))


def figure_pixels(figure: Any) -> Any:
    """A figure as it would be saved: uint8 (height, width, 3)."""
    import numpy as np

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no font has every letter
        figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix says in which format
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no font has every letter
        figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
