"""A sweep: runs that try settings, and the study (Optuna's) that says which to try next.

What lies in the folder of a sweep:

    study.journal        the study: every trial with its settings and figures; Optuna's journal
    trials/trial-007     the run of a trial, as `train` leaves it, without model and checkpoints once it is over
    trials/trial-007.txt what it said
    best                 the best model so far, with its card: ready for predict and publish
    best.yaml            its settings, for `train --config_file`
    leaderboard.md, ...  what `sweep_report` writes

The journal alone decides: a sweep that is killed anywhere goes on from it. Several processes on one folder share the
study, and each trial belongs to the one that has the lock in its folder. A trial that is running and whose lock nobody
has was interrupted, and whoever comes next goes on with it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..foundation.errors import Diverged, UserError, one_line
from ..foundation.files import best_effort, make_folder, replace_text, sync
from ..foundation.folders import Taken, give_back, new_folder, take
from ..foundation.memory import is_out_of_memory
from ..foundation.processes import found_by_main, processes
from ..foundation.settings import as_flags
from ..foundation.strict_json import to_json
from ..foundation.tasks import TASKS
from ..hub.cards import folder_card
from ..settings.command_line import parse, task_in
from ..settings.training import TrainingSettings, settings_of
from .loop import Run, train
from .records import content_of, differences, key_of
from .sweep_space import Space, check_space, describe, grid, make_space


if TYPE_CHECKING:
    import optuna


logger = logging.getLogger(__name__)

STUDY, JOURNAL, LOCK, TRIAL_LOCK, FAULT = "sweep", "study.journal", ".study.lock", ".trial.lock", ".fault.json"
# So often a trial's process may end without a word before the trial counts as failed: one that the system kills
# because it takes too much memory would never let the others have their turn.
MOST_DEATHS = 3
# So many trials in a row that fail for one and the same reason end a sweep: the others would, too. Before any has
# come to its end one is enough.
MOST_ALIKE = 3


class Pruned(Exception):
    """A trial is not worth going on with; all processes raise it."""


@dataclass(frozen=True)
class Trial:
    """A trial as every process knows it.

    Attributes:
        goes_on: it was begun before.
    """

    number: int
    values: dict[str, Any]
    goes_on: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: complete, pruned or failed.
        value: the figure that the sweep is about; of a pruned trial its last.
        reason: why it failed.
        results: what `train` returned.
    """

    state: str
    value: float | None = None
    reason: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """What a sweep is to do, the same in every process.

    Attributes:
        flags: of `train`, the same for all trials.
        base: the settings that all trials share; of those that are searched, the first values.
        metric: key of the figure that says which trial is better.
        total: trials in all, those of former calls included.
        combinations: of a grid, which is then what is tried.
    """

    flags: list[str]
    base: TrainingSettings
    space: Space
    metric: str
    total: int
    sampler: str
    pruner: str
    keep_all: bool
    combinations: list[dict[str, Any]]

    @property
    def folder(self) -> Path:
        return Path(self.base.output_dir)

    @property
    def best_folder(self) -> Path:
        return self.folder / "best"

    @property
    def lower_is_better(self) -> bool:
        return TASKS[self.base.task].is_error(self.metric)

    def folder_of(self, number: int) -> Path:
        return self.folder / "trials" / f"trial-{number:03d}"

    def settings_of(self, values: Mapping[str, Any], folder: Path | None = None) -> TrainingSettings:
        """Those of `train` with these values, which win over flags, files and recipes."""
        settings = settings_with(self.flags, values, type(self.base))
        if folder is not None:
            settings.output_dir = str(folder)
        settings.project = settings.project or self.folder.resolve().name
        return settings


# What is about one run, and not about many.
OF_ONE_RUN = {
    "resume_from_checkpoint": "a sweep goes on by itself: give the same command again",
    "overwrite_output_dir": "a sweep goes on with what is there: give another --output_dir for a new one",
    "push_to_hub": "publish the best model when it is there: hf-poolformer publish FOLDER/best --repo_id ...",
}


