"""What an evaluation leaves for the eyes: predictions beside the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..foundation.figures import add_legend, figure_pixels, new_figure, save_figure
from ..image_processing_dense import IGNORE_INDEX


if TYPE_CHECKING:
    from .dense import EvaluatedImage


# Below this a detection is not drawn; the metric counts all of them.
SHOWN_SCORE = 0.4
DPI = 100  # of a picture of its own
WRONG = (0.85, 0.1, 0.15)  # the colour of wrong pixels


def colours(count: int) -> np.ndarray:
    """`count` colours that differ, (count, 3) of 0..1."""
    from matplotlib import colormaps

    if count <= 10:
        return np.array(colormaps["tab10"].colors[:count])
    return colormaps["gist_rainbow"](np.linspace(0, 1, count))[:, :3]


def write_predictions(path: Path, examples: Sequence[EvaluatedImage], *values: Any) -> None:
    """PNG of `draw_predictions`."""
    save_figure(draw_predictions(examples, *values), path)


def draw_predictions(
    examples: Sequence[EvaluatedImage],
    label_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Any:
    """A figure with images in pairs: the truth on the left, what the model found on the right.

    Args:
        mean, std: of the image processor, to see the images as they were.
    """
    palette = colours(len(label_names))
    pairs = min(2, len(examples))
    rows = math.ceil(len(examples) / pairs)
    figure, grid = new_figure((3.2 * 2 * pairs, 3.3 * rows), rows=rows, columns=2 * pairs)
    grid = np.asarray(grid).reshape(rows, 2 * pairs)
    for axes in grid.flat:
        axes.axis("off")
    used: set[int] = set()
    for index, example in enumerate(examples):
        row, column = divmod(index, pairs)
        image = as_seen(example, mean, std)
        left, right = grid[row, 2 * column : 2 * column + 2]
        if example.truth.objects is None:
            used |= draw_map(left, image, example.truth.map, palette)
            used |= draw_map(right, image, example.found, palette)
        else:
            objects = example.truth.objects
            used |= draw_objects(left, image, objects.boxes, objects.labels, objects.masks, None, palette)
            found = {name: value for name, value in example.found.items() if value is not None}
            sure = found["scores"] >= SHOWN_SCORE
            found = {name: value[sure] for name, value in found.items()}
            used |= draw_objects(
                right, image, found["boxes"], found["labels"], found.get("masks"), found["scores"], palette
            )
        left.set_title("truth", fontsize=9)
        right.set_title("predicted", fontsize=9)
    add_legend(figure, [(palette[index], label_names[index]) for index in sorted(used)], columns=6)
    return figure


def as_seen(
    example: EvaluatedImage, mean: Sequence[float], std: Sequence[float], longest: int | None = None
) -> np.ndarray:
    """The image as uint8 (height, width, 3), in its stored size; smaller where a side is longer than `longest`."""
    pixels = example.pixel_values.float().cpu().numpy().transpose(1, 2, 0) * np.array(std) + np.array(mean)
    image = Image.fromarray(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))
    height, width = example.truth.size
    if longest is not None:
        factor = min(longest / max(height, width), 1)
        height, width = (max(round(side * factor), 1) for side in (height, width))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of classes, or a mask, (height, width), in another size."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(int) for new, old in zip(size, values.shape, strict=True)
    )
    return np.asarray(values)[np.ix_(rows, columns)]


def draw_map(axes: Any, image: np.ndarray, classes: np.ndarray, palette: np.ndarray) -> set[int]:
    """The image under the colours of its classes; what has no class stays grey. Returns the classes it has."""
    known = classes != IGNORE_INDEX
    coloured = np.full(image.shape, 0.5)
    coloured[known] = palette[classes[known]]
    axes.imshow(0.45 * image / 255 + 0.55 * coloured)
    return set(np.unique(classes[known]).tolist())


def draw_objects(
    axes: Any,
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray | None,
    scores: np.ndarray | None,
    palette: np.ndarray,
) -> set[int]:
    """Boxes, masks and scores over the image. Returns the classes there are."""
    from matplotlib.patches import Rectangle

    shown = image / 255
    for mask, label in zip(masks if masks is not None else (), labels, strict=False):
        shown[mask] = 0.4 * shown[mask] + 0.6 * palette[label]
    axes.imshow(shown)
    for index, ((left, top, right, bottom), label) in enumerate(zip(boxes, labels, strict=True)):
        axes.add_patch(
            Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=palette[label], lw=1.5)
        )
        if scores is not None:
            axes.text(
                min(max(left, 0), image.shape[1] - 1),
                max(top, 6),
                f"{scores[index]:.2f}",
                fontsize=7,
                color="white",
                verticalalignment="bottom",
                clip_on=True,
                bbox={"facecolor": palette[label], "edgecolor": "none", "pad": 1},
            )
    return set(labels.tolist())


def drawn(image: np.ndarray, draw: Callable[[Any, np.ndarray], Any], longest: int) -> Image.Image:
    """What `draw(axes, image)`, such as `draw_map`, makes of an image: a picture of its shape, without margins.

    Args:
        longest: the longer side of the picture, in pixels; what is written in it has the same size whatever the image.
    """
    factor = longest / DPI / max(image.shape[:2])
    figure, axes = new_figure((image.shape[1] * factor, image.shape[0] * factor))
    figure.set_layout_engine("none")
    figure.set_dpi(DPI)
    axes.set_position((0, 0, 1, 1))
    axes.axis("off")
    draw(axes, image)
    return Image.fromarray(figure_pixels(figure))


def draw_errors(axes: Any, image: np.ndarray, found: np.ndarray, truth: np.ndarray) -> None:
    """The image in grey, and in red where a class was found that is not the true one."""
    wrong = (found != truth) & (truth != IGNORE_INDEX)
    grey = np.repeat(0.6 * image.mean(axis=-1, keepdims=True) / 255, 3, axis=-1)
    axes.imshow(np.where(wrong[..., None], 0.3 * grey + 0.7 * np.array(WRONG), grey))
