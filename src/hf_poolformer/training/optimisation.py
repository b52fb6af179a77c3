"""The length of a run, the optimiser and its groups, the course of the learning rate, a moving average of weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..foundation.errors import UserError
from ..settings.training import TrainingSettings
from .checkpoints import whole
from .lamb import Lamb


STAGE = re.compile(r"\bencoder\.(?:patch_embeddings\.(\d+)|block\.(\d+)\.(\d+))\.")


def depth_of(name: str, depths: list[int]) -> int:
    """Distance of a parameter from the input: 0 the stem, 1 the first block, ..., sum(depths) + 1 the head.

    A downsampling convolution belongs with the block that it feeds.
    """
    match = STAGE.search(name + ".")
    if match is None:
        return sum(depths) + 1
    embedding, stage, block = match.groups()
    if embedding is not None:
        return 0 if embedding == "0" else sum(depths[: int(embedding)]) + 1
    return sum(depths[: int(stage)]) + int(block) + 1


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups for the optimiser: no decay on norms, biases and scales, and a learning rate that falls towards the stem.

    Args:
        model: with parameters under the names `...encoder.patch_embeddings.I`, `...encoder.block.I.J`; all others
            count as the head.
        weight_decay: for matrices and kernels. Everything with one dimension goes without: norms, biases, layer
            scales, residual scales, the scale and bias of StarReLU.
        layer_decay: the learning rate of a parameter k blocks below the head is multiplied by `layer_decay ** k`.

    Returns:
        Groups with `params`, `weight_decay`, `lr_scale` and `name`. Frozen parameters are in none.
    """
    depths = list(getattr(model.config, "depths", []))
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depth_of(name, depths) if layer_decay != 1 else sum(depths) + 1
        decays = parameter.ndim > 1
        scale = layer_decay ** (sum(depths) + 1 - depth)
        group = groups.setdefault(
            (depth, decays),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
                "name": f"depth {depth}, {'decay' if decays else 'no decay'}",
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def length_of_training(settings: TrainingSettings, num_examples: int | None, global_batch: int) -> tuple[int, float]:
    """Optimiser steps of the run and how many epochs these are, cooldown included.

    Raises:
        UserError: the number of images is unknown and `max_train_steps` is not given.
    """
    epochs = float(settings.num_train_epochs + settings.num_cooldown_epochs)
    if num_examples is None:
        if settings.max_train_steps is None:
            raise UserError(
                "the dataset does not say how many images it has, so the length of the run must be given: "
                "--max_train_steps N."
            )
        return settings.max_train_steps, epochs
    if num_examples == 0:
        raise UserError("the training split is empty.")
    steps_per_epoch = max(num_examples / global_batch, 1.0)
    if settings.max_train_steps is not None:
        return settings.max_train_steps, settings.max_train_steps / steps_per_epoch
    return math.ceil(epochs * max(math.floor(steps_per_epoch), 1)), epochs


def make_optimizer(model: nn.Module, settings: TrainingSettings, learning_rate: float) -> torch.optim.Optimizer:
    """What `optimizer` names, AdamW fused where the device has it; a group's learning rate is `learning_rate *
    lr_scale`."""
    groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
    for group in groups:
        group["lr"] = learning_rate * group["lr_scale"]
    common = {
        "lr": learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    if settings.optimizer == "lamb":
        return Lamb(groups, **common)
    device = next(model.parameters()).device.type
    return torch.optim.AdamW(groups, **common, fused=device in ("cuda", "cpu"))


def scaled_learning_rate(settings: TrainingSettings, images_per_step: int) -> float:
    """The peak learning rate; with `scale_learning_rate`, what is given for 1024 images per optimiser step."""
    return settings.learning_rate * images_per_step / 1024 if settings.scale_learning_rate else settings.learning_rate


def learning_rate_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    warmup_start: float = 0.0,
    minimum: float = 0.0,
    kind: str = "cosine",
    power: float = 1.0,
    drops: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """The learning rate of optimiser step `step` (the first is 0).

    Linear from `warmup_start` to `peak` during the warm-up; then the course `kind` from `peak` to `minimum`, which is
    reached when `cooldown_steps` are left and kept. As in the official recipe (timm's CosineLRScheduler) the cosine
    is counted from the first step, warm-up included; the official scheduler moves once per epoch, this one each step.

    Args:
        kind: cosine, linear, constant; or, of mmsegmentation and mmdetection, `poly`, which falls with a `power` of
            what is left, or `step`, which is multiplied by `gamma` at each of the steps `drops`.
    """
    factor = gamma ** sum(step >= drop for drop in drops) if kind == "step" else 1.0
    if step < warmup_steps:
        return (warmup_start + (peak - warmup_start) * step / warmup_steps) * factor
    if kind in ("constant", "step"):
        return peak * factor
    minimum = min(minimum, peak)
    progress = min(step / max(total_steps - cooldown_steps, 1), 1.0)
    if kind == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    else:
        remaining = (1 - progress) ** (power if kind == "poly" else 1)
    return minimum + (peak - minimum) * remaining


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, peak: float, total_steps: int, epochs: float
) -> LambdaLR:
    """The schedule of a run as factors on each group's learning rate; to be stepped once per optimiser step.

    Args:
        peak: the peak learning rate of the head's group.
        total_steps: optimiser steps of the whole run, cooldown included.
        epochs: how many epochs these are; turns warm-up, cooldown and drops from epochs into steps.
    """
    course = settings.course()
    steps_per_epoch = total_steps / epochs
    warmup_steps = settings.num_warmup_steps
    if warmup_steps is None:
        warmup_steps = round(settings.num_warmup_epochs * steps_per_epoch)
    fixed = {
        "peak": peak,
        "total_steps": total_steps,
        "warmup_steps": min(warmup_steps, total_steps // 2),
        "cooldown_steps": min(round(settings.num_cooldown_epochs * steps_per_epoch), total_steps),
        "warmup_start": min(settings.warmup_learning_rate, peak),
        "minimum": settings.min_learning_rate,
        "drops": [round(epoch * total_steps / epochs) for epoch in course.pop("epochs", ())],
        **course,
    }
    return LambdaLR(optimizer, lambda step: learning_rate_at(step, **fixed) / peak if peak else 0.0)


class WeightAverage:
    """Exponential moving average of a model's weights, kept on the model's device in `module`.

    With a warm-up the decay rises with the number of updates n, min(decay, (1 + n) / (10 + n)), so that a short run is
    not averaged with its random start. Without, it is the same from the first update, as in timm's ModelEmaV2.

    Counted in Python: `torch.optim.swa_utils.AveragedModel` would wait for the GPU every step to read its counter.
    Buffers and integers are copied.

    Args:
        model: the bare model, before accelerate wraps it.
        decay: the final decay.
        warmup: whether it rises to that.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup, self.updates = decay, warmup, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        averaged, current = list(self.module.parameters()), [whole(p.detach()) for p in model.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for kept, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.module.load_state_dict(state["weights"])