def settings_with(flags: Sequence[str], values: Mapping[str, Any], kind: type[TrainingSettings]) -> TrainingSettings:
    return parse([*flags, *as_flags(dict(values), kind)], others=("search", "search_file", "trials", "metric"))


def make_plan(
    flags: Sequence[str],
    texts: Mapping[str, Any],
    *,
    trials: int | None,
    metric: str | None,
    sampler: str,
    pruner: str,
    keep_all: bool,
) -> Plan:
    """Reads and checks everything that was asked for, before anything is trained.

    Raises:
        UserError: something of it cannot be done.
    """
    kind = settings_of(task_in(flags) or "")
    space = make_space(texts, kind)
    check_space(space, lambda values: settings_with(flags, values, kind))
    base = settings_with(flags, {name: one.ends()[0] for name, one in space.items()}, kind)
    for name, reason in OF_ONE_RUN.items():
        if getattr(base, name):
            raise UserError(f"--{name}: {reason}.")
    known = TASKS[base.task].kept_by
    asked = metric or base.best_by or TASKS[base.task].best
    key = asked if asked in known else f"eval_{asked}"
    if key not in known:
        base.metric_for_best_model = asked
        base.check_best_model()  # which says what there is
    combinations = grid(space) if sampler == "grid" else []
    if trials is None:
        trials = len(combinations) or 20
    if combinations:
        trials = min(trials, len(combinations))
    return Plan(list(flags), base, space, key, trials, sampler, pruner, keep_all, combinations)


class Lock:
    """Waits for a lock of the operating system, which ends with its process, however that ends. Optuna's own ones stay
    behind a process that is killed."""

    def __init__(self, path: Path):
        self.path, self.file = path, -1

    def acquire(self) -> bool:
        while True:
            try:
                self.file, _ = take(self.path)
                return True
            except Taken:
                time.sleep(0.02)

    def release(self) -> None:
        give_back(self.path, self.file)


