"""`predict` as users run it: reading alone, the model alone, the whole, and transformers' pipeline over the files."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, pipeline

from hf_poolformer import PoolFormerImageProcessor

from ..data.photographs import jpegs
from ..foundation.errors import UserError
from ..foundation.machine import cores
from ..foundation.timing import Deadline, synchronize
from ..prediction import Predictor, predict
from ..prediction.inference import make_loader
from ..prediction.ways import choose_way
from .case import DTYPES, Case
from .loop import DIFFERENT_PHOTOGRAPHS, PHOTOGRAPH


READING, MODEL, WHOLE, PIPELINE = "reading alone", "model alone", "predict into a table", "transformers' pipeline"
# Images whose labels are compared, and the share of them that must agree: half precision may turn near ties round.
COMPARED = 16
AGREEING = {"float32": 1.0, "bfloat16": 0.8, "float16": 0.8}
# What differs by less is the noise of a machine.
CLOSE = 0.9


@dataclass
class PredictReport:
    """
    Images per second in the steady state, medians over the rounds.

    Attributes:
        rates: of READING, MODEL, WHOLE and PIPELINE.
        rounds: the same, of each round.
        images: how many each round predicted, what was left out of its timing included.
        device_preprocessing: as asked for.
        chosen: the way that was measured: "no" or "decode".
        choice: what `auto` has to say of it.
        bottleneck: "reading", "model", "reading and model" where they share cores, or "hand-over".
    """

    case: Case
    workers: int
    images: int = 0
    device_preprocessing: str = "no"
    chosen: str = "no"
    choice: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    bottleneck: str = ""
    explanation: str = ""


def measure_predict(
    case: Case,
    deadline: Deadline,
    *,
    workers: int | None = None,
    device_preprocessing: str = "no",
    batches: int = 5,
    rounds: int = 3,
) -> PredictReport:
    """
    Args:
        case: mode "infer".
        deadline: no further round is begun when it would end after that; the first always is.
        workers: processes that decode, also of the pipeline; None as predict chooses.
        device_preprocessing: as of predict; "auto" chooses once, before the rounds.
        batches: that are timed in each round, between those that fill the buffers and those that empty them.

    Raises:
        UserError: photographs are missing, or predict and the pipeline disagree about labels.
    """
    workers = min(16, max(1, cores() - 1)) if workers is None else workers
    ahead = 2 * workers + 1  # what a DataLoader reads ahead, and the batch in hand
    report = PredictReport(case, workers, (2 * ahead + batches) * case.batch_size, device_preprocessing)
    device = torch.device(case.device)
    with tempfile.TemporaryDirectory(prefix="hf-poolformer-predict-") as name:
        folder = Path(name)
        files = write_files(folder / "photographs", report.images)
        save_model(case, folder / "model")
        how = {"device": device, "dtype": case.dtype}
        predictor = Predictor(str(folder / "model"), **how)
        items = [(str(file), file) for file in files]
        if device_preprocessing == "auto":
            found = choose_way(predictor, items, len(items), case.batch_size, workers)
            report.chosen, report.choice = found
        else:
            report.chosen = device_preprocessing
        predictor.preprocess(report.chosen)
        peer = pipeline("image-classification", str(folder / "model"), device=device, dtype=DTYPES[case.dtype])
        compare_labels(predictor, peer, files[:COMPARED], AGREEING[case.dtype])

        def reading() -> list[float]:
            parts = ((items[start : start + case.batch_size], None) for start in range(0, len(items), case.batch_size))
            loader = make_loader(
                predictor.preprocessing.load, parts, case.batch_size, len(items), workers, device.type == "cuda"
            )
            return [time.perf_counter() for _ in loader]

        def model() -> list[float]:
            batch = predictor.preprocessing.load(items[: case.batch_size])
            times = []
            for _ in range(batches + 2 * ahead if case.device != "cpu" else batches):
                predictor.rows(batch)
                synchronize(case.device)
                times.append(time.perf_counter())
            return times

        def whole() -> list[float]:
            times: list[float] = []
            predict(
                folder / "model",
                [folder / "photographs"],
                folder / "table.parquet",
                batch_size=case.batch_size,
                device_preprocessing=report.chosen,
                num_workers=workers,
                overwrite=True,
                progress=False,
                should_stop=lambda: times.append(time.perf_counter()),
                **how,
            )
            return times

        def by_pipeline() -> list[float]:
            answers = peer((str(file) for file in files), batch_size=case.batch_size, num_workers=workers, top_k=5)
            times = [time.perf_counter() for _ in answers]
            return times[case.batch_size - 1 :: case.batch_size]

        measured = {READING: reading, MODEL: model, WHOLE: whole, PIPELINE: by_pipeline}
        took = 0.0
        for number in range(rounds):
            if number and deadline.left < took:
                break
            start = time.monotonic()
            for part in list(measured) if number % 2 == 0 else list(reversed(measured)):
                times = measured[part]()
                margin = 1 if part == MODEL else ahead
                report.rounds.setdefault(part, []).append(steady_rate(times, margin, case.batch_size))
            took = time.monotonic() - start
    report.rates = {part: statistics.median(found) for part, found in report.rounds.items()}
    report.bottleneck, report.explanation = find_bottleneck(report.rates, shared_cores=case.device == "cpu")
    return report


def write_files(folder: Path, count: int) -> list[Path]:
    """`count` JPEG files, a few different photographs under many names."""
    folder.mkdir()
    files = [folder / f"{number:07d}.jpg" for number in range(count)]
    for file, data in zip(files, jpegs(PHOTOGRAPH, min(count, DIFFERENT_PHOTOGRAPHS)), strict=False):
        file.write_bytes(data)
    for number in range(DIFFERENT_PHOTOGRAPHS, count):
        os.link(files[number % DIFFERENT_PHOTOGRAPHS], files[number])
    return files


def save_model(case: Case, folder: Path) -> None:
    """With random weights, whose classes are far enough from each other to be compared."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(case.config())
    with torch.no_grad():
        for weight in model.classifier.parameters():
            weight.normal_(std=0.5)
    model.save_pretrained(folder)
    edge = {"height": case.image_size, "width": case.image_size}
    PoolFormerImageProcessor(size={"shortest_edge": case.image_size}, crop_size=edge).save_pretrained(folder)


