"""Turns, medians, spread, and the memory that a step needs beyond weights and images."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm


# Idle threads of one thread pool go on spinning for some milliseconds; the next contestant must not share a core with
# them.
PAUSE = 0.02


@dataclass
class Timing:
    """Seconds per step of one contestant, in the order they were measured."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the median: half of all rounds lie in a band this wide."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


class Deadline:
    """Seconds that are left of a budget; endless without one."""

    def __init__(self, seconds: float | None):
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    device: str,
    rounds: int,
    seconds: float = math.inf,
    turn: float = 0.0,
    together: bool = False,
    label: str = "",
) -> dict[str, Timing]:
    """
    Times steps in alternating order, so that a noisy minute hits all of them alike.

    In its turn a step runs once unobserved, which brings its weights back into the caches, and is then timed. Rows are
    expected to be compiled and warm.

    Args:
        rounds: turns of each.
        seconds: no round is begun after so long, as soon as there are three.
        turn: a turn holds as many timed steps as fill so many seconds, at most 50.
        together: time the steps of a turn as one, as throughput on a GPU wants it, which works on while the next step
            is being queued; else wait for each.
    """
    timings = {name: Timing() for name in steps}
    counts: dict[str, int] = {}
    start = time.monotonic()
    for index in tqdm(range(rounds), desc=label, leave=False, disable=not steps):
        if index >= 3 and time.monotonic() - start > seconds:
            break
        for name in list(steps) if index % 2 else list(reversed(steps)):
            step = steps[name]
            time.sleep(PAUSE)
            unobserved = _clock(step, 1, device)
            count = counts.setdefault(name, min(max(math.ceil(turn / max(unobserved, 1e-6)), 1), 50))
            if together:
                timings[name].seconds.append(_clock(step, count, device) / count)
            else:
                timings[name].seconds.extend(_clock(step, 1, device) for _ in range(count))
    return timings


def _clock(step: Callable[[], object], count: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - start


class WorkingMemory:
    """
    `with WorkingMemory(device) as memory: step()`, then `memory.bytes`: the peak beyond what was allocated before.

    On a GPU, what PyTorch's allocator counts. On the CPU, growth of the resident set without the pages of files
    (program code), from Linux's high-water mark; memory that the process holds but does not use is given back first,
    so that it counts when it is used again. None where the system cannot tell.
    """

    def __init__(self, device: str):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> WorkingMemory:
        gc.collect()
        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            _give_back()
            self._reset = _reset_peak()
            self._before = _status()
        return self

    def __exit__(self, *error) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        after = _status()
        if self._reset and after and self._before:
            files = after["RssFile"] - self._before["RssFile"]
            self.bytes = max(after["VmHWM"] - self._before["VmRSS"] - files, 0)


def _give_back() -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status() -> dict[str, int]:
    """Sizes of this process in bytes, by their names in /proc/self/status; empty elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in fields}
