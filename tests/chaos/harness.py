"""Processes to be killed: forked from one that has imported everything, so that a start costs tenths of a second."""

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from multiprocessing import get_context, set_start_method
from pathlib import Path


ENOUGH = 900  # seconds for one start; it takes seconds where nothing else runs
PRELOADED = [
    "torch",
    "torchao.quantization",  # which transformers would import in each of them
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "datasets",
    "transformers",
    "accelerate",
    "hf_poolformer",
    "hf_poolformer.training.loop",
    "hf_poolformer.training.preparation",
    "hf_poolformer.prediction",
    "harness",
]

# As torchrun says it to a process; set in each rank, never in the fork server.
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")


class Job:
    """One start of a function in one or several processes, with their output in one file each."""

    def __init__(self, context, function, arguments: tuple, log: Path, processes: int = 1):
        port = free_port() if processes > 1 else None
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(processes)]
        self.processes = [
            context.Process(target=_run, args=(function, arguments, self.logs[rank], rank, processes, port))
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes, None for those that still run after this time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def kill(self, ranks: list[int] | None = None, workers: bool = True) -> None:
        """SIGKILL to the ranks (all if None), and to their data workers unless these are to notice by themselves."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            process = self.processes[rank]
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
                if workers:
                    os.killpg(process.pid, signal.SIGKILL)
        for rank in range(len(self.processes)) if ranks is None else ranks:
            self.processes[rank].join()

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())


def make_context():
    """Of multiprocessing: a fork server that has imported everything a run needs."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _run(function, arguments, log: Path, rank: int, processes: int, port: int | None) -> None:
    os.setpgid(0, 0)  # its data workers are killed with it
    set_start_method("fork", force=True)  # or each data worker would have a fork server of its own to wait for
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if processes > 1:
        values = (rank, rank, processes, processes, "127.0.0.1", port, "true")
        os.environ.update(dict(zip(_RANK, map(str, values), strict=True)))
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        function(*arguments)
    except SystemExit as leaving:
        code = leaving.code or 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train_with(settings: str) -> None:
    """Trains with the settings in this JSON."""
    from hf_poolformer.settings.training import TrainingSettings
    from hf_poolformer.training.loop import train

    train(TrainingSettings.from_recipe("demo", **json.loads(settings)))


def train_on_a_full_disk(settings: str, after: int) -> None:
    """As `train_with`; each checkpoint after the first few finds no room for a file of more than 20 kB."""
    import resource

    from hf_poolformer.training import checkpoints

    write, count = checkpoints.write, itertools.count()

    def limited(*arguments, **named):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if next(count) >= after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return write(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    checkpoints.write = limited
    train_with(settings)


def train_with_a_mad_clock(settings: str) -> None:
    """As `train_with`; the time of day jumps by up to ten years in either direction whenever somebody looks."""
    import random
    import time

    dice, now = random.Random(0), time.time
    time.time = lambda: now() + dice.uniform(-3e8, 3e8)
    time.time_ns = lambda: int(time.time() * 1e9)
    train_with(settings)


def predict_with(arguments: str) -> None:
    """Predicts with the arguments in this JSON."""
    from hf_poolformer.prediction import predict

    print(predict(**json.loads(arguments)))
