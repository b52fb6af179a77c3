"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import ctypes.util
import logging
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from hf_poolformer.foundation.errors import UserError

from ..commands import CommandParser
from ..foundation.strict_json import to_json
from . import report as reports
from .case import DTYPES, Case, variants
from .comparison import Runner
from .floor import measure_ceilings
from .growth import VARIANTS, measure_growth
from .loop import measure_loop
from .processors import SIZES, measure_processors
from .report import Report
from .rows import Unavailable, all_rows, choose_rows
from .timing import Deadline


COMMANDS = {
    "all": "a selection of everything, within the budget (default)",
    "infer": "forward, images per second",
    "train": "forward, backward and optimiser step; with --loop, the training loop and its bottleneck",
    "latency": "one call at a time, milliseconds",
    "process": "image processors, without decoding",
    "growth": "how cost grows with batch, pixels and model",
    "export": "exports, in 8 bits, too, next to OpenVINO and onnxruntime of the built-in model; CPU",
}
EPILOGUE = """\
Before a row is timed it is checked against the built-in model; one that fails is reported, and the exit status is 1.

python scripts/benchmark.py                                       # a selection, under ten minutes on a CPU
python scripts/benchmark.py infer --dtype bfloat16 --rows 'ours*' 'built-in compile' OpenVINO
python scripts/benchmark.py latency --rows all --output benchmarks/latency
python scripts/benchmark.py growth --budget 300 --output benchmarks/growth
"""
# Batches of the modes where --batch_size does not say.
BATCH_SIZES = {"cpu": {"infer": 16, "train": 16, "latency": 1}, "cuda": {"infer": 256, "train": 256, "latency": 1}}
BUDGETS = {"all": 540.0, "growth": 300.0, "export": 240.0}


def parse(argv: Sequence[str], prog: str | None = None) -> argparse.Namespace:
    """The arguments; without a command, "all" is meant."""
    parser = CommandParser(
        prog=prog or "benchmark.py",
        description="Time PoolFormer next to the one built into transformers, timm's, onnxruntime and OpenVINO.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, description in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=description, description=description.capitalize() + "."), name)
    argv = list(argv)
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        argv.insert(0, "all")
    arguments = parser.parse_args(argv)
    arguments.call = [*(prog.split() if prog else ["python", "scripts/benchmark.py"]), *argv]
    return arguments


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add(
        "--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu", help="default: a GPU if there is one"
    )
    if command != "process":
        add(
            "--variant",
            choices=variants(),
            default="poolformer_s12",
            metavar="NAME",
            help="default: poolformer_s12; tiny is for dry runs",
        )
        add(
            "--dtype",
            nargs="+",
            choices=list(DTYPES),
            metavar="DTYPE",
            help=f"{', '.join(DTYPES)}; default: float32 and bfloat16 on a CPU, bfloat16 on a GPU",
        )
        add("--batch_size", type=int, help="default: 16 on a CPU, 256 on a GPU, 1 for latency")
        add("--image_size", type=int, default=224, help="pixels (default: 224)")
    if command in ("infer", "train", "latency", "growth", "all"):
        add(
            "--rows",
            nargs="+",
            default=["default"],
            metavar="ROW",
            help="default, all, or names and patterns; --list_rows shows them",
        )
    if command in ("infer", "train", "latency"):
        add("--list_rows", action="store_true", help="show the names of the rows and stop")
    if command == "train":
        add("--loop", action="store_true", help="measure the training loop instead: synthetic and streamed images")
    if command in ("train", "all"):
        add("--num_workers", type=int, help="processes that decode in the training loop; default: as train.py chooses")
    if command == "growth":
        add("--mode", choices=["infer", "train"], default="infer", help="default: infer")
    add("--seconds", type=float, default=15.0, help="of timing per table (default: 15)")
    add("--rounds", type=int, default=15, help="most turns of each row (default: 15)")
    budget = BUDGETS.get(command)
    said = f"{budget:.0f} seconds" if budget else "none"
    add(
        "--budget", type=float, default=budget, help=f"seconds in all; what does not fit is left out (default: {said})"
    )
    add("--threads", type=int, help="CPU threads of everybody (default: PyTorch's choice)")
    add(
        "--allocator",
        choices=["system", "keep", "jemalloc"],
        default="system",
        help="of everybody: the C library's, the same told to keep its pages (glibc), or jemalloc, if installed",
    )
    add("--output", type=Path, metavar="PREFIX", help="write PREFIX.json, PREFIX.md and PREFIX.png")
    add("--json", type=Path, metavar="FILE", help="write the figures here")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exit status: 0, 1 if a row failed its gate, 2 for a mistake in the arguments, 130 after Ctrl-C."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv, prog)
        quieten()
        check(arguments)
        if getattr(arguments, "list_rows", False):
            case = Case(arguments.command, device=arguments.device, dtype=dtypes(arguments)[0])
            print("\n".join(row.name for row in all_rows(case)))
            return 0
        use_allocator(arguments.allocator)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        if arguments.command == "export":
            return run_exports(arguments)
        report = run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return finish(report, arguments)


def quieten() -> None:
    """Libraries that explain themselves on every compilation and export."""
    warnings.filterwarnings("ignore")
    for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir", "torch._inductor", "torch._dynamo", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here.")
    for name in ("seconds", "rounds", "budget", "threads", "batch_size"):
        value = getattr(arguments, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be positive, not {value}.")
    if getattr(arguments, "loop", False) and len(dtypes(arguments)) > 1 and arguments.dtype:
        raise UserError("--loop takes one --dtype.")


def dtypes(arguments: argparse.Namespace) -> list[str]:
    if getattr(arguments, "dtype", None):
        return arguments.dtype
    return ["float32", "bfloat16"] if arguments.device == "cpu" else ["bfloat16"]


def use_allocator(name: str) -> None:
    """Starts this program again under another allocator, which is chosen when a process starts.

    Raises:
        UserError: jemalloc is not installed.
    """
    if name == "system" or os.environ.get("HF_POOLFORMER_ALLOCATOR") == name:
        return
    settings = {"HF_POOLFORMER_ALLOCATOR": name}
    if name == "keep":
        # Large arrays come from the heap, which is not given back, so that their pages are mapped once.
        settings |= {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    else:
        library = ctypes.util.find_library("jemalloc")
        if library is None:
            raise UserError("--allocator jemalloc: it is not installed; on Debian: apt install libjemalloc2")
        settings["LD_PRELOAD"] = library
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **settings})


