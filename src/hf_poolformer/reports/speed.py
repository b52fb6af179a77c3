"""What two models cost: parameters, bytes on disk, and seconds, measured in turns on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from torch import nn

from ..foundation.errors import UserError
from ..foundation.exported import is_exported
from ..foundation.graphs import graphed
from ..foundation.machine import processor_name
from ..foundation.origin import Origin
from ..foundation.scores import REGRESSION, class_scores
from ..foundation.timing import take_turns


# What transformers loads weights from, the first kind that is there.
WEIGHTS = ("*.safetensors", "*.bin")
ROUNDS = 15
# Between the scores of the same images in two batches: other kernels, and bfloat16.
MOST_OFF = 0.02


@dataclass(frozen=True)
class Cost:
    """
    Attributes:
        runtime: what computes it, and in which numbers.
        parameters: None of an export, whose graph has some of them folded into others.
        bytes: of its weights on disk, of an export the files of its graph; None where they are not at hand.
        image_size: height and width that its image processor makes, in pixels.
        batch_size: images that it was timed with, of all fields below; None where it was not.
        seconds: of a batch, the median of all turns.
        spread: of the middle half of the turns, relative to the median.
        device: it was timed on.
    """

    runtime: str
    parameters: int | None
    bytes: int | None
    image_size: tuple[int, int] | None = None
    batch_size: int | None = None
    seconds: float | None = None
    spread: float | None = None
    device: str = ""

    @property
    def images_per_second(self) -> float | None:
        return self.batch_size / self.seconds if self.seconds else None


def cost_of(name: str, model: nn.Module, origin: Origin, mixed_precision: str) -> Cost:
    """What is known of a model before it is timed.

    Args:
        name: folder or Hub id that it was loaded from.
        mixed_precision: accelerate's, in which a model of PyTorch is run.
    """
    if is_exported(name):
        manifest = model.manifest
        sizes = [(Path(name) / file).stat().st_size for file in manifest.files if Path(file).suffix != ".json"]
        return Cost(f"{manifest.format}, {manifest.precision}", None, sum(sizes))
    runtime = f"PyTorch, {str(model.dtype).removeprefix('torch.')}"
    runtime += "" if mixed_precision == "no" else f", in {mixed_precision} where autocast has it"
    return Cost(runtime, sum(part.numel() for part in model.parameters()), bytes_on_disk(name, origin))


def bytes_on_disk(name: str, origin: Origin) -> int | None:
    """Of the weights of a folder, or of a download."""
    folder = Path(name)
    if not folder.is_dir():
        where = {"revision": origin.revision, "token": origin.token, "cache_dir": origin.cache_dir}
        folder = Path(snapshot_download(name, **where, local_files_only=True))
    for pattern in WEIGHTS:
        if found := [path.stat().st_size for path in folder.glob(pattern)]:
            return sum(found)
    return None


@dataclass
class Contestant:
    """
    Attributes:
        pixel_values: (B, C, H, W), of the same images for each contestant.
        scores: what the model has said of them in its evaluation: probabilities (B, labels), or numbers.
    """

    model: nn.Module
    cost: Cost
    pixel_values: torch.Tensor
    scores: torch.Tensor


def time_in_turns(contestants: Sequence[Contestant], accelerator: Accelerator, seconds: float) -> list[Cost]:
    """What the contestants cost, with the seconds of a forward: both in turns, so that a noisy minute hits both.

    Each is what an evaluation runs, precision included, and first has to say the same as there.

    Args:
        seconds: no turn is begun after so long, as soon as there are three of each.

    Raises:
        UserError: one of them says something else than in its evaluation.
    """
    steps, costs = {}, []
    for number, contestant in enumerate(contestants):
        step, device = make_step(contestant, accelerator)
        got = class_scores(step().float().cpu(), contestant.model.config)
        off = (got - contestant.scores).abs().max().item()
        size = max(contestant.scores.abs().max().item(), 1.0)
        if not off <= MOST_OFF * size:  # which NaN is not
            raise UserError(f"its answers are off by {off:.2g} from those of the evaluation")
        steps[str(number)] = step
        costs.append(
            replace(
                contestant.cost,
                image_size=tuple(contestant.pixel_values.shape[2:]),
                batch_size=len(contestant.pixel_values),
                device=device,
            )
        )
    on = accelerator.device.type
    timings = take_turns(steps, device=on, rounds=ROUNDS, seconds=seconds, turn=0.2, label="timing")
    return [
        replace(cost, seconds=timing.median, spread=timing.spread)
        for cost, timing in zip(costs, timings.values(), strict=True)
    ]


def make_step(contestant: Contestant, accelerator: Accelerator) -> tuple[Callable[[], torch.Tensor], str]:
    """What gives the logits of the images, as an evaluation does, and the device that it runs on."""
    exported = not any(True for _ in contestant.model.parameters())
    device = torch.device("cpu") if exported else accelerator.device
    answer = contestant.model if exported else graphed(contestant.model)
    pixel_values = contestant.pixel_values.to(device, memory_format=torch.channels_last)
    numbers = contestant.model.config.problem_type == REGRESSION

    def step() -> torch.Tensor:
        with torch.inference_mode(), contextlib.nullcontext() if numbers else accelerator.autocast():
            return answer(pixel_values=pixel_values).logits

    if device.type == "cuda":
        return step, torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return step, f"{processor_name()}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)
