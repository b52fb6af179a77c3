"""Pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..foundation.figures import new_figure, save_figure
from ..foundation.names import first_few, printable
from .examples import Example


MOST_NAMED = 60  # labels that are named
MOST_DOTS = 5000  # of a target


def draw_answers(
    examples: Sequence[Example],
    reads: str,
    label_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Any | None:
    """A figure with images and, above each, what the model says of it: green where that is right, and else red with
    what is true below it. Numbers have no colour.

    Args:
        reads: as `Task.reads`.
        mean, std: of the image processor, to see the images as they were.
    """
    if not examples:
        return None
    columns = min(4, len(examples))
    rows = -(-len(examples) // columns)
    figure, grid = new_figure((1.7 * columns, 2.1 * rows), columns=columns, rows=rows)
    axes = np.asarray(grid).reshape(-1)
    for axis in axes:
        axis.axis("off")
    for axis, example in zip(axes, examples, strict=False):
        axis.imshow(as_picture(example.pixel_values.float().numpy(), mean, std), cmap="gray", vmin=0, vmax=1)
        text, right = answer_text(example, reads, label_names)
        colour = "black" if right is None else "tab:green" if right else "tab:red"
        axis.set_title(text, fontsize=8, color=colour, parse_math=False)
    return figure


def as_picture(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (channels, height, width) as 0..1: (height, width, 3), or (height, width) where there are not 3."""
    shape = (-1, 1, 1)
    pixels = pixels * np.asarray(std).reshape(shape) + np.asarray(mean).reshape(shape)
    return pixels.transpose(1, 2, 0).clip(0, 1) if len(pixels) == 3 else pixels.mean(0).clip(0, 1)


def answer_text(example: Example, reads: str, label_names: Sequence[str]) -> tuple[str, bool | None]:
    """What a model says of an image in two lines, and whether that is right; None where it is not one or the other."""
    answers, names = example.answers, [printable(name, 18) for name in label_names]
    truth, found = answers["labels"], answers["predicted"]
    if reads == "numbers":
        return "\n".join(
            f"{name} {a:.4g} (true {b:.4g})" for name, a, b in zip(names[:3], found, truth, strict=False)
        ), None
    if reads == "classes":
        right = bool((truth == found).all())
        there = [
            f"{name} {score:.0%}" for name, score, yes in zip(names, answers["scores"], found, strict=True) if yes
        ]
        wanted = [name for name, yes in zip(names, truth, strict=True) if yes]
        said = first_few(there, 2) or "nothing"
        return (said if right else f"{said}\nis {first_few(wanted, 2) or 'nothing'}"), right
    right = bool(truth == found)
    said = f"{names[int(found)]} {float(answers['confidence']):.0%}"
    return (said if right else f"{said}\nis {names[int(truth)]}"), right


def write_confusion_matrix(path: Path, matrix: np.ndarray, label_names: Sequence[str]) -> None:
    """PNG of `draw_confusion_matrix`."""
    count = len(label_names)
    side = 5 + min(count, MOST_NAMED) * 0.15 if count > 20 else 3.5 + count * 0.35
    figure, axes = new_figure((side + 1, side))
    draw_confusion_matrix(axes, matrix, label_names)
    axes.set_title(f"Confusion matrix, {int(matrix.sum())} images")
    save_figure(figure, path)


def draw_confusion_matrix(axes: Any, matrix: np.ndarray, label_names: Sequence[str]) -> None:
    """The share of each true class (row) that went to each prediction (column).

    Up to 20 classes the cells hold their counts; up to 60 the classes are named; beyond that the picture shows
    structure only, on a logarithmic scale so that single mistakes among 1000 classes stay visible.

    Args:
        matrix: counts (classes, classes).
    """
    from matplotlib.colors import LogNorm

    count = len(label_names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    if count <= MOST_NAMED:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        names = [printable(name, 18) for name in label_names]
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
        axes.set_yticks(range(count), names, fontsize=8)
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_parse_math(False)  # a dollar in a name is a dollar
    else:
        floor = 1e-3
        image = axes.imshow(np.maximum(shares, floor), cmap="Blues", norm=LogNorm(floor, 1), interpolation="nearest")
    if count <= 20:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="predicted", ylabel="true")
    axes.figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.04)


def write_label_figures(path: Path, figures: Mapping[str, Sequence[float]], label_names: Sequence[str]) -> None:
    """PNG of figures of each label, all of them shares, as bars beside its name; what is not a number has no bar.

    Beyond 60 labels nobody could read the names: each figure is then a curve over the labels, the best first.

    Args:
        figures: `precision`, `recall`, ... -> one for each label.
    """
    count = len(label_names)
    if count <= MOST_NAMED:
        figure, axes = new_figure((7, 1.5 + count * 0.4))
        places, thickness = np.arange(count), 0.8 / len(figures)
        for index, (name, values) in enumerate(figures.items()):
            shift = (index - (len(figures) - 1) / 2) * thickness
            axes.barh(places + shift, np.nan_to_num(values), thickness, label=name)
        axes.set_yticks(places, [printable(name, 24) for name in label_names], fontsize=8)
        for text in axes.get_yticklabels():
            text.set_parse_math(False)  # a dollar in a name is a dollar
        axes.set(xlim=(0, 1), ylim=(count - 0.5, -0.5))
    else:
        figure, axes = new_figure((7, 4.5))
        for name, values in figures.items():
            axes.plot(np.sort(np.nan_to_num(values))[::-1], label=name)
        axes.set(xlabel="labels, each curve by itself from the best on", ylim=(0, 1.01))
    axes.set_title("Figures of each label")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(figures))
    save_figure(figure, path)


def write_scatter(path: Path, predicted: np.ndarray, truth: np.ndarray, target_names: Sequence[str]) -> None:
    """PNG of what was predicted against what is true, in units, for each of at most nine targets.

    Args:
        predicted, truth: (images, targets); of many images, 5000 evenly taken ones are drawn.
    """
    count = min(len(target_names), 9)
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, grid = new_figure((1 + 4 * columns, 4.2 * rows), columns=columns, rows=rows)
    places = np.atleast_1d(grid).ravel()
    taken = np.linspace(0, len(truth) - 1, min(len(truth), MOST_DOTS)).astype(int)
    for index, axes in enumerate(places[:count]):
        true, guess = truth[taken, index], predicted[taken, index]
        draw_scatter(axes, true, guess)
        axes.set_title(printable(target_names[index], 40), parse_math=False)
    for axes in places[count:]:
        axes.set_axis_off()
    save_figure(figure, path)


def draw_scatter(axes: Any, truth: np.ndarray, predicted: np.ndarray) -> None:
    """What was predicted against what is true, (images,), and the line where both are equal."""
    ends = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.scatter(truth, predicted, s=12, alpha=0.4, linewidths=0)
    axes.set(xlabel="true", ylabel="predicted")
    axes.grid(alpha=0.3)