def compare_labels(predictor: Predictor, peer: Any, files: Sequence[Path], wanted: float) -> None:
    rows = predictor.rows(predictor.preprocessing.load([(str(file), file) for file in files]))
    answers = peer([str(file) for file in files], top_k=1)
    same = sum(row["label"] == answer[0]["label"] for row, answer in zip(rows, answers, strict=True))
    if same < wanted * len(files):
        raise UserError(f"predict and transformers' pipeline agree about {same} of {len(files)} labels only.")


def steady_rate(times: Sequence[float], margin: int, batch_size: int) -> float:
    """Images per second between the batch after `margin` of them and, if there are enough, as many before the end.

    Before, buffers and caches fill; at the end, they empty, with nobody reading any more.
    """
    end = len(times) - 1 - (margin if len(times) > 2 * margin + 1 else 0)
    start = min(margin, end - 1)
    return (end - start) * batch_size / (times[end] - times[start])


def find_bottleneck(rates: dict[str, float], shared_cores: bool) -> tuple[str, str]:
    """What limits `predict`, and why one can say so."""
    reading, model, whole = (rates[part] for part in (READING, MODEL, WHOLE))
    slower, rate = min((("reading", reading), ("model", model)), key=lambda part: part[1])
    numbers = f"reading alone reaches {reading:.0f} images/s, the model alone {model:.0f}, both together {whole:.0f}"
    if whole >= CLOSE * rate:
        return slower, f"{numbers}, as much as the slower of the two allows."
    together = 1 / (1 / reading + 1 / model)
    if shared_cores and whole >= CLOSE * together:
        return "reading and model", f"{numbers}: they share the cores, on which {together:.0f} are to be expected."
    return "hand-over", f"{numbers}: less than either explains; the main process or other programs hold it up."
