"""What a run leaves for people: the log, the curves, the confusion matrix, the results."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import one_line
from ..foundation.errors import UserError
from ..foundation.folders import put_in_place
from ..foundation.names import printable
from ..foundation.strict_json import to_json


logger = logging.getLogger(__name__)

SKIPPED = "skipped.csv"
# Share of the time spent waiting for data above which a summary says what could be done about it.
MUCH_WAITING = 0.3


class RunLog:
    """History of a run as one JSON object per line: training points (with `loss`) and evaluations (`eval_loss`).

    Args:
        path: the file; kept open by nobody, so it is complete whenever the run dies.
        resume_step: points up to this step are kept, later ones are those of the part that is now repeated; None
            begins anew.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if resume_step is not None and path.is_file():
            self.rows = [row for row in read_rows(path) if row.get("step", 0) <= resume_step]
        replace_text(path, "".join(to_json(row) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that a killed run did not finish
    return rows


def describe(results: dict[str, Any]) -> str:
    """The results of an evaluation in one line."""
    return (
        f"top-1 {results['eval_accuracy']:.2%}, top-5 {results['eval_top5_accuracy']:.2%}, "
        f"loss {results['eval_loss']:.4f}, {results['eval_samples']} images at "
        f"{results['eval_samples_per_second']:.0f} images/s"
        + (f", {results['eval_skipped_images']} broken images left out" if results["eval_skipped_images"] else "")
    )


def summary(output_dir: Path, results: dict[str, Any]) -> str:
    """What a finished run did and where everything is."""
    result = f"Result: {describe(results)}.\n" if "eval_accuracy" in results else ""
    damaged = "".join(f"Damaged {shard}\n" for shard in results.get("skipped_shards", ()))
    listed = f" (see {SKIPPED})" if results["skipped_images"] else ""
    waited = results["train_data_wait_share"] > MUCH_WAITING
    slow = "Data was the bottleneck: see --num_workers and --device_preprocessing.\n" if waited else ""
    return (
        f"{result}Trained {results['step']} steps in {results['train_runtime']:.0f} s, "
        f"{results['train_samples_per_second']:.0f} images/s, {results['train_data_wait_share']:.0%} of the time "
        f"waiting for data, {results['skipped_images']} broken images skipped{listed}.\n{slow}{damaged}"
        f"In {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir() if path.name[0] != '.'))}.\n"
        f'Use it: pipeline("image-classification", "{output_dir}")'
    )


def note_skipped(output_dir: Path, epoch: int, descriptions: Sequence[str]) -> None:
    """Adds broken images to `skipped.csv`; all processes do. What a resumed run meets again is there again."""
    if descriptions:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows((epoch, printable(text)) for text in descriptions)
        with contextlib.suppress(OSError), open(output_dir / SKIPPED, "a", encoding="utf-8") as file:
            file.write(lines.getvalue())


def resume_command(output_dir: Path, num_processes: int, cpu: bool) -> str:
    """The shell command that goes on with a run from its newest checkpoint."""
    program = Path(sys.argv[0])
    launch = ["accelerate", "launch"]
    if num_processes > 1:
        launch += ["--num_processes", str(num_processes), *(["--cpu"] if cpu else [])]
    if program.stem.startswith("train"):  # any of our training scripts
        command = [*launch, sys.argv[0]]
    else:
        # `hf-poolformer train`, `python -m hf_poolformer train`, or Python code, which goes on by the plain one.
        called = sys.argv[1] if program.stem in ("hf-poolformer", "__main__") and len(sys.argv) > 1 else "train"
        name = called if called.startswith("train") else "train"
        alone = program.stem == "hf-poolformer" and num_processes == 1
        command = ["hf-poolformer", name] if alone else [*launch, "-m", "hf_poolformer", name]
    command += ["--config_file", str(output_dir / "training_settings.yaml"), "--resume_from_checkpoint", "latest"]
    return shlex.join(command)


def write_json(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, to_json(values, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        put_in_place(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """A fault in what only adorns a run is told, and ends nothing.

    Args:
        what: is being written; for the message.
    """
    try:
        yield
    except Exception as error:  # whatever fonts, names and libraries come up with
        logger.warning("%s failed, and the run goes on without: %s", what, printable(one_line(error)))


def write_curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """PNG of loss (left) and accuracy (right) over optimiser steps."""
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    figure, (left, right) = new_figure((10, 4), columns=2)
    left.plot([row["step"] for row in training], [row["loss"] for row in training], label="training", linewidth=1)
    left.plot(
        [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations], "o-", label="evaluation"
    )
    left.set(xlabel="optimiser step", ylabel="loss", title="Loss")
    left.legend()
    for name, label in (("eval_accuracy", "top-1"), ("eval_top5_accuracy", "top-5")):
        right.plot([row["step"] for row in evaluations], [row[name] for row in evaluations], "o-", label=label)
    right.set(xlabel="optimiser step", ylabel="accuracy", title="Accuracy on the evaluation split")
    if evaluations:
        low = min(row["eval_accuracy"] for row in evaluations)
        right.set_ylim(max(0.0, low - 0.1 * (1 - low) - 0.01), 1.01)
        right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


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


def save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # the suffix says in which format
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no font has every letter
        figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
