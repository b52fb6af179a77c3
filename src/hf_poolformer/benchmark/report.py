"""What becomes of the figures: tables, a JSON file, charts, and the targets they are held against."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..foundation.machine import processor_name, versions_of
from ..foundation.strict_json import to_json
from ..foundation.timing import Deadline
from .comparison import Comparison, Result
from .exports import Exports
from .first_step import FirstSteps
from .floor import Ceilings
from .growth import Growth
from .loader import Loading
from .loop import LoopReport
from .predict import PIPELINE, PredictReport
from .processors import Processing


LIBRARIES = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "timm",
    "onnxruntime",
    "openvino",
    "executorch",
    "pillow",
    "simplejpeg",
)
# Ours; PyTorch peers; other runtimes.
COLOURS = {"ours": "#c2410c", "built-in": "#64748b", "timm": "#94a3b8"}
RUNTIME_COLOUR = "#334155"
# Columns of what is known of a row without timing it.
KNOWN = ("error", "folder")


@dataclasses.dataclass(frozen=True)
class Target:
    """
    A ratio to reach: our row `ours`, or our best one, against another, at 224 pixels unless `any_size`; of a
    PoolFormer, or of the `families` whose names begin so.

    `quantity` is "speed" (theirs in seconds over ours) or "seconds" or "working_memory" (ours over theirs); `against`
    "fastest peer", "fastest compiled peer", "fastest graph" (of a peer), or the name of a row.
    """

    device: str
    mode: str
    dtype: str
    against: str
    wanted: float
    quantity: str = "speed"
    any_size: bool = False
    ours: str = "best"
    families: tuple[str, ...] = ()


CONV_AND_ATTENTION = ("caformer", "convformer")
# As one gets it, doing nothing.
AUTO = "ours auto NCHW"
TARGETS = (
    Target("cpu", "infer", "float32", "fastest peer", 1.25),
    Target("cpu", "infer", "float32", "OpenVINO", 1.0),
    Target("cpu", "infer", "bfloat16", "fastest peer", 1.55),
    Target("cpu", "train", "float32", "built-in eager NCHW", 1.3),
    Target("cpu", "train", "float32", "fastest compiled peer", 1.1),
    Target("cpu", "latency", "float32", "fastest peer", 0.8, "seconds"),
    # M48 and 512 pixels are to reach the same within 10 %.
    Target("cuda", "infer", "bfloat16", "fastest compiled peer", 2.1, any_size=True),
    Target("cuda", "infer", "bfloat16", "built-in eager NCHW", 3.5, any_size=True, ours=AUTO),
    Target("cuda", "infer", "bfloat16", "floor", 0.5),
    Target("cuda", "train", "bfloat16", "fastest compiled peer", 1.4, any_size=True, ours=AUTO),
    Target("cuda", "train", "bfloat16", "fastest compiled peer", 0.5, "working_memory", any_size=True, ours=AUTO),
    Target("cuda", "latency", "bfloat16", "fastest graph", 3.6, ours="ours fused graph"),
    Target("cuda", "latency", "bfloat16", "built-in eager NCHW", 1.5, ours=AUTO),
    Target("cuda", "infer", "bfloat16", "fastest compiled peer", 1.3, families=CONV_AND_ATTENTION),
    Target("cuda", "train", "bfloat16", "fastest compiled peer", 1.2, families=CONV_AND_ATTENTION),
)
FIRST_STEP_TARGETS = {"cold": 20.0, "warm": 5.0}
PROCESSING_TARGET = 1.5
LOADING_TARGET = 1.6
# Export, the row it is held against, the least ratio of their speeds, and the batch.
EXPORT_TARGETS = (
    ("export openvino float32", "OpenVINO float32", 1.05, 16),
    ("export openvino bfloat16", "OpenVINO bfloat16", 1.2, 16),
    ("export openvino int8", "OpenVINO float32", 2.0, 16),
    ("export openvino float32", "OpenVINO float32", 1 / 0.9, 1),
    ("export openvino bfloat16", "OpenVINO bfloat16", 1 / 0.9, 1),
    ("export openvino int8", "OpenVINO float32", 1 / 0.9, 1),
    ("export onnx float32", "transformers onnx float32, ours", 1.0, 16),
    ("export openvino float32", "transformers openvino float32, ours", 1.0, 16),
    ("export openvino bfloat16", "transformers openvino bfloat16, ours", 1.0, 16),
    ("export openvino int8", "transformers openvino int8, ours", 1.0, 16),
    ("export onnx float32", "transformers onnx float32, ours", 1.0, 1),
    ("export openvino float32", "transformers openvino float32, ours", 1.0, 1),
    ("export openvino bfloat16", "transformers openvino bfloat16, ours", 1.0, 1),
    ("export openvino int8", "transformers openvino int8, ours", 1.0, 1),
)


@dataclasses.dataclass
class Report:
    """Everything one run of the benchmark found."""

    command: str
    device: str
    deadline: Deadline
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)
    processing: list[Processing] = dataclasses.field(default_factory=list)
    exports: list[Exports] = dataclasses.field(default_factory=list)
    growth: Growth | None = None
    loading: Loading | None = None
    loop: LoopReport | None = None
    predict: PredictReport | None = None
    first_steps: FirstSteps | None = None
    ceilings: dict[str, Ceilings] = dataclasses.field(default_factory=dict)
    allocator: str = "system"
    started: float = dataclasses.field(default_factory=time.time)

    def failures(self) -> list[str]:
        """One line for each row that failed its gate or ended in an error, and for a loop that was not steady."""
        parts = (*self.comparisons, *self.processing, *self.exports, *filter(None, [self.loading]))
        rows = [(part.title, row) for part in parts for row in part.results]
        if self.growth:
            rows += [("growth", row) for row in self.growth.failures()]
        failed = [f"{title}: {row.name}: {row.note}" for title, row in rows if row.status == "failed"]
        if self.loop and self.loop.failure():
            failed.append(f"training loop: {self.loop.bottleneck}: {self.loop.failure()}")
        return failed

    def to_dict(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "environment": environment(self.device, self.allocator, self.started),
            "ceilings": {dtype: dataclasses.asdict(ceilings) for dtype, ceilings in self.ceilings.items()},
            "comparisons": [dataclasses.asdict(comparison) for comparison in self.comparisons],
            "processing": [dataclasses.asdict(processing) for processing in self.processing],
            "exports": [dataclasses.asdict(exports) for exports in self.exports],
            "growth": dataclasses.asdict(self.growth) if self.growth else None,
            "loading": dataclasses.asdict(self.loading) if self.loading else None,
            "loop": dataclasses.asdict(self.loop) if self.loop else None,
            "predict": dataclasses.asdict(self.predict) if self.predict else None,
            "first_steps": dataclasses.asdict(self.first_steps) if self.first_steps else None,
            "targets": targets(self),
        }

    def to_markdown(self) -> str:
        parts = [heading(self)]
        parts += [comparison_table(comparison) for comparison in self.comparisons]
        parts += [processing_table(processing) for processing in self.processing]
        parts += [exports_table(exports) for exports in self.exports]
        if self.growth:
            parts.append(growth_table(self.growth))
        if self.loading:
            parts.append(loading_table(self.loading))
        if self.loop:
            parts.append(loop_table(self.loop))
        if self.predict:
            parts.append(predict_table(self.predict))
        if self.first_steps:
            parts.append(first_steps_table(self.first_steps))
        if rows := targets(self):
            parts.append(targets_table(rows))
        return "\n\n".join(parts) + "\n"


def environment(device: str, allocator: str, started: float) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "python": platform.python_version(),
        "versions": versions_of(LIBRARIES),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.localtime(started)),
        "minutes": round((time.time() - started) / 60, 1),
    }


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{processor_name()}, {threads}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """Of the checkout this file lies in, with a + where files have changed since; empty outside a checkout."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short", "HEAD")
    return name + "+" * bool(name and git("status", "--porcelain", "--untracked-files=no"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with the first column to the left, the others to the right, padded to be read as it is."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def results_table(results: Sequence[Any], columns: dict[str, Callable[[Any], str]]) -> str:
    """A row for each result, a column for each header; of what was not timed, why, and what is known of it."""
    rows = []
    for result in results:
        cells = {header: cell(result) for header, cell in columns.items() if result.seconds or header in KNOWN}
        if not result.seconds:
            cells[next(iter(columns))] = f"{result.status}: {result.note}"
        rows.append([result.name, *(cells.get(header, "") for header in columns)])
    return table(["", *columns], rows)


def comparison_table(comparison: Comparison) -> str:
    speed = {"images/s": lambda row: f"{row.images_per_second:.1f}"}
    if comparison.case.mode == "latency":
        speed = {"ms": lambda row: f"{row.seconds * 1e3:.2f}"}
    columns = {
        **speed,
        "spread": _spread,
        "x built-in eager": lambda row: _ratio(row.times_built_in_eager),
        "x fastest peer": lambda row: _ratio(row.times_fastest_peer),
        "of the floor": lambda row: "" if row.floor_share is None else f"{row.floor_share:.0%}",
        "memory": lambda row: "" if row.working_memory is None else f"{row.working_memory / 2**20:.0f} MB",
        "error": lambda row: " / ".join(filter(None, (_error(row.logits_error), _error(row.gradient_error)))),
    }
    text = f"**{comparison.title}**\n\n" + results_table(comparison.results, columns)
    if comparison.floor_seconds is not None:
        rate = comparison.case.batch_size / comparison.floor_seconds
        text += f"\n\nFloor: {comparison.floor_seconds * 1e3:.3g} ms, {rate:.4g} images/s."
    return text


def processing_table(processing: Processing) -> str:
    columns = {
        "images/s": lambda row: f"{row.images_per_second:.1f}",
        "spread": _spread,
        "x built-in": lambda row: _ratio(row.times_built_in),
        "error (of 255)": lambda row: f"{row.error:.1f}",
    }
    return f"**{processing.title}**\n\n" + results_table(processing.results, columns)


def loading_table(loading: Loading) -> str:
    columns = {
        "images/s": lambda row: f"{row.images_per_second:.1f}",
        "spread": _spread,
        "CPU ms per image": lambda row: (
            "" if row.cpu_seconds is None else f"{1e3 * row.cpu_seconds / loading.batch_size:.2f}"
        ),
        "x timm": lambda row: _ratio(row.times_timm),
    }
    return f"**{loading.title}**\n\n" + results_table(loading.results, columns)


def exports_table(exports: Exports) -> str:
    peer = next((row.seconds for row in exports.results if row.name == "OpenVINO float32"), None)
    columns = {
        "images/s": lambda row: f"{exports.case.batch_size / row.seconds:.1f}",
        "ms": lambda row: f"{1e3 * row.seconds:.1f}",
        "spread": _spread,
        "x OpenVINO float32": lambda row: _ratio(peer and peer / row.seconds),
        "folder": lambda row: "" if row.size is None else f"{row.size / 1e6:.1f} MB",
        "error": lambda row: _error(row.error),
    }
    return f"**{exports.title}**\n\n" + results_table(exports.results, columns)


def growth_table(growth: Growth) -> str:
    """Images per second along each axis, and how our best row stands to the fastest peer."""
    parts = []
    for axis, comparisons in growth.axes.items():
        if not comparisons:
            continue
        names = [result.name for result in comparisons[0].results]
        rows = []
        for comparison in comparisons:
            by_name = {result.name: result for result in comparison.results}
            ours = [result.times_fastest_peer for result in comparison.results if result.library == "ours"]
            best = max((ratio for ratio in ours if ratio is not None), default=None)
            shares = [result.floor_share for result in comparison.results if result.floor_share is not None]
            rows.append(
                [
                    _place(axis, comparison),
                    *(_rate(by_name[name]) for name in names),
                    _ratio(best),
                    f"{max(shares):.0%}" if shares else "",
                ]
            )
        case = comparisons[0].case
        fixed = [case.mode, case.variant, case.dtype, f"batch {case.batch_size}", f"{case.image_size} px"]
        del fixed[{"batch": 3, "pixels": 4, "model": 1}[axis]]
        header = [axis, *names, "best of ours x fastest peer", "best of the floor"]
        parts.append(f"**growth with {axis}: {', '.join(fixed)}, images/s**\n\n" + table(header, rows))
    if growth.left_out:
        parts.append("Left out, no time in the budget: " + "; ".join(growth.left_out) + ".")
    return "\n\n".join(parts)


def _place(axis: str, comparison: Comparison) -> str:
    case = comparison.case
    return str({"batch": case.batch_size, "pixels": case.image_size, "model": case.variant}[axis])


def _rate(result: Result) -> str:
    return f"{result.status}: {result.note}" if result.images_per_second is None else f"{result.images_per_second:.1f}"


def loop_table(loop: LoopReport) -> str:
    """Rates of the parts and the whole, and the sentence that names the bottleneck."""
    # A device stage with nothing to do takes no time worth a figure.
    rows = [(name, f"{rate:.1f}" if rate < 1e6 else "(nothing to do)") for name, rate in loop.rates.items()]
    return (
        f"**training loop, {loop.case.title}, {loop.workers} workers, "
        f"--device_preprocessing {loop.device_preprocessing}**\n\n"
        + table(("", "images/s"), rows)
        + f"\n\nData: {loop.dealt}. Waiting for data with photographs: {loop.data_wait_share:.1%} of the time. "
        + f"Bottleneck: {loop.bottleneck}; {loop.explanation}"
    )


def predict_table(found: PredictReport) -> str:
    """Rates of the parts, the whole and the pipeline, and the sentence that names the bottleneck."""
    rows = [(name, f"{rate:.1f}", f"{rate / found.rates[PIPELINE]:.2f}") for name, rate in found.rates.items()]
    way = "auto, which chose " * (found.device_preprocessing == "auto") + found.chosen
    return (
        f"**predict, {found.case.title}, {found.workers} workers, {found.images} JPEG files, "
        f"--device_preprocessing {way}**\n\n"
        + table(("", "images/s", "x pipeline"), rows)
        + f"\n\nMedians of {len(found.rounds[PIPELINE])} rounds. Bottleneck: {found.bottleneck}; {found.explanation}"
        + (f"\n\n{found.choice}" if found.choice else "")
    )


def first_steps_table(steps: FirstSteps) -> str:
    rows = [("cold", f"{steps.cold:.1f}"), ("warm", f"{steps.warm:.1f}")]
    return f"**{steps.case.title}: from the start to the end of the first step**\n\n" + table(("cache", "s"), rows)


def targets(report: Report) -> list[dict[str, Any]]:
    """Each target that this run can judge: what was wanted and what was reached."""
    found = []

    def judge(case: str, what: str, wanted: float, reached: float | None, at_least: bool = True) -> None:
        if reached is not None:
            text = f"{'>=' if at_least else '<='} {wanted:.3g}"
            ok = reached >= wanted if at_least else reached <= wanted
            found.append({"case": case, "what": what, "wanted": text, "reached": reached, "ok": ok})

    for comparison in report.comparisons:
        for target in TARGETS:
            at_least = target.quantity == "speed"
            wanted = target.wanted if _is_plain(comparison) else target.wanted * (0.9 if at_least else 1.1)
            judge(comparison.title, _what(target), wanted, _reached(target, comparison), at_least)
    for name, most in FIRST_STEP_TARGETS.items() if report.first_steps else ():
        what = f"seconds to the first step, {name} cache"
        judge(report.first_steps.case.title, what, most, getattr(report.first_steps, name), at_least=False)
    for processing in report.processing:
        for result in processing.results:
            if result.library == "ours":
                case = f"{processing.title}, {result.name}"
                judge(case, "speed against built-in", PROCESSING_TARGET, result.times_built_in)
    for result in report.loading.results if report.loading else ():
        if result.library == "ours":
            judge(f"{report.loading.title}, {result.name}", "speed against timm", LOADING_TARGET, result.times_timm)
    for exports in report.exports:
        seconds = {row.name: row.seconds for row in exports.results if row.seconds is not None}
        for name, against, wanted, batch_size in EXPORT_TARGETS:
            if batch_size == exports.case.batch_size and name in seconds and against in seconds:
                speed = seconds[against] / seconds[name]
                judge(f"{exports.title}, {name}", f"speed against {against}", wanted, speed)
    return found


def _what(target: Target) -> str:
    if target.against == "floor":
        return "share of the floor"
    ours = "" if target.ours == "best" else f" of {target.ours}"
    return f"{target.quantity.replace('_', ' ')}{ours} against {target.against}"


def _is_plain(comparison: Comparison) -> bool:
    case = comparison.case
    return case.image_size == 224 and (case.variant == "poolformer_s12" or not case.is_poolformer)


def _reached(target: Target, comparison: Comparison) -> float | None:
    case = comparison.case
    if (target.device, target.mode, target.dtype) != (case.device, case.mode, case.dtype):
        return None
    if not (target.any_size or _is_plain(comparison)):
        return None
    if not (case.variant.startswith(target.families) if target.families else case.is_poolformer):
        return None
    timed = [result for result in comparison.results if result.seconds is not None]
    ours = [result for result in timed if result.library == "ours" and target.ours in ("best", result.name)]
    if not ours:
        return None
    best = min(ours, key=lambda result: result.seconds)
    if target.against == "floor":
        return best.floor_share
    if target.against.startswith("fastest"):
        others = [result for result in timed if result.library in ("built-in", "timm")]
        if target.against == "fastest compiled peer":
            others = [result for result in others if not {"eager", "graph"} & set(result.name.split())]
        elif target.against == "fastest graph":
            others = [result for result in others if result.name.endswith("graph")]
    else:
        others = [result for result in timed if result.name == target.against]
    if not others:
        return None
    other = min(others, key=lambda result: result.seconds)
    if target.quantity == "speed":
        return other.seconds / best.seconds
    ours_value, their_value = getattr(best, target.quantity), getattr(other, target.quantity)
    return ours_value / their_value if ours_value is not None and their_value else None


def targets_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (f"{row['case']}: {row['what']}", row["wanted"], f"{row['reached']:.2f}", "yes" if row["ok"] else "no")
        for row in rows
    ]
    return "**Targets, our best row against others**\n\n" + table(("", "wanted", "reached", "ok"), lines)


def write(report: Report, prefix: Path) -> list[Path]:
    """PREFIX.json, PREFIX.md and, where there is something to draw, PREFIX.png; returns what was written."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    written = [prefix.with_name(prefix.name + suffix) for suffix in (".json", ".md")]
    write_json(report, written[0])
    written[1].write_text(report.to_markdown(), encoding="utf-8")
    chart = prefix.with_name(prefix.name + ".png")
    if draw(report, chart):
        written.append(chart)
    return written


def write_json(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(report.to_dict(), indent=1) + "\n", encoding="utf-8")


def draw(report: Report, path: Path) -> bool:
    """A panel of bars per comparison, ours in colour; False without anything timed or without matplotlib."""
    panels: list[tuple[str, str, list[tuple[str, str, float, float]], float | None]] = []
    for comparison in report.comparisons:
        latency = comparison.case.mode == "latency"
        bars = []
        for result in comparison.results:
            if result.seconds is not None:
                value = result.seconds * 1e3 if latency else result.images_per_second
                bars.append((result.name, result.library, value, result.spread * value / 2))
        floor = None
        if comparison.floor_seconds is not None:
            floor = (
                comparison.floor_seconds * 1e3 if latency else comparison.case.batch_size / comparison.floor_seconds
            )
        panels.append((comparison.title, "ms, less is better" if latency else "images/s", bars, floor))
    for processing in report.processing:
        bars = [
            (result.name, result.library, result.images_per_second, result.spread * result.images_per_second / 2)
            for result in processing.results
            if result.images_per_second is not None
        ]
        panels.append((processing.title, "images/s", bars, None))
    panels = [panel for panel in panels if panel[2]]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not panels:
        return draw_growth(report, path) if report.growth else False

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    heights = [
        max(len(panel[2]) for panel in panels[line * columns : (line + 1) * columns]) + 2.2 for line in range(lines)
    ]
    figure = Figure(figsize=(6.6 * columns, 0.27 * sum(heights) + 0.5), layout="constrained")
    figure.suptitle(_subtitle(report), fontsize=9)
    grid = figure.add_gridspec(lines, columns, height_ratios=heights)
    for index, (title, unit, bars, floor) in enumerate(panels):
        axis = figure.add_subplot(grid[divmod(index, columns)])
        names = [bar[0] for bar in bars]
        colours = [COLOURS.get(bar[1], RUNTIME_COLOUR) for bar in bars]
        axis.barh(
            names,
            [bar[2] for bar in bars],
            xerr=[bar[3] for bar in bars],
            color=colours,
            height=0.72,
            ecolor="#1e293b",
        )
        largest = max(bar[2] + bar[3] for bar in bars)
        for place, bar in enumerate(bars):
            axis.text(bar[2] + bar[3] + largest * 0.015, place, f"{bar[2]:.3g}", va="center", fontsize=8)
        limit = largest * 1.14
        if floor is not None and floor < 2.5 * largest:
            axis.axvline(floor, color="#0f766e", linestyle=":", linewidth=1.2)
            axis.text(floor, -0.75, "floor ", color="#0f766e", fontsize=8, ha="right", va="bottom")
            limit = max(limit, floor * 1.04)
        axis.set_xlim(0, limit)
        axis.set_ylim(len(bars) - 0.4, -0.8)
        axis.set_title(title, fontsize=9, loc="left", fontweight="bold")
        axis.set_xlabel(unit, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return True


def draw_growth(report: Report, path: Path) -> bool:
    """A panel of curves per axis."""
    from matplotlib.figure import Figure

    axes = {axis: comparisons for axis, comparisons in report.growth.axes.items() if len(comparisons) > 1}
    if not axes:
        return False
    figure = Figure(figsize=(4.4 * len(axes), 3.6), layout="constrained")
    figure.suptitle(_subtitle(report), fontsize=9)
    for index, (axis_name, comparisons) in enumerate(axes.items()):
        axis = figure.add_subplot(1, len(axes), index + 1)
        places = [_place(axis_name, comparison).removeprefix("poolformer_") for comparison in comparisons]
        for number, result in enumerate(comparisons[0].results):
            rates = [comparison.results[number].images_per_second for comparison in comparisons]
            axis.plot(
                places,
                [math.nan if rate is None else rate for rate in rates],
                marker="o",
                markersize=4,
                color=COLOURS.get(result.library, RUNTIME_COLOUR),
                linestyle=("-", "--", ":", "-.")[number % 4],
                label=result.name,
            )
        axis.set_yscale("log")
        axis.set_title(f"images/s against {axis_name}", fontsize=9, loc="left", fontweight="bold")
        axis.tick_params(labelsize=8, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    return True


def heading(report: Report) -> str:
    about = environment(report.device, report.allocator, report.started)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['date']}, commit {about['commit'] or 'unknown'}, {about['device']}, {about['threads']} threads, "
        f"{about['allocator']} allocator, Python {about['python']}, {versions}. `{report.command}`, "
        f"{about['minutes']} minutes."
    ]
    for dtype, ceilings in report.ceilings.items():
        lines.append(
            f"Ceilings, {dtype}: {ceilings.flop_per_second / 1e9:,.0f} GFLOP/s in a large matrix product, "
            f"{ceilings.bytes_per_second / 1e9:,.1f} GB/s in a stream triad."
        )
    return "\n".join(lines)


def _subtitle(report: Report) -> str:
    about = environment(report.device, report.allocator, report.started)
    return f"{about['device']}, torch {about['versions']['torch']}, {about['date']}, commit {about['commit']}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _spread(result: Any) -> str:
    return f"{result.spread:.0%}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"
