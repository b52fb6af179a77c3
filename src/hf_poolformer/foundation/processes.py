"""The processes of a run: how they start, what they agree on, and when they stop."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, str_to_bool

from .errors import UserError, one_line
from .folders import hold


# As gloo puts it, which has no exceptions of its own.
_LOST = r"gloo|Connection (closed|reset) by peer|Broken pipe|Timed out waiting"
LAUNCHER = "HF_POOLFORMER_LAUNCHER"  # process id of `accelerate launch`, for processes that are not its children


def start_cpu_processes() -> None:
    """Starts the processes that `accelerate launch --cpu --num_processes N` was asked for.

    accelerate (1.15) starts N processes on the CPU only through MPI; otherwise it starts one and says nothing. To be
    called first thing by a script; does nothing in any other situation, and does not return in this one: torchrun
    takes the place of this process.

    Raises:
        UserError: several processes were asked for in a way that leaves their number unknown here.
    """
    environment = os.environ
    alone = not any(
        name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    # accelerate names a meeting point exactly if more than one process was asked for.
    if not alone or "MASTER_ADDR" not in environment or not str_to_bool(environment.get("ACCELERATE_USE_CPU", "no")):
        return
    launch = psutil.Process(os.getppid()).cmdline()
    known = None
    if "launch" in launch:
        known, _ = launch_command_parser().parse_known_args(launch[launch.index("launch") + 1 :])
    if known is None or known.num_processes is None or (known.num_machines or 1) > 1:
        raise UserError(
            "accelerate starts several processes on CPUs through MPI only. On one machine give it --cpu "
            "--num_processes N, on several run this script with torchrun and ACCELERATE_USE_CPU=1."
        )
    processes = ["--standalone", "--nproc_per_node", str(known.num_processes)]
    environment[LAUNCHER] = str(os.getppid())
    program = sys.argv
    started_as = sys.modules["__main__"].__spec__
    if started_as is not None:  # python -m hf_poolformer train
        program = ["-m", started_as.name.removesuffix(".__main__"), *sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *processes, *program])


def processes() -> PartialState:
    """The processes of this run, as an `Accelerator` would find them; it takes over what is found here."""
    # Asked without it, a run of several processes on the CPU is as many runs of one.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def part() -> None:
    """Ends what the processes have in common, when there is nothing left to train; every process calls it."""
    processes().destroy_process_group()


def found_by_main(find: Callable[[], Any]) -> Any:
    """What the main process finds out, for all; every process must call it.

    Raises:
        UserError: in every process, where `find` raises one.
    """
    answer: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            answer[0] = find()
        except UserError as error:
            answer[1] = str(error)
    found, fault = broadcast_object_list(answer)
    if fault:
        raise UserError(fault)
    return found


def machines_without(path: Path) -> list[str]:
    """Names of the machines of this run on which a path is not there; every process must call it."""
    return sorted({name for name in gather_object([None if path.exists() else socket.gethostname()]) if name})


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """`folders.hold` for all processes of a run, of which the main one holds; every process must call it."""
    with contextlib.ExitStack() as held:
        found_by_main(lambda: held.enter_context(hold(folder)))
        yield


def alone_in_its_folder(train: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `train(settings, ...)` keep `settings.output_dir` for itself until it returns or fails."""

    @functools.wraps(train)
    def run(settings: Any, *values: Any, **named: Any) -> Any:
        with owned(Path(settings.output_dir)):
            return train(settings, *values, **named)

    return run


class Agreement:
    """Small integers that all processes reduce, on the host: no step waits for the GPU because of it."""

    def __init__(self, accelerator: Accelerator):
        self.group = None
        self.alone = accelerator.num_processes == 1
        if not self.alone and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")

    def minimum(self, *values: int) -> list[int]:
        """The smallest of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def total(self, *values: int) -> list[int]:
        """The sum of each value over all processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: tuple[int, ...], operation: dist.ReduceOp) -> list[int]:
        if self.alone:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, op=operation, group=self.group)
        return numbers.tolist()


@contextlib.contextmanager
def telling_of_lost_processes() -> Iterator[None]:
    """Turns what torch.distributed says when another process is gone, or does not answer, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search(_LOST, str(error)):
            raise
        raise UserError(
            f"another process of this run has died or does not answer: {one_line(error)}. The checkpoints are as they "
            "were: start all processes again with --resume_from_checkpoint latest."
        ) from error


class Stopped(SystemExit):
    """The run was asked to stop and has saved itself; its code is the shell's 128 + signal."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopSignal:
    """Notes SIGTERM and Ctrl-C so that the loop can finish its step; a second Ctrl-C leaves at once.

    A context manager; afterwards the handlers are what they were.

    `accelerate launch` does not pass SIGTERM on to a process on a single device, it just dies; its end therefore
    counts as SIGTERM.
    """

    def __init__(self) -> None:
        self.number = 0
        self._process = os.getpid()
        launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
        self._parent = os.getppid() if launched else None
        self._launcher = int(os.environ.get(LAUNCHER, 0))
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            # Python delivers signals to its main thread only, and lets nobody else install handlers.
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker just forked; it leaves the decision to the process that reads from it
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def check(self) -> int:
        """The signal that asks to stop, or 0."""
        orphaned = self._parent is not None and os.getppid() != self._parent
        if not self.number and (orphaned or (self._launcher and not psutil.pid_exists(self._launcher))):
            self.number = signal.SIGTERM
        return int(self.number)
