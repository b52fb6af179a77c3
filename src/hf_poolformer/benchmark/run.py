"""One run of the benchmark: what the arguments of `hf-poolformer benchmark` ask for, measured, shown and written."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from ..foundation.errors import UserError
from ..foundation.timing import Deadline
from . import report as reports
from .case import Case
from .comparison import Runner
from .exports import measure_exports
from .first_step import measure_first_steps
from .floor import measure_ceilings
from .growth import VARIANTS, measure_growth
from .loader import measure_loaders
from .loop import measure_loop
from .predict import measure_predict
from .processors import SIZES, measure_processors
from .report import Report
from .rows import all_rows, choose_rows


# Batches of the modes where --batch_size does not say.
BATCH_SIZES = {"cpu": {"infer": 16, "train": 16, "latency": 1}, "cuda": {"infer": 256, "train": 256, "latency": 1}}


def run(arguments: argparse.Namespace) -> int:
    """
    Everything that was asked for.

    Args:
        arguments: of `commands.benchmark`.

    Returns:
        the exit status: 1 if a row failed its gate.

    Raises:
        UserError: there is no such device or variant, or what is measured needs libraries that are missing.
    """
    quieten()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.command == "loader":
        if arguments.device == "cuda":
            raise UserError("loader compares on the CPU: leave --device out.")
        arguments.device = "cpu"
    if arguments.command == "export":
        if arguments.device == "cuda" or arguments.dtype:
            raise UserError(
                "export compares on the CPU, in float32, bfloat16 and int8: leave --device and --dtype out."
            )
        arguments.device = "cpu"
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here.")
    if getattr(arguments, "list_rows", False):
        case = Case(arguments.command, device=arguments.device, dtype=dtypes(arguments)[0])
        print("\n".join(row.name for row in all_rows(case)))
        return 0
    return finish(measure(arguments), arguments)


def quieten() -> None:
    """Libraries that explain themselves on every compilation and export."""
    warnings.filterwarnings("ignore")
    for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir", "torch._inductor", "torch._dynamo", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def dtypes(arguments: argparse.Namespace) -> list[str]:
    if getattr(arguments, "dtype", None):
        return arguments.dtype
    return ["float32", "bfloat16"] if arguments.device == "cpu" else ["bfloat16"]


def measure(arguments: argparse.Namespace) -> Report:
    deadline = Deadline(arguments.budget)
    report = Report(
        command=shlex.join(arguments.call),
        device=arguments.device,
        deadline=deadline,
        allocator=arguments.allocator,
    )
    alone = {"process": run_processors, "export": run_exports, "loader": run_loaders, "predict": run_predict}.get(
        arguments.command
    )
    if getattr(arguments, "loop", False):
        alone = run_loop
    if alone is not None:
        alone(arguments, report)
        return report
    # Before anything is measured, so that a mistake shows at once.
    if arguments.command == "growth":
        base = case_of(arguments, arguments.mode, dtypes(arguments)[0])
    else:
        planned = [(case, case and choose_rows(case, arguments.rows)) for case in cases(arguments)]
    with tqdm(total=len(dtypes(arguments)), desc="ceilings of this machine", leave=False) as bar:
        for dtype in dtypes(arguments):
            report.ceilings[dtype] = measure_ceilings(arguments.device, dtype)
            bar.update()
    if arguments.command == "all" and arguments.device != "cpu":
        report.first_steps = measure_first_steps(case_of(arguments, "train", dtypes(arguments)[0]))
        show(reports.first_steps_table(report.first_steps))
    runner = Runner(report.ceilings, deadline, arguments.seconds, arguments.rounds)
    if arguments.command == "growth":
        patterns = ["ours fused", "built-in eager"] if arguments.rows == ["default"] else arguments.rows
        runner.seconds = min(runner.seconds, 5.0)
        report.growth = measure_growth(base, patterns, runner)
        return report
    for case, rows in planned:
        if case is None:
            run_processors(arguments, report)
        else:
            report.comparisons.append(runner.compare(case, rows))
            show(reports.comparison_table(report.comparisons[-1]))
            write(report, arguments)  # a run that is cut off has lost the table it was at
    return report


def case_of(arguments: argparse.Namespace, mode: str, dtype: str) -> Case:
    batch_size = arguments.batch_size or BATCH_SIZES[arguments.device][mode]
    if mode == "latency" and arguments.command == "all":
        batch_size = 1
    return Case(mode, arguments.variant, dtype, batch_size, arguments.image_size, arguments.device)


def cases(arguments: argparse.Namespace) -> list[Case | None]:
    """In the order of their importance, for the budget may end before they do; None stands for the processors."""
    if arguments.command != "all":
        return [case_of(arguments, arguments.command, dtype) for dtype in dtypes(arguments)]
    modes = ("infer", "train", "latency")
    if arguments.device == "cpu":
        given = {(mode, dtype): case_of(arguments, mode, dtype) for mode in modes for dtype in dtypes(arguments)}
        order = [("infer", "float32"), ("infer", "bfloat16"), ("latency", "float32"), ("train", "float32")]
        return [*(given.pop(key) for key in order if key in given), None, *given.values()]
    found: list[Case | None] = [case_of(arguments, mode, dtype) for dtype in dtypes(arguments) for mode in modes]
    base = case_of(arguments, "infer", dtypes(arguments)[0])
    fewer = max(base.batch_size // 4, 1)
    others = [{"image_size": 2 * base.image_size + 64, "batch_size": fewer}]
    if arguments.variant != "tiny":
        others = [
            {"variant": "caformer_s18"},
            {"variant": VARIANTS[-1], "batch_size": fewer},
            *others,
            {"variant": "convformer_s18"},
        ]
    return [*found, *(base.change(mode=mode, **other) for other in others for mode in ("infer", "train")), None]


def run_processors(arguments: argparse.Namespace, report: Report) -> None:
    for size in SIZES:
        if report.deadline.left <= 0:
            return
        try:
            report.processing.append(
                measure_processors(
                    size, device=arguments.device, rounds=arguments.rounds, seconds=min(arguments.seconds, 15.0)
                )
            )
        except UserError as error:
            show(f"process: skipped, {error}")
            return
        show(reports.processing_table(report.processing[-1]))


def run_exports(arguments: argparse.Namespace, report: Report) -> None:
    base = Case("infer", arguments.variant, "float32", arguments.batch_size or 16, arguments.image_size)
    with tempfile.TemporaryDirectory(prefix="hf-poolformer-exports-") as folder:
        how = report.deadline, arguments.seconds, arguments.rounds
        report.exports = measure_exports(base, Path(folder), *how)


def run_loaders(arguments: argparse.Namespace, report: Report) -> None:
    report.loading = measure_loaders(
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        image_size=arguments.image_size,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )


def run_loop(arguments: argparse.Namespace, report: Report) -> None:
    case = case_of(arguments, "train", dtypes(arguments)[0])
    # The loader, the loop with photographs and the one without, and as long again to start and to warm up.
    seconds = min(arguments.seconds, max(report.deadline.left / 6, 1.0))
    report.loop = measure_loop(
        case, seconds=seconds, workers=arguments.num_workers, device_preprocessing=arguments.device_preprocessing
    )


def run_predict(arguments: argparse.Namespace, report: Report) -> None:
    case = case_of(arguments, "infer", dtypes(arguments)[0])
    report.predict = measure_predict(
        case,
        report.deadline,
        workers=arguments.num_workers,
        device_preprocessing=arguments.device_preprocessing,
        rounds=min(arguments.rounds, 5),
    )


def show(text: str) -> None:
    """Tables appear as they are finished, and once more, together, at the end."""
    tqdm.write(f"\n{text}", file=sys.stderr)


def finish(report: Report, arguments: argparse.Namespace) -> int:
    """Writes the files, prints the tables and says where things are."""
    written = write(report, arguments)
    print(f"\n{report.to_markdown()}")
    failures = report.failures()
    if failures:
        print("Failed:", *failures, sep="\n  ")
    if written:
        print(f"Written: {', '.join(map(str, written))}")
    return 1 if failures else 0


def write(report: Report, arguments: argparse.Namespace) -> list[Path]:
    """Writes the files that were asked for, and returns which."""
    written = reports.write(report, arguments.output) if arguments.output else []
    if arguments.json:
        reports.write_json(report, arguments.json)
        written.append(arguments.json)
    return written
