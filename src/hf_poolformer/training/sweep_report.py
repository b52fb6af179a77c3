"""What a sweep has found: a table of its trials, which settings matter, and pictures."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..foundation.figures import new_figure, save_figure
from ..foundation.files import best_effort, replace_text
from ..foundation.names import printable
from ..foundation.tasks import TASKS, Figure
from ..hub.rendering import plain_markdown
from .sweep import Plan, Sweep
from .sweep_space import Choices, describe, value_text


if TYPE_CHECKING:
    import optuna


TABLE, CSV, HISTORY, PARALLEL = "leaderboard.md", "leaderboard.csv", "sweep.png", "parallel.png"
COLOURS = {"complete": "tab:blue", "pruned": "tab:orange"}


def figure_of(plan: Plan) -> Figure:
    """The figure that the sweep is about, for people."""
    known = (figure for figure in TASKS[plan.base.task].figures if figure.key == plan.metric)
    plain = Figure(plan.metric, "", plan.metric.removeprefix("eval_"), share=False)
    return next(known, plain)


def rows_of(sweep: Sweep) -> list[dict[str, Any]]:
    """The trials, the best first, then the pruned ones and the failed; without those that repeat another one."""
    plan, states = sweep.plan, {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    rows = []
    for trial in sweep.study.get_trials(deepcopy=False):
        if "same_as" in trial.user_attrs or trial.state.name == "WAITING":
            continue
        figures = trial.user_attrs.get("figures", {})
        steps = trial.intermediate_values
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds() if trial.datetime_complete else None
        value = trial.value if trial.state.name == "COMPLETE" else None
        rows.append(
            {
                "trial": trial.number,
                plan.metric: value,
                "state": states.get(trial.state.name, "running"),
                **{name: trial.params.get(name) for name in plan.space},
                "epochs": figures.get("epoch", max(steps, default=None)),
                "seconds": None if seconds is None else round(seconds, 1),
                "resumed": trial.user_attrs.get("resumed", 0),
                "note": note_of(trial),
            }
        )
    sign = 1 if plan.lower_is_better else -1

    def place(row: dict[str, Any]) -> tuple[float, ...]:
        value = row[plan.metric]
        order = ["complete", "pruned", "running", "failed"].index(row["state"])
        return order, sign * value if value is not None else 0.0, row["trial"]

    return sorted(rows, key=place)


def note_of(trial: optuna.trial.FrozenTrial) -> str:
    if trial.state.name == "PRUNED" and trial.intermediate_values:
        epoch = max(trial.intermediate_values)
        return f"at epoch {epoch}: {trial.intermediate_values[epoch]:.4g}"
    return trial.user_attrs.get("reason", "")


def importances(sweep: Sweep) -> dict[str, float]:
    """How much of the figure's variance each setting explains, the most first, by Optuna's fANOVA; they add up to 1.

    Empty where there are too few trials to tell.
    """
    import optuna

    trials = [trial for trial in sweep.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len({trial.value for trial in trials}) < 2 or len(trials) < 4:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=sweep.plan.base.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(optuna.importance.get_param_importances(sweep.study, evaluator=evaluator))


def write_report(sweep: Sweep, pictures: bool = True) -> None:
    """`leaderboard.md`, `leaderboard.csv` and, if they are wanted, the pictures."""
    plan, rows = sweep.plan, rows_of(sweep)
    if not rows:
        return
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_text(plan.folder / CSV, table.getvalue())
    matter: dict[str, float] = {}
    if pictures:
        with best_effort("computing which settings matter"):
            matter = importances(sweep)
        with best_effort("drawing the sweep"):
            draw_history(plan, sweep, rows)
        if len(plan.space) > 1:
            with best_effort("drawing the sweep"):
                draw_parallel(plan, rows)
    replace_text(plan.folder / TABLE, markdown(plan, rows, matter))


def markdown(plan: Plan, rows: Sequence[dict[str, Any]], matter: dict[str, float]) -> str:
    figure, names = figure_of(plan), list(plan.space)
    counts = {state: sum(row["state"] == state for row in rows) for state in ("complete", "pruned", "failed")}
    data = getattr(plan.base, "dataset_name", None) or getattr(plan.base, "train_dir", None)
    better = "less is better" if plan.lower_is_better else "more is better"
    lines = [f"# Sweep of {plain_markdown(data)}", ""]
    lines += [
        f"{figure.name} ({plan.metric}, {better}); recipe {plan.base.recipe}, seed {plan.base.seed}; "
        + ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        + ".",
        "",
    ]
    heads = ["", "trial", figure.name, *names, "epochs", "seconds", "state"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---:|" * (len(heads) - 1) + "---|"]
    for place, row in enumerate(rows, 1):
        value = row[plan.metric]
        cells = [str(place) if value is not None else "", str(row["trial"])]
        cells += ["" if value is None else figure.text(value)]
        cells += [plain_markdown(value_text(row[name])) if row[name] is not None else "" for name in names]
        cells += ["" if row[name] is None else str(row[name]) for name in ("epochs", "seconds")]
        between = ": " if row["state"] == "failed" else " "
        state = row["state"] + (between + row["note"] if row["note"] else "")
        cells.append(plain_markdown(state + (f"; interrupted: {row['resumed']}" if row["resumed"] else "")))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## What was tried", ""]
    lines += [f"- {name}: {plain_markdown(describe(one))}" for name, one in plan.space.items()]
    if matter:
        lines += ["", "## Which settings matter", ""]
        lines += [
            "Share of the differences between the complete trials that each setting explains (fANOVA). Of few trials "
            "it is a rough guess.",
            "",
        ]
        lines += ["| setting | importance |", "|---|---:|"]
        lines += [f"| {name} | {share:.2f} |" for name, share in matter.items()]
    return "\n".join(lines) + "\n"


def draw_history(plan: Plan, sweep: Sweep, rows: Sequence[dict[str, Any]]) -> None:
    """PNG: the figure trial by trial, with the best so far; and over the values of each setting."""
    names = list(plan.space)
    columns = min(1 + len(names), 3)
    count = math.ceil((1 + len(names)) / columns)
    figure, grid = new_figure((4.6 * columns, 3.6 * count), columns=columns, rows=count)
    axes = list(getattr(grid, "flat", [grid]))
    points = {"complete": [], "pruned": []}
    for trial in sweep.study.get_trials(deepcopy=False):
        steps = trial.intermediate_values
        if trial.state.name == "COMPLETE" and "same_as" not in trial.user_attrs:
            points["complete"].append((trial.number, trial.value, trial.params))
        elif trial.state.name == "PRUNED" and steps:
            points["pruned"].append((trial.number, steps[max(steps)], trial.params))
    pick, best, course = (min if plan.lower_is_better else max), None, []
    for number, value, _ in points["complete"]:
        best = value if best is None else pick(best, value)
        course.append((number, best))
    if course:
        axes[0].step(*zip(*course, strict=True), where="post", color="black", lw=1, label="best so far")
    for state, found in points.items():
        if found:
            axes[0].scatter(
                [number for number, *_ in found], [value for _, value, _ in found], s=18, c=COLOURS[state], label=state
            )
    axes[0].set(xlabel="trial", title="History")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=8)
    for axis, name in zip(axes[1:], names, strict=False):
        one = plan.space[name]
        places = {value: place for place, value in enumerate(one.values)} if isinstance(one, Choices) else None
        for state, found in points.items():
            across = [values[name] if places is None else places[values[name]] for *_, values in found]
            axis.scatter(across, [value for _, value, _ in found], s=18, c=COLOURS[state])
        if places is not None:
            labels = [printable(value_text(value), 18) for value in places]
            axis.set_xticks(range(len(places)), labels, rotation=0 if max(map(len, labels)) < 8 else 20, fontsize=8)
            axis.set_xlim(-0.5, len(places) - 0.5)
        elif one.log:
            axis.set_xscale("log")
        axis.set_title(name)
    for axis in axes[: 1 + len(names)]:
        axis.set_ylabel(figure_of(plan).name)
        axis.grid(alpha=0.3)
    for axis in axes[1 + len(names) :]:
        axis.axis("off")
    save_figure(figure, plan.folder / HISTORY)


def draw_parallel(plan: Plan, rows: Sequence[dict[str, Any]]) -> None:
    """PNG: a line per complete trial through its values, in the colour of its figure; the best on top."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    done = [row for row in rows if row["state"] == "complete"]
    if len(done) < 2:
        return
    names = list(plan.space)
    figure, axis = new_figure((2.2 * len(names) + 2.5, 4.2))
    values = [row[plan.metric] for row in done]
    colour = ScalarMappable(
        Normalize(min(values), max(values)), colormaps["viridis_r" if plan.lower_is_better else "viridis"]
    )
    for row in reversed(done):
        heights = [height(plan.space[name], row[name]) for name in names]
        is_best = row is done[0]
        axis.plot(range(len(names)), heights, color=colour.to_rgba(row[plan.metric]), lw=3 if is_best else 1.2)
    for place, name in enumerate(names):
        axis.axvline(place, color="black", lw=0.8)
        one = plan.space[name]
        shown = one.values if isinstance(one, Choices) else (one.low, one.high)
        for value in shown:
            axis.text(place + 0.03, height(one, value), printable(value_text(value), 18), fontsize=8, va="center")
    axis.set_xticks(
        range(len(names)), [f"{name} (log)" if plan.space[name].log else name for name in names], fontsize=9
    )
    axis.set_yticks([])
    axis.set_xlim(-0.2, len(names) - 0.5)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
    figure.colorbar(colour, ax=axis, label=figure_of(plan).name)
    save_figure(figure, plan.folder / PARALLEL)


def height(one: Any, value: Any) -> float:
    """Where a value lies between the ends of what is tried, 0 to 1."""
    if isinstance(one, Choices):
        return one.values.index(value) / max(len(one.values) - 1, 1)
    low, high, value = (math.log(number) if one.log else number for number in (one.low, one.high, value))
    return (value - low) / (high - low)
