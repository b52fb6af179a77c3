"""The commands of `hf-poolformer`: a module each, with a `parser` and a `main`, and what all of them share.

    @command
    def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
        arguments = parser(prog).parse_args(argv)
        ...

Exit statuses: 0; 1 where the work was done and its outcome is bad; 2 for a mistake, explained in one line on stderr;
3 if a trained model could not be published; 4 if `inspect` found what it was told to fail on; 130 after Ctrl-C and 143
after SIGTERM.

Nothing here and nothing at the top of a command's module imports torch, transformers or what an extra installs:
`--help` appears at once, and a missing library is one readable line.
"""

from __future__ import annotations

import argparse
import errno
import functools
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..foundation.errors import UserError
from ..foundation.machine import cores
from ..foundation.names import near_names, printable
from ..foundation.redaction import redact


__all__ = ["CommandParser", "add_model_arguments", "command", "complain", "quieten", "reason"]

# What installs a library that a plain installation lacks: each library under the smallest extra that brings it.
EXTRAS = {
    "accelerate": "train",
    "codecarbon": "carbon",
    "datasets": "train",
    "evaluate": "train",
    "gradio": "app",
    "jinja2": "train",
    "matplotlib": "train",
    "nncf": "export",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "export",
    "optuna": "sweep",
    "peft": "lora",
    "pillow_heif": "heif",
    "psutil": "train",
    "pyarrow": "train",
    "pycocotools": "dense",
    "ray": "ray",
    "skimage": "benchmark",
    "sklearn": "demo",
    "tensorboard": "train",
    "tifffile": "multispectral",
    "timm": "benchmark",
    "torchmetrics": "train",
    "tqdm": "train",
    "trackio": "trackio",
    "yaml": "train",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: as if somebody had pressed Ctrl-C, but for the exit status."""


class CommandParser(argparse.ArgumentParser):
    """Reports mistakes as UserError, with the flag that was probably meant; shows the description as it is written."""

    def __init__(self, **options: object) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: object = None) -> tuple:
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        known = self.flags()
        strange = [text.lstrip("-").partition("=")[0] for text in self.given if re.match(r"--?[a-zA-Z]", text)]
        # A misspelt flag that is required is first of all missing.
        strange = [name for name in strange if name.replace("-", "_") not in known] if "arguments" in message else []
        near = [f"--{name}" for name in near_names(strange[0], known)] if strange else []
        hint = f"did you mean {' or '.join(near)}?" if near else f"{self.prog} --help shows what there is."
        if near and strange[0] not in message:
            hint = f"--{strange[0]} is none of them: {hint}"
        raise UserError(f"{message}; {hint}")

    def flags(self) -> list[str]:
        """Names of all flags, those of sub-commands too."""
        parsers = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        return [flag.lstrip("-") for parser in parsers for flag in parser._option_string_actions]


def add_model_arguments(
    parser: argparse.ArgumentParser, *, device: bool = True, dtype: bool = True, batch_size: int | None = None
) -> None:
    """The flags that every command with a model has, named alike: where the model comes from and what it runs on.

    Args:
        batch_size: the default of --batch_size; None for a command without one.
    """
    add = parser.add_argument
    if batch_size is not None:
        add("--batch_size", type=int, default=batch_size, help="images at once (default: %(default)s)")
    if device:
        add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: an accelerator if there is one)")
    if dtype:
        add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: %(default)s")
    add("--revision", default="main", help="branch, tag or commit of the model (default: %(default)s)")
    add("--token", help="Hub token; written nowhere (default: the one of `hf auth login`)")
    add("--cache_dir", help="where downloads are kept (default: the Hub's usual cache)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")


def quieten() -> None:
    """Keeps transformers' progress bars and warnings out of what a command prints."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Makes `main(argv, prog)` end in an exit status, whatever is expected to go wrong."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # names of files and classes may hold any byte
        keep_to_share()
        try:
            with sigterm_as_interrupt():
                status = main(argv, prog)
                sys.stdout.flush()  # here, where a closed pipe is still caught
                return status
        except KeyboardInterrupt as error:
            return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        except BrokenPipeError:
            # `hf-poolformer ... | head`: the interpreter would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except Exception as error:
            explained = reason(error)
            if explained is None:
                raise  # a fault of ours, which needs its traceback
            return complain(explained, argv, status=3 if is_a(error, "PublishError") else 2)

    return run


def keep_to_share() -> None:
    """Has PyTorch use as many threads as there are cores of ours, unless somebody has said how many.

    It starts one for each core of the machine. Where a container may use a part of them, threads spin, waiting for
    others, until its time is used up: two threads with half a core made S12 nine times slower.
    """
    torch = sys.modules.get("torch")  # is not imported for the help
    if torch is not None and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores():
        torch.set_num_threads(cores())


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that what is half written is cleared away.

    Commands and loops that have something to save meanwhile install a handler of their own.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # not a data worker just forked
            raise Terminated

    process = os.getpid()
    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread, the only one that signals reach
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def complain(message: str, argv: Sequence[str] | None = None, status: int = 2) -> int:
    """Prints `error: message` on stderr, without any token, and returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    secrets = [following for flag, following in itertools.pairwise(given) if is_token_flag(flag)]
    secrets += [text.partition("=")[2] for text in given if "=" in text and is_token_flag(text.partition("=")[0])]
    print(f"error: {redact(message, [*secrets, os.environ.get('HF_TOKEN')])}", file=sys.stderr)
    return status


def is_token_flag(text: str) -> bool:
    return text.replace("-", "_") in ("__token", "__hub_token")


def reason(error: BaseException) -> str | None:
    """What an expected error means, in one line; None for an unexpected one."""
    if is_a(error, "PublishError"):
        return str(error)  # has the command that goes on in a line of its own
    text = printable(" ".join(str(error).split()))
    if isinstance(error, UserError):
        return text
    if isinstance(error, ModuleNotFoundError) and error.name:
        library, importer = error.name.partition(".")[0], importer_of(error)
        if library in EXTRAS:
            return f"{library} is not installed: pip install 'hf-poolformer[{EXTRAS[library]}]'"
        if importer != "hf_poolformer":
            return f"{importer} needs {library}, which is not installed; another version of {importer} may not need it"
        return None
    if is_a(error, "OfflineModeIsEnabled"):
        return "HF_HUB_OFFLINE is set and this is not in the cache; unset it, or give a local folder"
    if is_a(error, "LocalTokenNotFoundError"):
        return "there is no Hub token; run `hf auth login` or set HF_TOKEN"
    if is_a(error, "HFValidationError"):
        return f"this is neither a folder nor a Hub id, which looks like user/name: {text}"
    if is_a(error, "HfHubHTTPError", "LocalEntryNotFoundError"):
        return f"the Hub does not give it: {text}"
    if is_a(error, "SafetensorError"):
        return f"the weights are damaged or cut off: {text}"
    if is_a(error, "OutOfMemoryError"):
        return "the device has not enough memory; try a smaller --batch_size or --dtype bfloat16"
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return "the disk is full"
        if error.filename is not None and error.strerror:
            return f"{error.filename}: {error.strerror}"
        if isinstance(error, ConnectionError | TimeoutError) or error.__class__.__module__.startswith("requests"):
            return f"the network cannot be reached: {text or type(error).__name__}"
    if is_a(error, "TransportError") and error.__class__.__module__.startswith("httpx"):
        return f"the network cannot be reached: {text or type(error).__name__}"
    return None


def importer_of(error: BaseException) -> str:
    """The library in which an import failed."""
    name, step = "hf_poolformer", error.__traceback__
    while step is not None:
        module = step.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        # The import machinery's own frames are not libraries, and the last library is the one that asked.
        name = name if module in ("", "importlib", "__main__") else module
        step = step.tb_next
    return name


def is_a(error: BaseException, *names: str) -> bool:
    """isinstance by the name of a class, for classes whose modules take seconds to import."""
    return any(kind.__name__ in names for kind in type(error).__mro__)
