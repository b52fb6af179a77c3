"""The training loop as users run it, each of its parts alone, and which of them binds.

A figure counts only in a steady state: behind everything that the workers had read ahead when it began, over several
times as many batches, with as many batches made as used. Otherwise a loop of any speed could live on what was there.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.photographs import jpegs
from ..foundation.errors import UserError
from ..foundation.machine import cores
from ..foundation.timing import synchronize
from .case import TINY, Case


# What most of ImageNet measures, (width, height).
PHOTOGRAPH = (500, 375)
DIFFERENT_PHOTOGRAPHS = 64
# Of the one training file that is written, some 100 MB; all others are further names of it.
ROWS_PER_SHARD = 1024
# More images per second than are trained here, by what the workers still do: by worker, and in all.
MOST = {"no": 700, "augment": 1500}
MOST_BY_WORKER, MOST_IN_ALL = 4000, 15_000
# Batches that only warm up, besides those that were read ahead.
WARMUP = 3
# A window holds so many times what can have been read ahead.
SEVERAL = 4
# Rates that differ by less are equal: for the halves of a window, batches made and used, and ties for the bottleneck.
TOLERANCE = 0.1

# What is measured, and what it is called where it binds.
PARTS = {
    "loader alone": "loader",
    "device stage alone": "device stage",
    "copy alone": "copy",
    "loop, synthetic images": "compute",
}
WHOLE = "loop, photographs"
NOT_STEADY = "not steady"


@dataclass
class Window:
    """What was counted while one part ran.

    Attributes:
        ahead: batches that can have been read before the first of them was used, and so warmed up.
        batches, images: used within the window.
        made: batches that the workers finished within the window; None where there are no workers to count.
        halves: images per second of the first and the second half of the batches.
        waited: seconds that the loop waited for the loader, which with workers includes the device stage.
        cpu_seconds: of this process and its workers.
        complaint: why there is no window, or a short one; empty if there is nothing to say.
    """

    ahead: int = 0
    batches: int = 0
    images: int = 0
    seconds: float = 0.0
    made: int | None = None
    halves: tuple[float, float] = (0.0, 0.0)
    waited: float = 0.0
    cpu_seconds: float = 0.0
    complaint: str = ""

    @property
    def rate(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def unsteady(self) -> str:
        """Why its rate is none that would last; empty if it is one."""
        if self.complaint:
            return self.complaint
        if self.batches < max(SEVERAL * self.ahead, 2):
            return (
                f"{self.batches} batches in {self.seconds:.0f} s, and {self.ahead} may have been read ahead: try "
                f"--seconds {int(max(SEVERAL * self.ahead, 2) / max(self.batches, 1) * self.seconds * 1.2) + 1}"
            )
        if self.made is not None and abs(self.made - self.batches) > TOLERANCE * self.batches:
            return f"{self.batches} batches were used while the workers made {self.made}"
        first, second = self.halves
        if max(first, second) > (1 + TOLERANCE) * min(first, second):
            return f"{first:.1f} images/s in the first half of the time, {second:.1f} in the second"
        return ""


@dataclass
class LoopReport:
    """
    Images per second of the parts and of the whole.

    Attributes:
        dealt: how the data was dealt to the workers.
        rates: by the names in `PARTS` ("copy alone" only on a GPU), and of the loop with photographs.
        windows: what was counted for those rates that need a steady state.
        data_wait_share: of the loop with photographs, part of the measured time.
        cores: that processes and workers share.
        together: images per second that these cores would give if loader and compute kept them busy all the time.
        unsteady: what was not steady and why; with any of it there is no bottleneck.
        bottleneck: one or more of the names in `PARTS`, "hand-over" besides where the whole is slower than they
            explain, or "not steady".
    """

    case: Case
    workers: int = 0
    device_preprocessing: str = "no"
    dealt: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    windows: dict[str, Window] = field(default_factory=dict)
    data_wait_share: float = 0.0
    cores: int = 0
    together: float | None = None
    unsteady: list[str] = field(default_factory=list)
    bottleneck: str = ""
    explanation: str = ""

    def failure(self) -> str:
        """Why no bottleneck can be named; empty if one is."""
        return self.explanation if self.bottleneck == NOT_STEADY else ""


class Enough(Exception):
    """Ends a training run that has been measured."""


class Watch:
    """Counts batches on their way from a loader to whoever uses them.

    Args:
        name: of the part, for the progress bar.
        seconds: how long to measure; also how long warming up may take after the first batch.
        ahead: batches that can be ready before the first is used.
        device: is waited for at both ends of the window.
        made: how many batches the workers have finished so far.
        stream: where progress is shown, if not on stderr.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        ahead: int,
        device: str = "cpu",
        made: Callable[[], int] | None = None,
        stream: TextIO | None = None,
    ):
        self.name, self.seconds, self.device, self.stream = name, seconds, device, stream or sys.stderr
        self.window = Window(ahead)
        self._made = made or (lambda: 0)
        self._counts = made is not None

    def __call__(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, until the window is over; `window` is filled in then."""
        window, warmup = self.window, self.window.ahead + WARMUP
        stamps: list[tuple[float, int]] = []  # when a batch was asked for, and images used in the window until then
        begun = cpu = 0.0
        made = 0
        with tqdm(
            desc=self.name,
            unit=" images",
            leave=False,
            mininterval=0.5 if self.stream.isatty() else 10,
            file=self.stream,
        ) as bar:
            for number in itertools.count():
                asked = time.perf_counter()
                if number == 1:
                    begun = asked  # the first step may compile
                late = number > 1 and asked - begun > self.seconds
                if not stamps and (number >= warmup or late):
                    if number < warmup:
                        window.complaint = (
                            f"warming up had used {number} of the {warmup} batches it takes after {self.seconds:.0f} "
                            "s: try more --seconds"
                        )
                    synchronize(self.device)
                    made, cpu, asked = self._made(), cpu_seconds(), time.perf_counter()
                    stamps.append((asked, 0))
                elif stamps:
                    stamps.append((asked, window.images))
                    if asked - stamps[0][0] >= self.seconds:
                        break
                batch = next(batches, None)
                if batch is None:
                    window.complaint = f"the data ended after {number} batches"
                    break
                if stamps:
                    window.waited += time.perf_counter() - asked
                yield batch
                size = len(batch.get("labels", ()))
                bar.update(size)
                if stamps:
                    window.images += size
                    window.batches += 1
        if not stamps:
            return
        synchronize(self.device)
        end = time.perf_counter()
        window.seconds, window.cpu_seconds = end - stamps[0][0], cpu_seconds() - cpu
        if self._counts:
            window.made = self._made() - made
        if len(stamps) > 2:
            middle, images = stamps[len(stamps) // 2]
            window.halves = (
                images / max(middle - stamps[0][0], 1e-9),
                (window.images - images) / max(end - middle, 1e-9),
            )


class Watched:
    """Stands in for a loader in `training.loop.train`: what `batches` gives, watched; ends the run by `Enough`."""

    def __init__(self, watch: Watch, batches: Any):
        self.watch, self.batches = watch, batches

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.watch(iter(self.batches))
        raise Enough


def measure_loop(
    case: Case, *, seconds: float = 15.0, workers: int | None = None, device_preprocessing: str = "no"
) -> LoopReport:
    """
    Runs `training.loop.train` twice, with the recipe of the paper, whose augmentation is the heaviest.

    Args:
        case: mode "train"; a dtype other than float32 is mixed precision here, as in training.
        seconds: of measuring the loader and each of the loops, after they have warmed up.
        workers: processes that decode; None as train.py chooses.
        device_preprocessing: as of train.py.

    Raises:
        UserError: the libraries of the extra `train`, or photographs, are missing, or the device cannot do what
            `device_preprocessing` gives it to do.
    """
    try:
        from hf_poolformer.settings.training import TrainingSettings
        from hf_poolformer.training.classification import ClassificationTraining
        from hf_poolformer.training.loop import train
    except ImportError as error:
        raise UserError(f"{error.name} missing: pip install 'hf-poolformer[train]'") from error

    report = LoopReport(case, device_preprocessing=device_preprocessing, cores=cores())
    overrides = dict(TINY) if case.variant == "tiny" else {}
    overrides.pop("num_labels", None)
    device, size = case.device, case.batch_size
    stderr = sys.stderr  # training's own is kept out of sight
    kept: dict[str, Any] = {}  # a batch of photographs as the loop gets it

    def watched(name: str, *arguments: Any) -> Watch:
        watch = Watch(name, seconds, *arguments, stream=stderr)
        report.windows[name] = watch.window
        return watch

    class Streamed(ClassificationTraining):
        """With the real loader, after one like it was measured on its own."""

        def make_loaders(self, *arguments: Any) -> tuple[Any, Any]:
            loader, _ = super().make_loaders(*arguments)
            report.workers, report.dealt = loader.num_workers, dealt(loader)
            # A DataLoader's own iterator: messages as the workers send them, with nothing done in this process.
            messages = DataLoader.__iter__(loader)
            watch = watched("loader alone", *counted(loader))
            for message in watch(messages):
                if len(message.get("labels", ())) == size:
                    last = message
            del messages
            report.rates["device stage alone"] = repeated(lambda: loader.finish(last), size, device)
            if device != "cpu":
                tensors = [value for value in last.values() if isinstance(value, torch.Tensor)]
                copy = [tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in tensors]
                report.rates["copy alone"] = repeated(
                    lambda: [tensor.to(device, non_blocking=True) for tensor in copy], size, device
                )
            finished = loader.finish(last)
            kept.update(pixel_values=finished["pixel_values"], labels=finished["labels"], skipped=[])
            del loader  # and with it its workers
            loader, _ = super().make_loaders(*arguments)
            return Watched(watched(WHOLE, *counted(loader)), loader), None

    class Unstreamed(ClassificationTraining):
        def make_loaders(self, *arguments: Any) -> tuple[Any, Any]:
            return Watched(watched("loop, synthetic images", 0, device), itertools.repeat(kept)), None

    def counted(loader: Any) -> tuple[int, str, Callable[[], int]]:
        """Of `Watch`."""
        # Rows that are read but not decoded do not count: decoding takes many times as long. What was sent, what each
        # worker is making, what the thread that pins memory has in hand, and the one batch the loader holds back.
        sent = loader.num_workers * (loader.prefetch_factor or 0)
        ahead = sent + loader.num_workers + loader.pin_memory + 1
        return ahead, device, lambda: int(loader.dataset.made.sum())

    with tempfile.TemporaryDirectory(prefix="hf-poolformer-loop-") as folder:
        data = Path(folder) / "photographs"

        def settings(name: str) -> Any:
            return TrainingSettings.from_recipe(
                "paper",
                config_name="poolformer_s12" if case.variant == "tiny" else case.variant,
                config_overrides=overrides or None,
                image_size=case.image_size,
                dataset_name=str(data),
                output_dir=str(Path(folder) / name),
                per_device_train_batch_size=size,
                max_train_steps=10**6,
                eval_epochs=0,
                num_warmup_steps=1,
                num_workers=workers,
                device_preprocessing=device_preprocessing,
                # Rows are as many bytes as ImageNet's; 5000 of them per worker would be a matter of memory, not time.
                shuffle_buffer_size=1000,
                mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[case.dtype],
                checkpointing_steps="no",
                logging_steps=50,
            )

        count = max(workers if workers is not None else (1 if device == "cpu" else min(cores(), 16)), 1)
        per_worker = MOST.get(device_preprocessing, MOST_BY_WORKER)
        write_parquet(data, rows_for(size, count, per_worker, seconds))
        for name, kind in (("streamed", Streamed), ("synthetic", Unstreamed)):
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.suppress(Enough),
            ):
                train(settings(name), kind(settings(name)))
    return judged(report)


def judged(report: LoopReport) -> LoopReport:
    """The report with what follows from its windows."""
    windows = report.windows
    report.rates.update({name: window.rate for name, window in windows.items()})
    report.rates = {name: report.rates[name] for name in (*PARTS, WHOLE) if name in report.rates}
    whole = windows[WHOLE]
    report.data_wait_share = whole.waited / whole.seconds if whole.seconds else 0.0
    loader, compute = windows["loader alone"], windows["loop, synthetic images"]
    spent = sum(window.cpu_seconds / window.images for window in (loader, compute) if window.images)
    report.together = report.cores / spent if spent else None
    report.unsteady = [f"{name}: {why}" for name, window in windows.items() if (why := window.unsteady())]
    report.bottleneck, report.explanation = find_bottleneck(report.rates, report.together, report.unsteady)
    return report


def find_bottleneck(
    rates: Mapping[str, float], together: float | None = None, unsteady: Sequence[str] = ()
) -> tuple[str, str]:
    """
    What limits the loop, and why one can say so.

    Args:
        rates: of `LoopReport`; those of the parts are of each part alone.
        together, unsteady: of `LoopReport`.

    Returns:
        the name, as `LoopReport.bottleneck`, which holds the slowest part and all that are as slow within `TOLERANCE`,
        and an explanation. "not steady" where something was not, and where the loop measures faster than its slowest
        part, on which it cannot live for long.
    """
    parts = {called: rates[name] for name, called in PARTS.items() if name in rates}
    whole, slowest = rates[WHOLE], min(parts, key=parts.__getitem__)
    least = parts[slowest]
    unsteady = list(unsteady)
    if whole > (1 + TOLERANCE) * least:
        unsteady.append(f"the loop with photographs measures {whole:.1f} images/s, its {slowest} alone {least:.1f}")
    if unsteady:
        return NOT_STEADY, f"{'; '.join(unsteady)}. The slowest part measured is the {slowest}, {least:.1f} images/s."
    names = [name for name, rate in parts.items() if rate <= (1 + TOLERANCE) * least]
    said = f"with photographs the loop reaches {whole / least:.0%} of what the {slowest} does alone"
    if whole >= (1 - TOLERANCE) * least:
        return " and ".join(names), f"{said}, {least:.1f} images/s."
    # Slower than every part: two of them may have to share.
    shared = {("device stage", "compute"): 0.0, ("loader", "compute"): together or 0.0}
    if "device stage" in parts:  # one after the other, in one process and on one device
        shared["device stage", "compute"] = 1 / (1 / parts["device stage"] + 1 / parts["compute"])
    for pair, rate in shared.items():
        if 0 < rate < least and whole >= (1 - TOLERANCE) * rate:
            names = [name for name in parts if name in {*names, *pair}]
            what = "cores" if "loader" in pair else "device and process"
            return " and ".join(names), (
                f"{said}, {least:.1f} images/s; {' and '.join(pair)} share {what}, which allow both together about "
                f"{rate:.1f}."
            )
    return " and ".join([*names, "hand-over"]), (
        f"{said}, {least:.1f} images/s, and no two parts that share something explain the rest."
    )


def dealt(loader: Any) -> str:
    """How the training data is divided among the workers."""
    order = loader.dataset.order
    parts = "parts of files" if order.divided else "files"
    return f"{order.num_shards} {parts} to {max(loader.num_workers, 1)} reading processes"


def rows_for(batch_size: int, workers: int, per_worker: int, seconds: float) -> int:
    """So many rows that an epoch outlasts the warm-up and the window, and is many times what is read ahead."""
    most = min(workers * per_worker, MOST_IN_ALL)
    return round(2 * most * seconds) + 8 * SEVERAL * batch_size * (3 * workers + WARMUP)


def write_parquet(folder: Path, rows: int) -> None:
    """
    A dataset of at least `rows` JPEGs with ten labels, and ten to validate.

    One training file is written, with a few different photographs again and again, and has as many names as it takes:
    each is read and decoded as a file of its own, and the disk holds one.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    size = min(ROWS_PER_SHARD, rows)
    shards = -(-rows // size)
    files = jpegs(PHOTOGRAPH, min(size, DIFFERENT_PHOTOGRAPHS))
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {index}" for index in range(10)])})
    folder.mkdir(parents=True)
    names = [folder / f"train-{shard:05d}-of-{shards:05d}.parquet" for shard in range(shards)]
    for path, count in ((names[0], size), (folder / "validation-00000-of-00001.parquet", 10)):
        columns = {
            "image": [{"bytes": files[index % len(files)], "path": None} for index in range(count)],
            "label": [index % 10 for index in range(count)],
        }
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each file
            Dataset.from_dict(columns, features=features).to_parquet(path)
    for name in names[1:]:
        name.hardlink_to(names[0])


def cpu_seconds() -> float:
    """Of this process, all its threads, and of its workers."""
    import psutil

    total = time.process_time()
    for worker in multiprocessing.active_children():
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(worker.pid).cpu_times()
            total += times.user + times.system
    return total


def repeated(step: Callable[[], object], images: int, device: str, seconds: float = 1.0) -> float:
    """Images per second of a step that is done again and again, for so long and at least three times."""
    step()
    synchronize(device)
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < seconds:
        step()
        count += 1
    synchronize(device)
    return count * images / (time.perf_counter() - start)
