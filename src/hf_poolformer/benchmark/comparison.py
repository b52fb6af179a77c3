"""One case, all contestants: build, check, measure memory, then time in turns."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..foundation.timing import Deadline, Timing, WorkingMemory, take_turns
from . import gate
from .case import Case
from .floor import Ceilings, floor_seconds
from .rows import Contestant, Entry, Unavailable, Weights, build, make_weights


@dataclass
class Result:
    """
    What came out for one row. `status` is "passed", "failed" (the gate or an error, see `note`) or "skipped".

    `working_memory` is bytes beyond weights and images, `floor_share` the floor's seconds over the row's; the two
    ratios are speeds, so above 1 is faster.
    """

    name: str
    library: str
    status: str = "skipped"
    note: str = ""
    logits_error: float | None = None
    gradient_error: float | None = None
    seconds: float | None = None
    spread: float | None = None
    images_per_second: float | None = None
    working_memory: int | None = None
    floor_share: float | None = None
    times_built_in_eager: float | None = None
    times_fastest_peer: float | None = None
    rounds: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """A case with its results, in the order of the rows."""

    case: Case
    results: list[Result]
    floor_seconds: float | None = None

    @property
    def title(self) -> str:
        return self.case.title


class Runner:
    """
    Runs comparisons one after another within a common budget.

    Args:
        ceilings: of the device, per dtype; without them no share of the floor is reported.
        deadline: when it has passed, rows are skipped; before, rows whose compilation would not fit.
        seconds: of timing per comparison.
        rounds: most turns of each row.
    """

    def __init__(self, ceilings: dict[str, Ceilings], deadline: Deadline, seconds: float, rounds: int):
        self.ceilings = ceilings
        self.deadline = deadline
        self.seconds = seconds
        self.rounds = rounds
        # Seconds per block of the deepest compilation so far, by mode; guesses until one was seen.
        self._compilation = {"infer": 3.0, "latency": 3.0, "train": 7.0}

    def compare(self, case: Case, rows: Sequence[Entry]) -> Comparison:
        """Every row gets a result. Nothing of a row that fails is timed; the others go on."""
        weights = make_weights(case.config())
        images, labels = case.batch()
        standards: dict[bool, gate.Standard] = {}
        results, steps = [], {}
        for row in tqdm(rows, desc=f"{case.title}: checking", leave=False):
            result = Result(row.name, row.library)
            results.append(result)
            if self.deadline.left <= self._needs(row, case):
                result.note = "no time left in the budget"
                continue
            try:
                # Autotuning and export print what they do.
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    steps[row.name] = self._admit(row, case, weights, images, labels, standards, result)
            except Unavailable as error:
                result.note = str(error)
            except torch.cuda.OutOfMemoryError:
                result.note = "out of memory"
            except _NotAdmitted:
                pass
            except Exception as error:  # whatever a foreign library raises belongs into the report, not on the screen
                logging.getLogger(__name__).debug("%s failed", row.name, exc_info=True)
                result.status, result.note = "failed", f"{type(error).__name__}: {_first_line(error)}"
        standards.clear()
        # What compilations have left behind is not to be searched for garbage in everybody's turns.
        gc.collect()
        gc.freeze()
        timings = take_turns(
            steps,
            device=case.device,
            rounds=self.rounds,
            seconds=min(self.seconds, max(self.deadline.left, 0.0)),
            turn=min(0.2, self.seconds / 20),
            together=case.device != "cpu" and case.mode != "latency",
            label=f"{case.title}: timing",
        )
        comparison = Comparison(case, results)
        if case.dtype in self.ceilings and case.is_poolformer:  # whose operations the floor counts
            comparison.floor_seconds = floor_seconds(case, self.ceilings[case.dtype])
        summarise(comparison, timings)
        steps.clear()
        release(case.device)
        return comparison

    def _needs(self, row: Entry, case: Case) -> float:
        """Seconds that must be left for the row: of its compilation, roughly, and for the timing of everybody."""
        if not row.compiled:
            return 0.0
        factor = 2.0 if row.how == "max-autotune" else 1.0
        return factor * sum(case.config().depths) * self._compilation[case.mode] + self.seconds

    def _admit(
        self,
        row: Entry,
        case: Case,
        weights: Weights,
        images: torch.Tensor,
        labels: torch.Tensor,
        standards: dict[bool, gate.Standard],
        result: Result,
    ) -> Callable[[], Any]:
        contestant = build(row, case, weights)
        if contestant.pools_first not in standards:
            standards[contestant.pools_first] = gate.standard(case, weights, images, labels, contestant.pools_first)
        right = standards[contestant.pools_first]
        batch = contestant.prepare(images)
        if row.how != "eager":
            start = time.perf_counter()
            check(contestant, case, batch, labels, right, result)
            if row.compiled:
                spent = (time.perf_counter() - start) / sum(case.config().depths)
                self._compilation[case.mode] = spent / (2.0 if row.how == "max-autotune" else 1.0)
        step = make_step(contestant, case, batch, labels)
        with WorkingMemory(case.device) as memory:
            if row.how == "eager":
                check(contestant, case, batch, labels, right, result)
            step()
        result.working_memory = memory.bytes
        result.status = "passed"
        return step


class _NotAdmitted(Exception):
    """The gate stays shut; the result says why."""


def check(
    contestant: Contestant, case: Case, batch: Any, labels: torch.Tensor, right: gate.Standard, result: Result
) -> None:
    """
    Writes the errors into the result; raises unless they are within the tolerances.

    Twice: what is recorded or compiled in a first call computes only in the next ones, which are those that are timed.
    """
    for _ in range(2):
        _check_once(contestant, case, batch, labels, right, result)


def _check_once(
    contestant: Contestant, case: Case, batch: Any, labels: torch.Tensor, right: gate.Standard, result: Result
) -> None:
    most_logits, most_gradients = gate.tolerances(case)
    with torch.set_grad_enabled(case.mode == "train"):
        logits = torch.as_tensor(contestant(batch))
    result.logits_error = gate.logits_error(logits.detach(), right.logits)
    faults = []
    # Written so that NaN does not pass.
    if not result.logits_error <= most_logits:
        faults.append(f"logits are off by {result.logits_error:.1e}, allowed {most_logits:.0e}")
    if right.gradients is not None:
        F.cross_entropy(logits.float(), labels).backward()
        result.gradient_error = gate.gradient_error(contestant.named_gradients(), right.gradients)
        contestant.module.zero_grad(set_to_none=True)
        if not result.gradient_error <= most_gradients:
            faults.append(f"gradients are off by {result.gradient_error:.1e}, allowed {most_gradients:.0e}")
    if faults:
        result.status, result.note = "failed", "; ".join(faults)
        raise _NotAdmitted


def make_step(contestant: Contestant, case: Case, batch: Any, labels: torch.Tensor) -> Callable[[], Any]:
    """What is timed: a forward, or forward, backward and the step of the same optimiser for everybody."""
    if case.mode != "train":

        def infer() -> None:
            with torch.inference_mode():
                contestant(batch)

        return infer

    optimizer = torch.optim.AdamW(contestant.module.parameters(), lr=1e-6, fused=True)

    def train() -> None:
        F.cross_entropy(contestant(batch).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def summarise(comparison: Comparison, timings: dict[str, Timing]) -> None:
    """Fills in what follows from the seconds."""
    by_name = {result.name: result for result in comparison.results}
    for name, timing in timings.items():
        result = by_name[name]
        result.seconds, result.spread, result.rounds = timing.median, timing.spread, timing.seconds
        result.images_per_second = comparison.case.batch_size / timing.median
        if comparison.floor_seconds is not None:
            result.floor_share = comparison.floor_seconds / timing.median
    eager = by_name.get("built-in eager NCHW") or by_name.get("built-in eager")
    peers = [by_name[name].seconds for name in timings if by_name[name].library in ("built-in", "timm")]
    for name in timings:
        result = by_name[name]
        if eager is not None and eager.seconds:
            result.times_built_in_eager = eager.seconds / result.seconds
        if peers:
            result.times_fastest_peer = min(peers) / result.seconds


def release(device: str) -> None:
    """Gives back what a comparison held, compiled code too."""
    gc.unfreeze()
    torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
