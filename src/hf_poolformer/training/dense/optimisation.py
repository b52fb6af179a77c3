"""The course of the learning rate in mmsegmentation and mmdetection: `poly` and `step`."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..optimisation import learning_rate_at
from .arguments import DenseSettings


def make_dense_schedule(
    optimizer: torch.optim.Optimizer, settings: DenseSettings, peak: float, total_steps: int, epochs: float
) -> LambdaLR:
    """The schedule of a run as a factor on each group's learning rate; to be stepped once per optimiser step.

    Args:
        peak: the peak learning rate of the head's group.
        total_steps: optimiser steps of the whole run.
        epochs: how many epochs these are; turns `lr_steps` and `num_warmup_epochs` into steps.
    """
    kind = settings.lr_scheduler_type
    warmup_steps = settings.num_warmup_steps
    if warmup_steps is None:
        warmup_steps = round(settings.num_warmup_epochs * total_steps / epochs)
    warmup_steps = min(warmup_steps, total_steps // 2)
    cooldown_steps = min(round(settings.num_cooldown_epochs * total_steps / epochs), total_steps)
    drops = [round(epoch * total_steps / epochs) for epoch in settings.step_epochs()]

    def factor(step: int) -> float:
        if peak == 0:
            return 0.0
        warming_up = step < warmup_steps
        rate = learning_rate_at(
            step,
            peak=peak,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            cooldown_steps=cooldown_steps,
            warmup_start=min(settings.warmup_learning_rate, peak),
            minimum=settings.min_learning_rate,
            kind="constant" if kind in ("poly", "step") else kind,
        )
        if kind == "step":
            rate *= settings.lr_gamma ** sum(step >= drop for drop in drops)
        elif kind == "poly" and not warming_up:
            minimum = min(settings.min_learning_rate, peak)
            left = 1 - min(step / max(total_steps - cooldown_steps, 1), 1.0)
            rate = minimum + (peak - minimum) * left**settings.lr_power
        return rate / peak

    return LambdaLR(optimizer, factor)
