"""`hf-poolformer benchmark`: speed next to every peer."""

from __future__ import annotations

import argparse
import ctypes.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..foundation.errors import UserError
from . import CommandParser, command, predict


COMMANDS = {
    "all": "a selection of everything, within the budget (default)",
    "infer": "forward, images per second",
    "train": "forward, backward and optimiser step; with --loop, the training loop and its bottleneck",
    "latency": "one call at a time, milliseconds",
    "process": "image processors, without decoding",
    "loader": "from JPEGs to augmented batches on one core, next to timm's and torchvision's loaders; CPU",
    "predict": "bulk prediction: reading, the model, both, next to transformers' pipeline",
    "growth": "how cost grows with batch, pixels and model",
    "tune": "which tiles the kernels are fastest with on this GPU, for the next time; not a comparison",
    "export": "exports, in 8 bits, too, next to transformers' exporters and runtimes of the built-in model; CPU",
}
EPILOGUE = """\
Before a row is timed it is checked against the built-in model; one that fails is reported, and the exit status is 1.

python scripts/benchmark.py                                       # a selection, under ten minutes on a CPU
python scripts/benchmark.py infer --dtype bfloat16 --rows 'ours*' 'built-in compile' OpenVINO
python scripts/benchmark.py latency --rows all --output benchmarks/latency
python scripts/benchmark.py growth --budget 300 --output benchmarks/growth
"""
DEVICE_PREPROCESSING = ("no", "augment", "decode", "auto")
DTYPES = ("float32", "bfloat16", "float16")
BUDGETS = {"all": 540.0, "growth": 300.0, "export": 360.0, "predict": 110.0}


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(
        prog=prog or "benchmark.py",
        description="Time PoolFormer next to the one built into transformers, timm's, onnxruntime and OpenVINO.",
        epilog=EPILOGUE,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, description in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=description, description=description.capitalize() + "."), name)
    return parser


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    add = parser.add_argument
    if command == "tune":
        parser.description = (
            "Times every tile that a kernel may take, in inference and training, and keeps the fastest in the user's "
            "cache, where models find them. Worth it on a GPU that is no H100, or for other sizes of image."
        )
    else:
        add("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    if command == "loader":
        add("--batch_size", type=int, default=128, help="default: 128")
        add("--image_size", type=int, default=224, help="pixels (default: 224)")
        add("--workers", type=int, default=0, help="processes that decode (default: 0, all in one process)")
    elif command != "process":
        add(
            "--variant",
            default="poolformer_s12",
            metavar="NAME",
            help="a published model (default: %(default)s); tiny is for dry runs",
        )
        add(
            "--dtype",
            nargs="+",
            choices=DTYPES,
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
        add("--loop", action="store_true", help="measure the training loop and its parts instead: where it is held up")
        add("--num_workers", type=int, help="processes that decode in the training loop; default: as train.py chooses")
        add(
            "--device_preprocessing",
            choices=[*DEVICE_PREPROCESSING],
            default="no",
            help="as of train.py, for the training loop (default: no)",
        )
    if command == "predict":
        add("--num_workers", type=int, help="processes that decode; default: as predict chooses")
        add("--device_preprocessing", **predict.DEVICE_PREPROCESSING)
    if command == "growth":
        add("--mode", choices=["infer", "train"], default="infer", help="default: infer")
    if command == "tune":
        add("--output", type=Path, metavar="FILE", help="keep the tiles here (default: in the user's cache)")
        return
    seconds = 60.0 if command == "loader" else 15.0
    add(
        "--seconds",
        type=float,
        default=seconds,
        help=f"of timing per table, or part of the loop (default: {seconds:.0f})",
    )
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


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Times. Exit status 1 if a row failed its gate, or the training loop was not steady."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        argv.insert(0, "all")
    arguments = parser(prog).parse_args(argv)
    arguments.call = [*(prog.split() if prog else ["python", "scripts/benchmark.py"]), *argv]
    for name in ("seconds", "rounds", "budget", "threads", "batch_size"):
        value = getattr(arguments, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be positive, not {value}.")
    if getattr(arguments, "workers", 0) < 0:
        raise UserError(f"--workers must not be negative, not {arguments.workers}.")
    if getattr(arguments, "loop", False) and arguments.dtype and len(arguments.dtype) > 1:
        raise UserError("--loop takes one --dtype.")
    if arguments.command == "tune":
        from ..benchmark.tuning import tune

        return tune(arguments)
    use_allocator(arguments.allocator)
    from ..benchmark.run import run

    return run(arguments)


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
