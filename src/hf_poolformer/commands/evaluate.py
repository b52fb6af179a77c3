"""`hf-poolformer evaluate`: how right a model is on labelled or annotated images, on one device or many."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..foundation.strict_json import to_json
from . import command, quieten


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Evaluates; see `evaluation.settings` for the flags."""
    from ..evaluation.settings import parse_evaluation

    logging.basicConfig(format="%(message)s")
    settings = parse_evaluation(argv, prog)
    from ..foundation.processes import start_cpu_processes

    start_cpu_processes()
    quieten()
    from accelerate import PartialState

    from ..evaluation.classification import evaluate_checkpoint
    from ..evaluation.dense import evaluate_dense_checkpoint
    from ..evaluation.processes import describe_results
    from ..foundation.loading import task_of_checkpoint
    from ..foundation.report_folder import PAGE
    from ..foundation.tasks import TASKS

    task = task_of_checkpoint(settings.model, settings.origin())
    settings.check_for(task)
    report = None
    if settings.report and task.is_dense:
        from ..reports.dense import write_dense_report as report
    elif settings.report:
        from ..reports.evaluation import write_evaluation_report as report
    evaluate = evaluate_dense_checkpoint if task.is_dense else evaluate_checkpoint
    results = evaluate(settings, report)
    if not PartialState().is_main_process:
        return 0
    if settings.json:
        print(to_json({"model": settings.model, **results}, indent=2))
        return 0
    task = TASKS[results["task"]]
    print(f"{settings.model}: {describe_results(results, task)}.")
    if settings.output_dir:
        print(f"Written to {settings.output_dir}: all_results.json, {task.judge.picture}")
    if settings.report:
        print(f"Report: {Path(settings.report) / PAGE}")
    return 0
