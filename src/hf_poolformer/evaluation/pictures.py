"""Pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..foundation.figures import new_figure, save_figure
from ..foundation.names import printable


MOST_NAMED = 60  # labels that are named
MOST_DOTS = 5000  # of a target


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
