"""Experiment trackers: what a run tells them of its figures, and of what its model says of some images."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from ..foundation.errors import UserError, one_line
from ..foundation.figures import figure_pixels
from ..foundation.files import write_json
from ..foundation.names import printable
from ..settings.training import TrainingSettings


logger = logging.getLogger(__name__)

PROJECT = "hf-poolformer"
PICTURE = "predictions"
NOTE = "trackio.json"  # in the folder of logs: which run of trackio's this is


def names_of_trackers(settings: TrainingSettings) -> list[str]:
    """Names of the trackers to use; UserError for one that is unknown or not installed."""
    if not settings.report_to:
        return ["all"] if settings.with_tracking else []
    names = [name.strip() for name in settings.report_to.split(",") if name.strip()]
    if names == ["none"]:
        return []
    for name in names:
        if name == "all":
            continue
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--report_to {name}: there are {', '.join(LOGGER_TYPE_TO_CLASS)}, all and none.")
        if name not in [str(available) for available in get_available_trackers()]:
            extra = {"tensorboard": "'hf-poolformer[train]'", "trackio": "'hf-poolformer[trackio]'"}.get(name, name)
            raise UserError(f"--report_to {name}: it is not installed. Install it with: pip install {extra}")
    return names


class Trackers:
    """The trackers of a run; the main process has them, and in the others nothing happens. A context manager, which
    closes them.

    One that fails is told of once, and asked no more: no figure is worth a run.

    Args:
        resume_step: of a run that goes on, up to where its figures are there already; None for a new one.
    """

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator, resume_step: int | None):
        self.settings, self.resume_step = settings, resume_step
        self.folder = Path(settings.output_dir) / "logs"
        self.trackers: dict[str, GeneralTracker] = {}
        self.looks: list[str] = []
        if accelerator.is_main_process:
            for name in map(str, accelerator.log_with):
                self._try(name, self._start, name)

    def _try(self, name: str, do: Callable[..., None], *values: Any) -> None:
        try:
            do(*values)
        except Exception as error:  # whatever a library comes up with
            self.trackers.pop(name, None)
            logger.warning("The run goes on without %s: %s", name, printable(one_line(error)))

    def _start(self, name: str) -> None:
        kind, project = LOGGER_TYPE_TO_CLASS[name], self.settings.project or PROJECT
        if name == "trackio":
            run = self._name_of_trackio_run(project)
            new = self.resume_step is None
            tracker = kind(project, name=run, resume="never" if new else "allow", embed=False)
            self.looks.append(f"{shlex.join(['trackio', 'show', '--project', project])} (run {printable(run)})")
        elif name == "tensorboard":
            # What was written behind the checkpoint is written again.
            purge = {} if self.resume_step is None else {"purge_step": self.resume_step + 1}
            tracker = kind(PROJECT, self.folder, **purge)
            self.looks.append(shlex.join(["tensorboard", "--logdir", str(self.folder)]))
        elif kind.requires_logging_directory:
            tracker = kind(project, self.folder)
        else:
            tracker = kind(project)
        with quiet(name):
            tracker.start()
            if self.resume_step is None or name != "tensorboard":  # which would have them once more
                config = {name: "" if value is None else value for name, value in self.settings.to_dict().items()}
                tracker.store_init_configuration(config)
        self.trackers[name] = tracker

    def _name_of_trackio_run(self, project: str) -> str:
        """The output folder's name, with a number where the project has such a run; a run that goes on keeps its own,
        which is noted among its logs."""
        import trackio

        note = self.folder / NOTE
        if self.resume_step is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                return str(json.loads(note.read_text(encoding="utf-8"))["run"])
        taken = set()
        with contextlib.suppress(ValueError):  # no such project yet
            taken = {run.name for run in trackio.Api().runs(project)}
        name = self.folder.resolve().parent.name
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        name = next(free for free in itertools.chain([name], numbered) if free not in taken)
        write_json(note, {"project": project, "run": name})
        return name

    @property
    def show_pictures(self) -> bool:
        return any(name == "trackio" or hasattr(tracker, "log_images") for name, tracker in self.trackers.items())

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.log, figures, step)

    def show(self, draw: Callable[[], Any | None], step: int) -> None:
        """Gives a figure of matplotlib to the trackers that take pictures; it is drawn only if there are any."""
        figure = draw() if self.show_pictures else None
        if figure is None:
            return
        pixels = figure_pixels(figure)
        for name, tracker in list(self.trackers.items()):
            self._try(name, show_picture, name, tracker, pixels, step)

    def how_to_look(self) -> list[str]:
        """A line for each tracker that is on this machine."""
        return [f"Look at its curves: {look}" for look in self.looks]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self.trackers.items()):
            with quiet(name):
                self._try(name, finish, name, tracker)
        self.trackers = {}


def finish(name: str, tracker: GeneralTracker) -> None:
    if name == "trackio":
        import trackio

        trackio.finish()  # which forgets the run, too; else its exit would end it once more
    else:
        tracker.finish()


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """While a tracker begins or ends. What trackio prints goes to stderr, and it does not ask the Hub whose token is
    on this machine: its run would carry the name."""
    if name != "trackio":
        yield
        return
    import trackio.run

    ask = getattr(trackio.run, "_get_default_namespace", None)

    def nobody() -> str:
        raise LookupError("nobody is asked")

    trackio.run._get_default_namespace = nobody
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        trackio.run._get_default_namespace = ask


def show_picture(name: str, tracker: GeneralTracker, pixels: Any, step: int) -> None:
    """
    Args:
        pixels: uint8 (height, width, 3).
    """
    if name == "trackio":
        import trackio

        tracker.log({PICTURE: trackio.Image(pixels)}, step=step)
    elif name == "tensorboard":
        tracker.log_images({PICTURE: pixels[None]}, step=step, dataformats="NHWC")
        tracker.writer.flush()
    elif hasattr(tracker, "log_images"):
        tracker.log_images({PICTURE: pixels[None]}, step=step)
