"""`hf-poolformer COMMAND ...`: knows what commands there are, and imports the one that is called.

A module beside the package and not in it: importing the package brings torch and transformers, which take seconds, and
`hf-poolformer --help` should not.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec
from pathlib import Path


COMMANDS = {
    "train": "train or fine-tune a classifier, segmenter or detector",
    "inspect": "look at a dataset: classes, copies, leaks, broken images",
    "evaluate": "measure a model on labelled or annotated images",
    "compare": "tell which of two models is better, on which images, and whether by chance",
    "predict": "label images, or compute their features, into a table",
    "explain": "show what in an image speaks for a class",
    "convert": "read official, mmdet, mmseg and timm checkpoints, or write them",
    "export": "write ONNX or OpenVINO files, and compare them with the model",
    "publish": "put a model or a dataset on the Hub, and verify it",
    "benchmark": "time the model next to every peer",
    "app": "try a model in the browser",
    "train-dense": "train a segmenter or a detector",
    "sweep": "try settings of a training run, and find those that work best",
    "ablate": "rerun the paper's ablation table on any dataset",
    "table": "rebuild the papers' comparison tables from running models",
    "env": "versions, devices and kernels, to paste into an issue",
}
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit statuses are those of the commands; 2 for a command that does not exist."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name, *rest = argv or ["--help"]
    if name in (*HELP, "help"):
        if not rest or rest[0] not in COMMANDS:
            show(usage())
            return 0
        name, rest = rest[0], ["--help"]
    if name in ("--version", "-V"):
        show(f"hf-poolformer {installed_version()}")
        return 0
    name = name.replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "hf-poolformer --help shows what there is."
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    if any(word in HELP for word in rest):
        without_importing_the_package()
    try:
        module = importlib.import_module(f"hf_poolformer.commands.{name.replace('-', '_')}")
    except ImportError as error:
        if error.name != "torchvision" or isinstance(error, ModuleNotFoundError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return module.main(rest, prog=f"hf-poolformer {name}")


def show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # `hf-poolformer --help | head -1`: the interpreter would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: hf-poolformer COMMAND [ARGUMENTS]",
            "",
            "PoolFormer and the MetaFormer family: train, evaluate, use and publish them.",
            "",
            *(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()),
            "",
            "hf-poolformer COMMAND --help shows what a command takes, hf-poolformer --version the version.",
            "On several devices: accelerate launch -m hf_poolformer train ... (evaluate, predict, ... likewise).",
        ]
    )


def installed_version() -> str:
    try:
        return version("hf-poolformer")
    except PackageNotFoundError:
        return "(not installed)"


def without_importing_the_package() -> None:
    """Puts off the package's `__init__`, which imports every model, until somebody asks for a name in it.

    The modules of the commands import nothing heavy themselves, so that only this stands between a person and the
    help. For showing the help only: what works with models counts on the package having registered its classes.
    """
    if "hf_poolformer" in sys.modules:
        return
    spec = find_spec("hf_poolformer")
    module = module_from_spec(spec)

    def load(name: str) -> object:
        del module.__getattr__
        spec.loader.exec_module(module)
        return getattr(module, name)

    module.__getattr__ = load
    sys.modules["hf_poolformer"] = module


def run_script(file: str) -> None:
    """Runs the command that a file of a checkout is named after: `accelerate launch scripts/train.py ...`."""
    # Python looks for modules beside the script first, where evaluate.py would hide the library of that name.
    script = Path(file).resolve()
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != script.parent]
    sys.exit(importlib.import_module(f"hf_poolformer.commands.{script.stem}").main())


if __name__ == "__main__":
    sys.exit(main())
