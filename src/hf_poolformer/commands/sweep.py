"""`hf-poolformer sweep`: try settings of a training run, and find those that work best.

    hf-poolformer sweep --search learning_rate=log:1e-4..1e-2 weight_decay=0.01,0.05,0.1 --trials 20 \\
        --dataset_name outputs/demo-data --output_dir outputs/sweep --recipe demo
    hf-poolformer sweep --search_file space.yaml --config_file settings.yaml --output_dir outputs/sweep

Every flag of `hf-poolformer train` holds for all trials; --search says which settings vary, and how:

    learning_rate=log:1e-4..1e-2     from ... to ..., on a logarithmic scale
    num_train_epochs=5..20           from ... to ...
    mixup_alpha=0..0.8:0.2           in steps
    optimizer=adamw,lamb             these values
    config_overrides=[{...}, {...}]  values with commas in them: a list in JSON

The same command goes on with a sweep that was interrupted, and with more --trials adds some. Started twice on one
folder, the two share the work. Several devices for each trial: accelerate launch -m hf_poolformer sweep ...
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import CommandParser, UserError, command


if TYPE_CHECKING:
    from ..training.sweep import Outcome, Plan, Sweep, Trial


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("--search", nargs="+", action="extend", default=[], metavar="NAME=VALUES", help="a setting to vary; see above")
    add("--search_file", help="the same in YAML: a mapping of names to values or lists of values")
    add("--trials", type=int, help="trials in all, earlier ones included (default: 20; of a grid all combinations)")
    add(
        "--metric", help="figure of an evaluation that decides (default: --metric_for_best_model, or the task's first)"
    )
    add(
        "--sampler",
        choices=["tpe", "random", "grid"],
        default="tpe",
        help="what to try next: what looks best by the trials so far, anything, or every combination in its order "
        "(default: %(default)s)",
    )
    add(
        "--pruner",
        choices=["median", "hyperband", "none"],
        default="median",
        help="end a trial early if after some epoch it is worse than the median of the others, or by successive "
        "halving (default: %(default)s)",
    )
    add("--keep_all", action="store_true", help="keep model and checkpoints of every trial, and not of the best alone")
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs trials until there are enough, and writes the leaderboard."""
    arguments, flags = parser(prog).parse_known_args(argv)
    if arguments.trials is not None and arguments.trials < 1:
        raise UserError(f"--trials must be at least 1, not {arguments.trials}")
    from ..foundation.processes import part, start_cpu_processes
    from ..training.sweep import make_plan
    from ..training.sweep_space import read_texts

    logging.basicConfig(format="%(message)s")
    plan = make_plan(
        flags,
        read_texts(arguments.search, arguments.search_file),
        trials=arguments.trials,
        metric=arguments.metric,
        sampler=arguments.sampler,
        pruner=arguments.pruner,
        keep_all=arguments.keep_all,
    )
    import optuna  # noqa: F401  # which nothing has asked for yet

    start_cpu_processes()
    run(plan)
    part()
    return 0


def run(plan: Plan) -> None:
    """All trials that are still to be made; every process calls it."""
    from ..foundation.processes import Stopped, found_by_main, processes
    from ..training import sweep_report
    from ..training.sweep import Sweep, run_trial

    sweep: Sweep | None = None

    def begin() -> None:
        nonlocal sweep
        sweep = Sweep(plan)

    def judge(epoch: int, value: float | None) -> bool:
        return sweep.judge(epoch, value)

    found_by_main(begin)
    try:
        while (trial := found_by_main(lambda: sweep.claim())) is not None:
            say(plan, begun(plan, trial))
            outcome = run_trial(plan, trial, judge)
            found_by_main(lambda outcome=outcome: end(sweep, trial, outcome))
    except Stopped:
        if sweep is not None:
            sweep.stop()
            sweep_report.write_report(sweep, pictures=False)
        say(plan, f"Stopped. The sweep in {plan.folder} goes on when the same command is given again.")
        raise
    finally:
        if sweep is not None:
            sweep.release()
    if processes().is_main_process:
        finish(sweep)


def say(plan: Plan, text: str) -> None:
    from ..foundation.processes import processes

    if processes().is_main_process:
        print(text, flush=True)


def begun(plan: Plan, trial: Trial) -> str:
    from ..foundation.names import printable
    from ..training.sweep_space import value_text

    values = ", ".join(f"{name} {printable(value_text(value), 60)}" for name, value in trial.values.items())
    return f"[{trial.number + 1}/{plan.total}] {values}" + (" (goes on)" if trial.goes_on else "")


def end(sweep: Sweep, trial: Trial, outcome: Outcome) -> None:
    """Tells the study and the person how a trial ended.

    Raises:
        UserError: the next ones would fail, too.
    """
    from ..training import sweep_report

    sweep.tell(outcome)
    figure, best = sweep_report.figure_of(sweep.plan), sweep.best
    told = {
        "complete": lambda: f"{figure.name} {figure.text(outcome.value)}",
        "pruned": lambda: f"pruned {sweep_report.note_of(sweep.study.get_trials(deepcopy=False)[trial.number])}",
        "failed": lambda: f"failed: {outcome.reason}",
    }[outcome.state]()
    if best is not None:
        told += f"; the best is {figure.text(best.value)}, trial {best.number}"
    print(f"    {told}", flush=True)
    sweep_report.write_report(sweep, pictures=False)
    if reason := sweep.hopeless():
        raise UserError(f"the next trials would fail like the last: {reason}")


def finish(sweep: Sweep) -> None:
    """The leaderboard, and what to do with it."""
    from ..foundation.spelling import command_words
    from ..training import sweep_report

    plan, best = sweep.plan, sweep.best
    sweep_report.write_report(sweep)
    print(f"\n{(plan.folder / sweep_report.TABLE).read_text(encoding='utf-8')}")
    names = [name for name in (sweep_report.HISTORY, sweep_report.PARALLEL) if (plan.folder / name).is_file()]
    print(f"Leaderboard: {plan.folder / sweep_report.TABLE}, {sweep_report.CSV}; pictures: {', '.join(names)}")
    if best is None:
        print("No trial is complete: the table says why.")
        return
    again = [*command_words("train"), "--config_file", str(plan.folder / "best.yaml")]
    again += ["--output_dir", f"{plan.folder}-best"]
    print(f"Best model (trial {best.number}): {plan.best_folder}")
    print(f"Its settings: {plan.folder / 'best.yaml'}. To train it again:\n  {shlex.join(again)}")
