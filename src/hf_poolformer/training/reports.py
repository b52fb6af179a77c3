"""What a run leaves for people: its settings, the log, the curves, the card, and what it says at its end."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..foundation.figures import new_figure, save_figure
from ..foundation.files import best_effort, replace_text, write_json
from ..foundation.names import printable
from ..foundation.spelling import command_words
from ..foundation.strict_json import to_json
from ..foundation.tasks import TASKS
from ..hub.cards import folder_card
from ..hub.eval_results import leave_results
from ..hub.publishing import publish
from ..settings.training import TrainingSettings
from .trackers import Trackers


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


class Reports:
    """What a run leaves for people in its folder, and tells the experiment trackers; every process has one.

    Args:
        resume_step: as `RunLog` takes it.
    """

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator, resume_step: int | None):
        self.settings, self.accelerator = settings, accelerator
        self.folder = Path(settings.output_dir)
        self.log = None
        if accelerator.is_main_process:
            settings.save(self.folder / "training_settings.yaml")
            self.log = RunLog(self.folder / "training_log.jsonl", resume_step)
        self.trackers = Trackers(settings, accelerator, resume_step)

    def add(self, row: dict[str, Any]) -> None:
        """A point of the training curve, or an evaluation."""
        if self.log is not None:
            self.log.add(row)
        figures = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        self.trackers.log(figures, row["step"])

    def write_results(self, results: dict[str, Any]) -> None:
        """`all_results.json` and `curves.png`; the main process alone."""
        write_json(self.folder / "all_results.json", results)
        with best_effort("drawing the curves"):
            write_curves(self.folder / "curves.png", self.log.rows, self.settings.task)

    def write_card(self) -> None:
        """The model card, of what the run has left in its folder; the main process alone."""
        with best_effort("writing the model card"):
            card = folder_card(self.folder, repo_id=self.settings.hub_model_id)
            replace_text(self.folder / "README.md", card)
            leave_results(self.folder, card)

    def publish(self) -> str:
        """The address of the repository that the folder is published to.

        Raises:
            hf_poolformer.hub.publishing.PublishError: it could not be.
        """
        settings = self.settings
        repo_id = settings.hub_model_id or self.folder.resolve().name
        return publish(self.folder, repo_id, private=settings.hub_private_repo, token=settings.hub_token)


def summary(output_dir: Path, results: dict[str, Any], settings: TrainingSettings, evaluation: str) -> str:
    """What a finished run did and where everything is.

    Args:
        evaluation: its results in one line; empty if there was none.
    """
    result = f"Result: {evaluation}.\n" if evaluation else ""
    damaged = "".join(f"Damaged {shard}\n" for shard in results.get("skipped_shards", ()))
    listed = f" (see {SKIPPED})" if results["skipped_images"] else ""
    waited = results["train_data_wait_share"] > MUCH_WAITING
    remedies = ["--num_workers"]
    if getattr(settings, "device_preprocessing", "auto") in ("no", "augment"):
        remedies.append("--device_preprocessing auto")
    slow = f"Data was the bottleneck: see {' and '.join(remedies)}.\n" if waited else ""
    by_cpu = results.get("images_decoded_by_cpu")
    unread = f"{by_cpu} images were decoded by the CPU, which the device could not read.\n" if by_cpu else ""
    return (
        f"{result}Trained {results['step']} steps in {results['train_runtime']:.0f} s, "
        f"{results['train_samples_per_second']:.1f} images/s, {results['train_data_wait_share']:.0%} of the time "
        f"waiting for data, {results['skipped_images']} broken images skipped{listed}.\n{slow}{unread}{damaged}"
        f"In {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir() if path.name[0] != '.'))}.\n"
        f'Use it: pipeline("{TASKS[settings.task].pipeline_tag}", "{output_dir}")'
    )


def note_skipped(output_dir: Path, epoch: int, descriptions: Sequence[str]) -> None:
    """Adds broken images to `skipped.csv`; all processes do. What a resumed run meets again is there again."""
    if descriptions:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows((epoch, printable(text)) for text in descriptions)
        with contextlib.suppress(OSError), open(output_dir / SKIPPED, "a", encoding="utf-8") as file:
            file.write(lines.getvalue())


def resume_command(output_dir: Path, num_processes: int, cpu: bool, changes: Sequence[str] = ()) -> str:
    """The shell command that goes on with a run from its newest checkpoint, with some flags changed."""
    several = ["--num_processes", str(num_processes), *(["--cpu"] if cpu else [])] if num_processes > 1 else []
    words = command_words("train", ["accelerate", "launch", *several], alone=not several)
    words += ["--config_file", str(output_dir / "training_settings.yaml"), "--resume_from_checkpoint", "latest"]
    words += changes
    return shlex.join(words)


def write_curves(path: Path, rows: Sequence[dict[str, Any]], task: str) -> None:
    """PNG of losses (left) and the task's figures (right) over optimiser steps, from the rows of a log.

    On the right are those of which more is better if that is so for the one that matters most, and else the errors.
    """

    def draw(axes: Any, key: str, label: str, style: str = "o-") -> list[float]:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1)
            axes.legend()
        return [value for _, value in points]

    figure, (left, right) = new_figure((10, 4), columns=2)
    draw(left, "loss", "training", "-")
    draw(left, "eval_loss", "evaluation")
    left.set(xlabel="optimiser step", ylabel="loss", title="Loss")
    errors = TASKS[task].is_error(TASKS[task].best)
    figures = [shown for shown in TASKS[task].shown if shown.metric != "loss" and (shown.better == "low") == errors]
    low = min((value for shown in figures for value in draw(right, shown.key, shown.short)), default=0.0)
    right.set(xlabel="optimiser step", title="Evaluation split")
    right.set_ylim(*((0.0, None) if errors else (max(0.0, 1.1 * low - 0.11), 1.01)))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)
