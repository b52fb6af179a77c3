"""Settings of a run from the command line, and the order in which flag, YAML file and recipe win."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ..foundation.errors import UserError
from ..foundation.settings import QuietParser, SettingsParser, as_flags, check_names, names_of, read_yaml
from ..foundation.tasks import CLASSIFICATION, FEATURE_DISTILLATION, TASKS
from .training import TrainingSettings, default_recipe, defaults_of, settings_of


def look_ahead(argv: Sequence[str]) -> tuple[Namespace, dict[str, Any]]:
    """The flags that decide how all others are read, and what stands in the YAML file.

    Raises:
        UserError: the file cannot be read.
    """
    first = QuietParser(add_help=False, allow_abbrev=False)
    for flag in ("--task", "--recipe", "--distillation"):
        first.add_argument(flag)
    first.add_argument("--config_file", "--config-file")
    known, _ = first.parse_known_args(argv)
    return known, read_yaml(known.config_file) if known.config_file else {}


def task_in(argv: Sequence[str], tasks: Sequence[str] = tuple(TASKS)) -> str | None:
    """The task that a command line is about, among these; None if it has to name one and does not."""
    known, from_file = look_ahead(argv)
    task = known.task or from_file.get("task")
    if task is None and CLASSIFICATION in tasks:
        distillation = known.distillation or from_file.get("distillation")
        task = FEATURE_DISTILLATION if distillation == "features" else CLASSIFICATION
    return task


def parse(
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    *,
    tasks: Sequence[str] | None = None,
    others: Sequence[str] = (),
) -> TrainingSettings:
    """Settings from the command line: a flag wins over the YAML file, and that over the recipe.

    Args:
        tasks: which may be trained; without classification, which is trained by default, one has to be named. None:
            all of them.
        others: flags that the caller has taken out of `argv`; they may be meant by a misspelt one.

    Raises:
        UserError: unknown flags, keys, recipes or tasks (with what was probably meant), and values that do not fit.
    """
    argv, tasks = list(sys.argv[1:] if argv is None else argv), list(tasks or TASKS)
    known, from_file = look_ahead(argv)
    task = task_in(argv, tasks)
    if task is None and not {"--help", "-h"} & set(argv):
        *most, last = tasks
        raise UserError(f"say what to train: --task {', '.join(most)} or {last}.")
    kind = settings_of(task or tasks[0])
    if task is not None:
        check_names([task], tasks, "task")
    names = names_of(kind)
    check_names(from_file, names, f"key in {known.config_file}")
    recipe = known.recipe or str(from_file.get("recipe") or default_recipe(kind))

    what = "a classifier, segmenter or detector" if CLASSIFICATION in tasks else "a segmenter or detector"
    parser = SettingsParser(
        kind,
        prog=prog,
        description=f"Trains {what} on a streamed dataset. Several devices: accelerate launch -m hf_poolformer "
        f"{(prog or 'train').split()[-1]} ...",
        epilog="--task TASK --recipe NAME --help shows the flags of that task and the defaults of that recipe.",
    )
    given = parser.names_in(argv) | {name for name, value in from_file.items() if value is not None}
    parser.set_defaults(**defaults_of(task or tasks[0], recipe, given), task=task, recipe=recipe)
    parser.set_choices("task", tasks)
    # An explicit null in the file unsets what the recipe set.
    unset = [name for name, value in from_file.items() if value is None and name not in ("task", "recipe")]
    parser.set_defaults(**dict.fromkeys(unset))
    settings = kind(**parser.parse(as_flags(from_file, kind) + argv, others))
    return settings.with_recipe_of_model({*given, *from_file})
