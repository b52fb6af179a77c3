"""`--learning_rate auto`: a range test (arXiv 1506.01186, section 3.3) on the first batches of the run.

The learning rate rises from step to step, always by the same factor, until the loss explodes. The one that is chosen
is a tenth of that at which the smoothed loss is lowest, as in fastai: there the loss still falls, and fast. Afterwards
model, optimiser, random generators and data are as they were.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..foundation.errors import UserError
from ..foundation.figures import new_figure, save_figure
from ..foundation.files import best_effort, write_json
from ..foundation.processes import Stopped
from .checkpoints import Progress, TrainingState, random_states, set_random_states
from .optimisation import make_schedule


if TYPE_CHECKING:
    from .loop import Run


FILE = "learning_rate_range_test"
LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 100
# The test ends where the loss, averaged over about as many steps as this decay says, is so many times the lowest.
DECAY, EXPLODED = 0.9, 4.0
SMOOTHING = 3.0  # standard deviation, in steps, of the weights that smooth the curve; towards both sides
PART = 0.1  # of the learning rate at the lowest loss
LEAST_FALL = 0.02  # of the loss, or nothing was learnt
ADVICE = "Give a number with --learning_rate; the recipe's own is often good. The curve is in"


@dataclass
class Curve:
    """Losses of steps with rising learning rates, means over all images of a step.

    Attributes:
        exploded: the test has ended where it should; otherwise the loss still bore the highest rate.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    exploded: bool = False

    def smoothed(self) -> np.ndarray:
        """The losses, each averaged with its neighbours by a bell of weights."""
        places = np.arange(len(self.losses))
        weights = np.exp(-(((places[:, None] - places) / SMOOTHING) ** 2) / 2)
        return weights @ np.array(self.losses) / weights.sum(1)

    def choice(self) -> tuple[float | None, str]:
        """A tenth of the rate at which the smoothed loss is lowest, to two digits; or None, and why there is none."""
        losses = self.smoothed()
        if not len(losses):
            return None, "the loss is not finite at the lowest learning rate already"
        lowest = int(losses.argmin())
        fall = losses[0] - losses[lowest]
        noise = (np.array(self.losses) - losses)[: lowest + 1].std()  # beyond it is the explosion
        if fall < max(LEAST_FALL * abs(losses[0]), noise):
            return None, f"the loss hardly falls at any learning rate: from {losses[0]:.4g} to {losses[lowest]:.4g}"
        if lowest == len(losses) - 1 and not self.exploded:
            return None, f"the loss still falls at the highest learning rate, {self.rates[-1]:.2g}"
        rate = PART * self.rates[lowest]
        if rate < LOWEST:
            return None, f"the loss rises from a learning rate of {self.rates[lowest]:.2g} on"
        return float(f"{rate:.2g}"), ""


def choose_learning_rate(run: Run, step: Callable[[Run, list[dict[str, Any]]], torch.Tensor]) -> float:
    """The peak learning rate of a run that has not begun; every process must call it, and gets the same.

    Its curve is left in the output folder, as a picture and as JSON.

    Args:
        step: the loop's own, of gradients and optimiser.

    Raises:
        UserError: the curve does not say which.
        Stopped: the run was told to stop.
    """
    curve = measure(run, step)
    rate, fault = curve.choice()
    folder = run.reports.folder
    if run.accelerator.is_main_process:
        write_curve(folder, curve, rate)
        if rate is not None:
            count = len(curve.losses)
            run.bar.write(f"learning_rate auto: {rate:g} (range test of {count} steps, {folder / FILE}.png).")
    if rate is None:
        raise UserError(f"--learning_rate auto: {fault}. {ADVICE} {folder / FILE}.png")
    return rate


