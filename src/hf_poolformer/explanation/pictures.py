"""Maps made visible: over the image, and side by side for several classes. Needs matplotlib."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..foundation.figures import new_figure, save_figure
from ..foundation.names import printable
from .explainer import Explanation


# Of matplotlib's turbo, without its ends: both are dark, and the hottest place must not be.
COLOURS, FIRST, LAST = "turbo", 0.05, 0.86
# Opacity of the heat where it is largest; the image under it stays recognisable.
OPACITY = 0.65
# Brightness of what the model did not see.
UNSEEN = 0.35
PANELS_PER_ROW = 4


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image, in grey, under a heat map that is the more opaque the hotter it is; darkened where the map is NaN.

    Args:
        heat: (height, width) of the image, 0..1 or NaN.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    seen = ~np.isnan(heat)
    values = np.where(seen, heat, 0)[..., None]
    # Less of the image's own colours, which could be taken for the map's.
    grey = 0.7 * pixels.mean(axis=-1, keepdims=True) + 0.3 * pixels
    colour = heat_colours()(values[..., 0])[..., :3]
    opacity = OPACITY * values**0.7
    blended = np.where(seen[..., None], (1 - opacity) * grey + opacity * colour, UNSEEN * grey)
    return Image.fromarray(np.rint(blended.clip(0, 1) * 255).astype(np.uint8))


def write_explanation(path: Path, explanation: Explanation, title: str, caption: str) -> None:
    """A picture of the image beside its overlay for each class, as PNG, JPEG, PDF or SVG by the suffix of `path`.

    Args:
        title: above the image.
        caption: below everything.
    """
    image = explanation.image
    panels = 1 + len(explanation.classes)
    rows = math.ceil(panels / PANELS_PER_ROW)
    columns = math.ceil(panels / rows)
    # Panels of equal area whatever the shape of the image, and room for a title above each.
    width = 3.2 * min(max(math.sqrt(image.width / image.height), 0.6), 1.7)
    height = width * image.height / image.width
    figure, grid = new_figure((columns * width + 0.7, rows * (min(height, 8) + 0.6) + 0.3), columns=columns, rows=rows)
    axes = np.asarray(grid).flatten()
    for place in axes:
        place.axis("off")
    axes[0].imshow(image)
    text = {"fontsize": 9, "parse_math": False}  # a dollar in a label is a dollar
    axes[0].set_title(wrapped(title), **text)
    left, top, right, bottom = explanation.seen
    if (right - left) * (bottom - top) < 0.999 * explanation.size[0] * explanation.size[1]:
        from matplotlib.patches import Rectangle

        factor = image.width / explanation.size[0]
        box = Rectangle((left * factor, top * factor), (right - left) * factor, (bottom - top) * factor)
        box.set(fill=False, edgecolor="white", linewidth=1.2, linestyle="--")
        axes[0].add_patch(box)
    for place, found in zip(axes[1:], explanation.classes, strict=False):
        place.imshow(overlay(image, found.heat))
        silent = "" if found.peak else ", nothing speaks for it"
        place.set_title(f"{wrapped(found.label)}\n{found.score_text}{silent}", **text)
    add_scale(figure, axes[:panels])
    figure.supxlabel(caption, fontsize=8, color="0.35")
    save_figure(figure, path)


def add_scale(figure: Any, axes: np.ndarray) -> None:
    from matplotlib.cm import ScalarMappable

    scale = figure.colorbar(ScalarMappable(cmap=heat_colours()), ax=list(axes), fraction=0.04, aspect=25, pad=0.01)
    scale.set_ticks([0, 1], labels=["0", "most"])
    scale.ax.tick_params(labelsize=8, length=0)
    scale.outline.set_visible(False)


def heat_colours() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[COLOURS](np.linspace(FIRST, LAST, 256)))


def wrapped(text: str) -> str:
    """A label on at most two lines."""
    text = printable(text)
    return "\n".join(textwrap.wrap(text, 30, max_lines=2, placeholder=" ...")) or text
