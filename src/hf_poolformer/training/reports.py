"""What a run leaves for people: the log, the curves, the confusion matrix, the results."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..foundation.figures import new_figure, save_figure
from ..foundation.files import replace_text
from ..foundation.names import printable
from ..foundation.spelling import command_words
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


def resume_command(output_dir: Path, num_processes: int, cpu: bool, command: str = "train") -> str:
    """The shell command that goes on with a run from its newest checkpoint."""
    several = ["--num_processes", str(num_processes), *(["--cpu"] if cpu else [])] if num_processes > 1 else []
    words = command_words(command, ["accelerate", "launch", *several], alone=not several)
    words += ["--config_file", str(output_dir / "training_settings.yaml"), "--resume_from_checkpoint", "latest"]
    return shlex.join(words)


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