class Sweep:
    """The study, and the trial that this command is at; of several processes the main one has it."""

    def __init__(self, plan: Plan):
        """Opens the study in the folder, or begins one.

        Raises:
            UserError: the folder holds something else, or a sweep with other settings, data or values.
        """
        self.plan = plan
        journal = plan.folder / JOURNAL
        held = [path.name for path in plan.folder.iterdir() if path.name[0] != "."] if plan.folder.is_dir() else []
        if held and not journal.is_file():
            raise UserError(
                f"{plan.folder} holds something else ({', '.join(sorted(held)[:4])}, ...). Give another --output_dir."
            )
        make_folder(plan.folder)
        self.trial: optuna.Trial | None = None
        self.lock: tuple[Path, int] | None = None
        with self.alone():
            self.study = open_study(journal, plan)
            self.check_key()
            self.tidy()

    def begin_anew(self) -> None:
        """Forgets trials that have all failed: whoever mends what was wrong with them need not look for a folder."""
        import optuna

        optuna.delete_study(study_name=STUDY, storage=self.study._storage)
        shutil.rmtree(self.plan.folder / "trials", ignore_errors=True)
        self.study = open_study(self.plan.folder / JOURNAL, self.plan)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While this process looks at the study and changes it, no other sweep on the folder does."""
        lock = Lock(self.plan.folder / LOCK)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def check_key(self) -> None:
        """Compares what the study was begun with; its trials must be of one kind to be compared."""
        plan, noted = self.plan, self.study.user_attrs
        mine = {
            "key": key_of(plan.base, content_of(plan.base)),
            "space": {name: describe(one) for name, one in plan.space.items()},
            "metric": plan.metric,
        }
        differs = any(noted.get(name, mine[name]) != mine[name] for name in mine)
        if differs and all(trial.state.name == "FAIL" for trial in self.study.get_trials(deepcopy=False)):
            self.begin_anew()
            noted = {}
        if "key" not in noted:
            for name, value in mine.items():
                self.study.set_user_attr(name, value)
            return
        for name in ("space", "metric"):
            if noted[name] != mine[name]:
                theirs = noted[name] if name == "metric" else ", ".join(f"{k}={v}" for k, v in noted[name].items())
                raise UserError(
                    f"{plan.folder} holds a sweep with another {name} ({theirs}). Give another --output_dir, or the "
                    "same again to go on with that one."
                )
        if noted["key"] != mine["key"]:
            raise UserError(
                f"{plan.folder} holds a sweep that cannot be compared: {differences(noted['key'], mine['key'])}. Give "
                "another --output_dir."
            )

    def claim(self) -> Trial | None:
        """The next trial of this process: one that was interrupted, else a new one; None when there are enough."""
        with self.alone():
            while True:
                trials = self.study.get_trials(deepcopy=False)
                for frozen in trials:
                    if frozen.state.name == "RUNNING" and (taken := self.take_up(frozen)) is not None:
                        return taken
                waiting = any(frozen.state.name == "WAITING" for frozen in trials)
                if len(trials) >= self.plan.total and not waiting:
                    return None
                begun = self.begin(len(trials), waiting)
                if begun is not None:
                    return begun

    def begin(self, number: int, waiting: bool) -> Trial | None:
        """A new trial; None if another one has told already what would come out of it."""
        plan, study = self.plan, self.study
        study.sampler = make_sampler(plan, number)
        if plan.combinations and not waiting:
            study.enqueue_trial(plan.combinations[number])
        self.trial = study.ask()
        values = {name: one.suggest(self.trial, name) for name, one in plan.space.items()}
        for other in study.get_trials(deepcopy=False):
            if other.state.name == "COMPLETE" and other.params == values:
                self.trial.set_user_attr("same_as", other.number)
                study.tell(self.trial.number, other.value)
                return None
        self.hold(self.trial.number)
        return Trial(self.trial.number, values)

    def take_up(self, frozen: optuna.trial.FrozenTrial) -> Trial | None:
        """A trial that was begun and not ended, if nobody is at it; what has to be said of it is told."""
        import optuna

        if not self.hold(frozen.number):
            return None
        trial = optuna.Trial(self.study, frozen._trial_id)
        folder, noted = self.plan.folder_of(frozen.number), frozen.user_attrs
        deaths = 0 if noted.get("stopped") else noted.get("deaths", 0) + 1
        reason = ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            reason = json.loads((folder / FAULT).read_text(encoding="utf-8"))["reason"]
        if not reason and deaths >= MOST_DEATHS:
            reason = f"its process ended {deaths} times without a word: was there enough memory?"
        if reason:
            trial.set_user_attr("reason", reason)
            self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            self.release()
            return None
        for name, value in {"deaths": deaths, "stopped": False, "resumed": noted.get("resumed", 0) + 1}.items():
            trial.set_user_attr(name, value)
        self.trial = trial
        values = {name: one.suggest(trial, name) for name, one in self.plan.space.items()}
        return Trial(frozen.number, values, goes_on=True)

    def hold(self, number: int) -> bool:
        """Makes the folder of a trial this command's; False if it is another's."""
        lock = self.plan.folder_of(number) / TRIAL_LOCK
        try:
            file, _ = take(lock)
        except Taken:
            return False
        self.lock = lock, file
        return True

    def release(self) -> None:
        if self.lock is not None:
            give_back(*self.lock)
            self.lock = None

    def judge(self, epoch: int, value: float | None) -> bool:
        """Whether the trial is to be pruned after an evaluation."""
        if value is None or not math.isfinite(value):
            return False
        known = self.study.get_trials(deepcopy=False)[self.trial.number].intermediate_values
        if epoch not in known:  # a trial that goes on may evaluate once more
            self.trial.report(value, epoch)
        return self.plan.pruner != "none" and self.trial.should_prune()

    def tell(self, outcome: Outcome) -> None:
        """Ends the trial, and tidies up after it."""
        import optuna

        results, state = outcome.results, optuna.trial.TrialState
        figures = {name: value for name, value in results.items() if isinstance(value, (int, float, str))}
        with self.alone():
            self.trial.set_user_attr("reason", outcome.reason)
            self.trial.set_user_attr("figures", figures)
            ended = {"complete": state.COMPLETE, "pruned": state.PRUNED, "failed": state.FAIL}[outcome.state]
            self.study.tell(self.trial.number, outcome.value if ended == state.COMPLETE else None, state=ended)
            self.tidy()
        self.release()

    def stop(self) -> None:
        """Leaves the trial so that the next call goes on with it."""
        if self.trial is not None and self.lock is not None:
            self.trial.set_user_attr("stopped", True)
            self.release()

    @property
    def best(self) -> optuna.trial.FrozenTrial | None:
        trials = [t for t in self.study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
        trials = [trial for trial in trials if "same_as" not in trial.user_attrs]
        pick = min if self.plan.lower_is_better else max
        return pick(trials, key=lambda trial: (trial.value, 0), default=None)

    def tidy(self) -> None:
        """Puts the best model into its place, and removes what trials that are over need no more."""
        plan, best = self.plan, self.best
        if best is not None and self.study.user_attrs.get("in_place") != best.number:
            folder = plan.folder_of(best.number)
            if (folder / "model.safetensors").is_file():
                put_best(plan, best.number, best.params)
                self.study.set_user_attr("in_place", best.number)
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and not plan.keep_all:
                folder = plan.folder_of(trial.number)
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                for path in folder.glob("*.safetensors"):
                    path.unlink(missing_ok=True)

    def hopeless(self) -> str:
        """Why the next trials will fail like the last ones; empty if that is not so."""
        trials = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        # The first one stands for all: whoever has mistyped the name of a dataset need not read it three times.
        last = trials[-1:] if all(trial.state.name == "FAIL" for trial in trials) else trials[-MOST_ALIKE:]
        reasons = {trial.user_attrs.get("reason", "") if trial.state.name == "FAIL" else "" for trial in last}
        [reason, *others] = reasons or [""]
        return "" if others or re.match("diverged|out of memory", reason) else reason


def open_study(journal: Path, plan: Plan) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = Lock(journal.with_name(f".{journal.name}.lock"))
    lock.acquire()
    try:
        mend(journal)
    finally:
        lock.release()
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal), lock)),
        study_name=STUDY,
        direction="minimize" if plan.lower_is_better else "maximize",
        pruner=make_pruner(plan),
        load_if_exists=True,
    )


def mend(journal: Path) -> None:
    """Takes away the line that a process did not finish when it was killed: the next would join it.

    Raises:
        UserError: another line is damaged.
    """
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            readable = isinstance(json.loads(line), dict)
        except ValueError:
            readable = False
        if not readable:
            raise UserError(
                f"{journal} is damaged in line {number}: what was tried cannot be read. leaderboard.csv, best and "
                "best.yaml beside it are as they were. Give another --output_dir, or put back a copy of the file."
            )
    if whole < len(content):
        os.truncate(journal, whole)
        sync(journal)


def make_sampler(plan: Plan, number: int) -> optuna.samplers.BaseSampler:
    """One that depends on the seed and the number of the trial only, however often the sweep was interrupted."""
    import numpy as np
    import optuna

    seed = int(np.random.SeedSequence([plan.base.seed, number]).generate_state(1)[0])
    kind = optuna.samplers.TPESampler if plan.sampler == "tpe" else optuna.samplers.RandomSampler
    return kind(seed=seed)


def make_pruner(plan: Plan) -> optuna.pruners.BasePruner:
    """Compares evaluations after the same epoch."""
    import optuna

    if plan.pruner == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=math.ceil(plan.base.num_warmup_epochs) + 1)
    if plan.pruner == "hyperband":
        epochs = plan.space.get("num_train_epochs")
        most = plan.base.num_train_epochs if epochs is None else max(epochs.ends())
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=most)
    return optuna.pruners.NopPruner()


def put_best(plan: Plan, number: int, values: Mapping[str, Any]) -> None:
    """Copies what a trial has left to where the best model is, and notes its settings for another run."""
    folder = plan.best_folder
    settings = plan.settings_of(values, folder)
    left_out = shutil.ignore_patterns("checkpoints", "logs", ".*")
    with new_folder(folder, True, lambda *_: None, "best model") as scratch:
        shutil.copytree(plan.folder_of(number), scratch, ignore=left_out, dirs_exist_ok=True)
        settings.save(scratch / "training_settings.yaml")
        with best_effort("writing the model card"):
            replace_text(scratch / "README.md", folder_card(scratch, name=folder.name))
    once = ("config_file", "resume_from_checkpoint", "overwrite_output_dir", "output_dir", "project")
    kept = {name: value for name, value in settings.to_dict().items() if name not in once}
    text = f"# Trial {number} of the sweep in {plan.folder.resolve().name}\n{yaml.safe_dump(kept, sort_keys=False)}"
    replace_text(plan.folder / "best.yaml", text)


def run_trial(plan: Plan, trial: Trial, judge: Callable[[int, float | None], bool]) -> Outcome:
    """Trains one trial, or reads what came out of it if only that was not noted; every process must call it.

    Args:
        judge: of epoch and figure whether to prune; called in the main process.

    Raises:
        UserError: one of several processes has failed, and the others can only be ended. The trial is noted as failed.
    """
    folder = plan.folder_of(trial.number)
    results = found_by_main(lambda: finished_results(folder)) if trial.goes_on else None
    if results is not None:
        return outcome_of(plan, results)

    def after_evaluation(run: Run, figures: Mapping[str, Any]) -> None:
        if found_by_main(lambda: judge(run.progress.epoch, figures.get(plan.metric))):
            raise Pruned

    try:
        settings = plan.settings_of(trial.values, folder)
        settings.resume_from_checkpoint, settings.overwrite_output_dir = "latest", True
        with saying_into(folder.with_suffix(".txt")):
            return outcome_of(plan, train(settings, after_evaluation=after_evaluation))
    except Pruned:
        return Outcome("pruned")
    except Diverged as error:
        return Outcome("failed", reason=f"diverged: {one_line(error)}")
    except Exception as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        reason = one_line(error)
        if is_out_of_memory(error) and not reason.startswith("out of memory"):
            reason = f"out of memory: {reason}"
        if processes().num_processes > 1:  # of which perhaps this one alone is here
            note_fault(folder, reason)
            raise
    finally:
        give_memory_back()
    return Outcome("failed", reason=reason)


def outcome_of(plan: Plan, results: Mapping[str, Any]) -> Outcome:
    value = results.get(plan.metric)
    if value is None or not math.isfinite(value):
        return Outcome("failed", reason=f"the evaluation gave no {plan.metric}", results=results)
    return Outcome("complete", float(value), results=results)


def finished_results(folder: Path) -> dict[str, Any] | None:
    """What a run that came to its end has left."""
    try:
        return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def note_fault(folder: Path, reason: str) -> None:
    with contextlib.suppress(OSError, UserError):
        replace_text(folder / FAULT, to_json({"reason": reason}))


@contextlib.contextmanager
def saying_into(path: Path) -> Iterator[None]:
    """What is printed goes into a file, so that a trial takes a line on the screen; bars and warnings stay there."""
    path = path if processes().is_main_process else Path(os.devnull)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file, contextlib.redirect_stdout(file):
        yield


def give_memory_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