def run(arguments: argparse.Namespace) -> Report:
    """Everything that was asked for."""
    deadline = Deadline(arguments.budget)
    report = Report(
        command=shlex.join(arguments.call),
        device=arguments.device,
        deadline=deadline,
        allocator=arguments.allocator,
    )
    if arguments.command == "process":
        run_processors(arguments, report)
        return report
    if getattr(arguments, "loop", False):
        run_loop(arguments, report)
        return report
    with tqdm(total=len(dtypes(arguments)), desc="ceilings of this machine", leave=False) as bar:
        for dtype in dtypes(arguments):
            report.ceilings[dtype] = measure_ceilings(arguments.device, dtype)
            bar.update()
    runner = Runner(report.ceilings, deadline, arguments.seconds, arguments.rounds)
    if arguments.command == "growth":
        patterns = ["ours fused", "built-in eager"] if arguments.rows == ["default"] else arguments.rows
        runner.seconds = min(runner.seconds, 5.0)
        base = case_of(arguments, arguments.mode, dtypes(arguments)[0])
        report.growth = measure_growth(base, patterns, runner)
        return report
    for case in cases(arguments):
        if case is None:
            run_processors(arguments, report)
        else:
            report.comparisons.append(runner.compare(case, choose_rows(case, arguments.rows)))
            show(reports.comparison_table(report.comparisons[-1]))
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
    for mode in ("infer", "train"):
        if arguments.variant != "tiny":
            found.append(base.change(mode=mode, variant=VARIANTS[-1], batch_size=fewer))
        found.append(base.change(mode=mode, image_size=2 * base.image_size + 64, batch_size=fewer))
    return [*found, None]


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
        except Unavailable as error:
            show(f"process: skipped, {error}")
            return
        show(reports.processing_table(report.processing[-1]))


def run_exports(arguments: argparse.Namespace) -> int:
    """Measures, writes and prints by itself: its rows are formats and precisions, not implementations."""
    from . import exports

    if arguments.device != "cpu" or arguments.dtype:
        raise UserError("export compares on the CPU, in float32, bfloat16 and int8: leave --device and --dtype out.")
    deadline = Deadline(arguments.budget)
    report = Report(shlex.join(arguments.call), "cpu", deadline, allocator=arguments.allocator)
    base = Case("infer", arguments.variant, "float32", arguments.batch_size or 16, arguments.image_size)
    try:
        with tempfile.TemporaryDirectory(prefix="hf-poolformer-exports-") as folder:
            tables = exports.measure_exports(base, Path(folder), deadline, arguments.seconds, arguments.rounds)
    except Unavailable as error:
        raise UserError(str(error)) from error
    text, figures = exports.render(report, base, tables)
    written = {arguments.json: "json"} if arguments.json else {}
    if arguments.output:
        written |= {arguments.output.with_suffix(f".{kind}"): kind for kind in ("json", "md")}
    for path, kind in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(figures, indent=2) + "\n" if kind == "json" else text, encoding="utf-8")
    print(text)
    failed = exports.failures(tables)
    if failed:
        print("Failed:", *failed, sep="\n  ")
    if written:
        print(f"Written: {', '.join(map(str, written))}")
    return 1 if failed else 0


def run_loop(arguments: argparse.Namespace, report: Report) -> None:
    case = case_of(arguments, "train", dtypes(arguments)[0])
    try:
        report.loop = measure_loop(case, workers=arguments.num_workers)
    except Unavailable as error:
        raise UserError(str(error)) from error


def show(text: str) -> None:
    """Tables appear as they are finished, and once more, together, at the end."""
    tqdm.write(f"\n{text}", file=sys.stderr)


def finish(report: Report, arguments: argparse.Namespace) -> int:
    """Writes the files, prints the tables and says where things are."""
    written = reports.write(report, arguments.output) if arguments.output else []
    if arguments.json:
        reports.write_json(report, arguments.json)
        written.append(arguments.json)
    print(f"\n{report.to_markdown()}")
    failures = report.failures()
    if failures:
        print("Failed:", *failures, sep="\n  ")
    if written:
        print(f"Written: {', '.join(map(str, written))}")
    return 1 if failures else 0
