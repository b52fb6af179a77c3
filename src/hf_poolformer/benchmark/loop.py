"""The training loop as users run it: with tensors that are simply there, with streamed photographs, and what binds."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.photographs import jpegs
from ..foundation.errors import UserError
from .case import TINY, Case
from .timing import Timing, synchronize


# What most of ImageNet measures, (width, height).
PHOTOGRAPH = (500, 375)
DIFFERENT_PHOTOGRAPHS = 64
# Steps and batches that only warm up.
WARMUP = 3


@dataclass
class LoopReport:
    """
    Images per second of the parts and of the whole.

    Attributes:
        rates: "loader alone", "copy alone" (GPU), "loop, synthetic images", "loop, streamed photographs".
        data_wait_share: of the loop with photographs.
        bottleneck: "decode", "copy", "compute", or "decode and compute" where they share cores.
    """

    case: Case
    workers: int
    rates: dict[str, float] = field(default_factory=dict)
    data_wait_share: float = 0.0
    bottleneck: str = ""
    explanation: str = ""


class Synthetic:
    """Stands in for a loader: the same batch again and again, in the form the real one hands out."""

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch

    def set_epoch(self, epoch: int) -> None:
        pass

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.repeat(self.batch)


def measure_loop(case: Case, *, steps: int = 12, workers: int | None = None) -> LoopReport:
    """
    Runs `training.loop.train` twice, with the recipe of the paper, whose augmentation is the heaviest.

    Args:
        case: mode "train"; a dtype other than float32 is mixed precision here, as in training.
        steps: optimiser steps of each run, after three that warm up.
        workers: processes that decode; None as train.py chooses.

    Raises:
        UserError: the libraries of the extra `train`, or photographs, are missing.
    """
    try:
        from hf_poolformer.settings.training import TrainingSettings
        from hf_poolformer.training.classification import ClassificationTraining
        from hf_poolformer.training.loop import train
    except ImportError as error:
        raise UserError(f"{error.name} missing: pip install 'hf-poolformer[train]'") from error

    report = LoopReport(case, 0)
    overrides = dict(TINY) if case.variant == "tiny" else {}
    overrides.pop("num_labels", None)
    with tempfile.TemporaryDirectory(prefix="hf-poolformer-loop-") as folder:
        data = Path(folder) / "photographs"
        write_parquet(data, case.batch_size * (steps + WARMUP + 1))

        def settings(name: str) -> Any:
            return TrainingSettings.from_recipe(
                "paper",
                config_name="poolformer_s12" if case.variant == "tiny" else case.variant,
                config_overrides=overrides or None,
                image_size=case.image_size,
                dataset_name=str(data),
                output_dir=str(Path(folder) / name),
                per_device_train_batch_size=case.batch_size,
                max_train_steps=steps + WARMUP,
                eval_epochs=0,
                num_warmup_steps=1,
                num_workers=workers,
                mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[case.dtype],
                checkpointing_steps="no",
                logging_steps=1,
            )

        class Streamed(ClassificationTraining):
            """With the real loader, after one like it was timed on its own."""

            def make_loaders(self, *arguments: Any) -> tuple[Any, Any]:
                alone, _ = super().make_loaders(*arguments)
                report.workers = alone.num_workers
                report.rates["loader alone"] = loader_rate(alone, case.batch_size, steps)
                return super().make_loaders(*arguments)

        class Unstreamed(ClassificationTraining):
            def make_loaders(self, *arguments: Any) -> tuple[Any, Any]:
                images, labels = case.change(device="cpu", dtype="float32").batch()
                labels = labels % 10
                if case.device != "cpu":
                    images, labels = images.pin_memory(), labels.pin_memory()
                    report.rates["copy alone"] = copy_rate(images, case.device, steps)
                return Synthetic({"pixel_values": images, "labels": labels, "skipped": []}), None

        for name, kind in (("synthetic images", Unstreamed), ("streamed photographs", Streamed)):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                train(settings(name), kind(settings(name)))
            points = read_log(Path(folder) / name / "training_log.jsonl")[WARMUP:]
            report.rates[f"loop, {name}"] = statistics.median(point["images_per_second"] for point in points)
            report.data_wait_share = statistics.mean(point["data_wait_share"] for point in points)
    report.bottleneck, report.explanation = find_bottleneck(report.rates, shared_cores=case.device == "cpu")
    return report


def write_parquet(folder: Path, rows: int, shards: int = 4) -> None:
    """A dataset of `rows` JPEGs with ten labels, a few different photographs again and again, and ten to validate."""
    from datasets import ClassLabel, Dataset, Features, Image

    files = jpegs(PHOTOGRAPH, min(rows, DIFFERENT_PHOTOGRAPHS))
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {index}" for index in range(10)])})
    splits = {f"train-{shard:05d}-of-{shards:05d}": range(shard, rows, shards) for shard in range(shards)}
    folder.mkdir(parents=True)
    for name, indices in {**splits, "validation-00000-of-00001": range(10)}.items():
        columns = {
            "image": [{"bytes": files[index % len(files)], "path": None} for index in indices],
            "label": [index % 10 for index in indices],
        }
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each file
            Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The points of a training curve."""
    points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [point for point in points if "images_per_second" in point]


def loader_rate(loader: Any, batch_size: int, batches: int) -> float:
    """Images per second when nothing else happens; what was prefetched while the workers started does not count."""
    iterator = iter(loader)
    count, start = 0, 0.0
    for index, _ in enumerate(itertools.islice(iterator, batches + WARMUP)):
        if index == WARMUP - 1:
            start = time.perf_counter()
        count += index >= WARMUP
    seconds = time.perf_counter() - start
    del iterator
    return count * batch_size / seconds


def copy_rate(images: torch.Tensor, device: str, rounds: int) -> float:
    """Images per second from pinned memory to the device."""
    timing = Timing()
    for _ in range(rounds + WARMUP):
        synchronize(device)
        start = time.perf_counter()
        images.to(device, non_blocking=True)
        synchronize(device)
        timing.seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(timing.seconds[WARMUP:])


def find_bottleneck(rates: dict[str, float], shared_cores: bool) -> tuple[str, str]:
    """What limits the loop, and why one can say so."""
    whole, compute, decode = (
        rates[name] for name in ("loop, streamed photographs", "loop, synthetic images", "loader alone")
    )
    share = f"with photographs the loop reaches {whole / compute:.0%} of what it does with synthetic images"
    copy = rates.get("copy alone")
    if copy is not None and copy < min(compute, decode):
        return "copy", f"{share}, and the copy to the device alone reaches {copy:.0f} images/s."
    if whole >= 0.9 * compute:
        return "compute", f"{share}; the loader alone would reach {decode:.0f} images/s."
    if decode < 1.1 * compute:
        return (
            "decode",
            f"{share}, and the loader alone reaches {decode:.0f} images/s: more workers, or smaller files.",
        )
    if shared_cores:
        return "decode and compute", (
            f"{share}; the loader alone would reach {decode:.0f} images/s, but model and workers share the cores, on "
            f"which both together could reach {1 / (1 / decode + 1 / compute):.0f}."
        )
    return "hand-over", f"{share}, although the loader alone reaches {decode:.0f} images/s."
