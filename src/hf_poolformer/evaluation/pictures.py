"""Pictures of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..foundation.figures import new_figure, save_figure
from ..foundation.names import printable


def write_confusion_matrix(path: Path, matrix: np.ndarray, label_names: Sequence[str]) -> None:
    """PNG of the share of each true class (row) that went to each prediction (column).

    Up to 20 classes the cells hold their counts; up to 60 the classes are named; beyond that the picture shows
    structure only, on a logarithmic scale so that single mistakes among 1000 classes stay visible.

    Args:
        matrix: counts (classes, classes).
    """
    from matplotlib.colors import LogNorm

    count = len(label_names)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 5 + min(count, 60) * 0.15 if count > 20 else 3.5 + count * 0.35
    figure, axes = new_figure((side + 1, side))
    if count <= 60:
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
    axes.set(xlabel="predicted", ylabel="true", title=f"Confusion matrix, {int(matrix.sum())} images")
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.04)
    save_figure(figure, path)