def measure(run: Run, step: Callable[[Run, list[dict[str, Any]]], torch.Tensor]) -> Curve:
    """The curve of a range test, on the batches that `run.train_loader` gives first."""
    curve, average = Curve(), 0.0
    best = math.inf
    with leaving_no_trace(run.state) as state:
        trial = dataclasses.replace(run, state=state)
        run.model.train()
        with contextlib.closing(windows(run)) as batches:
            for number, (rate, window) in enumerate(zip(np.geomspace(LOWEST, HIGHEST, STEPS), batches, strict=False)):
                for group in state.optimizer.param_groups:
                    group["lr"] = float(rate) * group["lr_scale"]
                loss = run.accelerator.reduce(step(trial, window)[0], "mean").item()
                average = DECAY * average + (1 - DECAY) * loss
                recent = average / (1 - DECAY ** (number + 1))
                if not math.isfinite(loss):
                    curve.exploded = True
                    break
                curve.rates.append(float(rate))
                curve.losses.append(loss)
                best = min(best, recent)
                if recent > best + (EXPLODED - 1) * abs(best):
                    curve.exploded = True
                    break
    return curve


def windows(run: Run) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of one step after the other, the data from its start again where it ends."""
    for epoch in itertools.count():
        run.train_loader.set_epoch(epoch)
        batches, steps = iter(run.train_loader), 0
        while True:
            window = list(itertools.islice(batches, run.accumulation))
            count, stop = run.agreement.minimum(len(window), -run.stop.check())
            if stop:
                run.bar.close()
                run.accelerator.print(f"Stopped by signal {-stop} before the first step: there is nothing to save.")
                raise Stopped(-stop)
            if not count:
                break
            steps += 1
            yield window[:count]
        if not steps:
            raise UserError(
                "some process has no full batch of training images: use fewer processes or smaller batches."
            )


@contextlib.contextmanager
def leaving_no_trace(state: TrainingState) -> Iterator[TrainingState]:
    """What may be trained in the place of `state`, which is afterwards as it was: not averaged, and by no schedule."""
    generators, optimizer = random_states(), copy.deepcopy(state.optimizer.state_dict())
    scaler = state.accelerator.scaler
    scale = None if scaler is None else scaler.state_dict()
    tensors = [*state.model.parameters(), *state.model.buffers()]
    kept = [tensor.detach().clone() for tensor in tensors]
    still = types.SimpleNamespace(step=lambda: None)
    try:
        yield dataclasses.replace(state, scheduler=still, ema=None, progress=Progress())
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        state.optimizer.zero_grad()
        state.optimizer.load_state_dict(optimizer)
        if scaler is not None:
            scaler.load_state_dict(scale)
        set_random_states(generators)


def set_learning_rate(run: Run, rate: float) -> None:
    """Gives a run that has not begun another peak learning rate, and the course that belongs to it."""
    optimizer = run.state.optimizer.optimizer  # accelerate's has it
    for group in optimizer.param_groups:
        del group["initial_lr"]
        group["lr"] = rate * group["lr_scale"]
    schedule = make_schedule(optimizer, run.settings, rate, run.total_steps, run.epochs)
    run.state.scheduler = run.accelerator.prepare(schedule)
    run.learning_rate = rate


def write_curve(folder: Path, curve: Curve, rate: float | None) -> None:
    """The curve as JSON and PNG."""
    smoothed = curve.smoothed().tolist()
    facts = {"learning_rate": rate, "rates": curve.rates, "losses": curve.losses, "smoothed_losses": smoothed}
    write_json(folder / f"{FILE}.json", facts)
    with best_effort("drawing the range test"):
        figure, axes = new_figure((6, 4))
        axes.plot(curve.rates, curve.losses, linewidth=0.7, alpha=0.5, label="loss")
        axes.plot(curve.rates, smoothed, label="smoothed")
        if rate is not None:
            axes.axvline(rate, linestyle="--", color="black", label=f"chosen: {rate:g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Range test")
        axes.legend()
        axes.grid(alpha=0.3)
        save_figure(figure, folder / f"{FILE}.png")
