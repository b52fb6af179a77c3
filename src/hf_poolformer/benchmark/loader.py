"""Loaders, from JPEG files to normalised training batches on one core or more: ours, timm's and torchvision's."""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import set_seed

from hf_poolformer import PoolFormerImageProcessor

from ..data.photographs import jpegs
from ..foundation.errors import UserError
from ..foundation.timing import Timing
from .loop import DIFFERENT_PHOTOGRAPHS, PHOTOGRAPH, write_parquet


CLASSES = 10
SEED = 0
# Batches that are timed in one turn, per worker.
TIMED = 3
# Each loader's examples have a mean and a standard deviation in these bounds once they are normalised, and a mean this
# close to timm's. Which images of a batch become darker, greyer or noise is drawn.
MEANS, DEVIATIONS, DIFFERENCE = (-1.5, 1.5), (0.4, 2.0), 0.6

Batches = Callable[[], Iterator[torch.Tensor]]


@dataclass
class LoaderResult:
    """One loader. `seconds` are of one batch, `cpu_seconds` those that this process computed for it, where there are
    no workers; `times_timm` is the speed against the faster of timm's."""

    name: str
    library: str
    status: str = "skipped"
    note: str = ""
    mean: float | None = None
    seconds: float | None = None
    spread: float | None = None
    images_per_second: float | None = None
    cpu_seconds: float | None = None
    times_timm: float | None = None
    rounds: list[float] = field(default_factory=list)


@dataclass
class Loading:
    """Results for one batch size and number of workers."""

    batch_size: int
    workers: int
    image_size: int
    results: list[LoaderResult]

    @property
    def title(self) -> str:
        width, height = PHOTOGRAPH
        workers = "no workers" if not self.workers else f"{self.workers} workers"
        return f"loader, {width}x{height} to {self.image_size}, batch {self.batch_size}, {workers}"


@dataclass(frozen=True)
class Turn:
    """A turn is one epoch: batches that fill whatever reads ahead, those that are timed, those that are left.

    The clock starts when the last of the first is handed out and stops with the last of the second, while there is
    more to do: a loader that is ahead by some batches is so at both ends, so that as many are made as are handed out.
    """

    before: int
    timed: int
    after: int

    @property
    def batches(self) -> int:
        return self.before + self.timed + self.after

    def take(self, batches: Batches) -> tuple[float, float]:
        """(seconds, seconds of the CPU in this process) for one batch. RuntimeError if the epoch ends too early."""
        clocks: list[tuple[float, float]] = []
        count = 0
        for count, _ in enumerate(batches(), 1):
            if count in (self.before, self.before + self.timed):
                clocks.append((time.perf_counter(), time.process_time()))
        if count <= self.before + self.timed:
            raise RuntimeError(f"{count} batches in place of {self.batches}")
        (start, cpu_start), (end, cpu_end) = clocks
        return (end - start) / self.timed, (cpu_end - cpu_start) / self.timed


def measure_loaders(
    *, batch_size: int = 128, workers: int = 0, image_size: int = 224, rounds: int = 15, seconds: float = 60.0
) -> Loading:
    """
    Images per second of each loader from the same JPEGs, with the augmentation of the recipe `paper`.

    Args:
        workers: processes that decode; 0: everything in this process, on one thread.
        rounds: turns of each at most.
        seconds: no round is begun after so long, as soon as there are three.

    Raises:
        UserError: the libraries of the extra `benchmark`, or photographs, are missing.
    """
    # Each worker has up to two batches ready and one in its hands, and ours holds one back.
    turn = Turn(before=3 * workers + 1, timed=TIMED * max(workers, 1), after=workers + 1)
    with tempfile.TemporaryDirectory(prefix="hf-poolformer-loaders-") as folder, one_thread():
        root = Path(folder)
        write_files(root / "files" / "train", turn.batches * batch_size)
        write_parquet(root / "parquet", turn.batches * batch_size)
        contestants = make_contestants(root, batch_size, workers, image_size)
        results = [LoaderResult(name, name.split(",")[0]) for name in contestants]
        set_seed(SEED)  # of all three generators: whether a loader passes is not for chance to say
        for result in sorted(results, key=lambda result: result.library != "timm"):  # whose mean is the standard
            standard = next(
                (other.mean for other in results if other.library == "timm" and other.mean is not None), None
            )
            judge(result, contestants[result.name](), (batch_size, 3, image_size, image_size), standard)
        timings = {result.name: (Timing(), Timing()) for result in results if result.status == "passed"}
        start = time.monotonic()
        for index in range(rounds):
            if index >= 3 and time.monotonic() - start > seconds:
                break
            for name in list(timings) if index % 2 else list(reversed(timings)):
                for timing, taken in zip(timings[name], turn.take(contestants[name]), strict=True):
                    timing.seconds.append(taken)
        for result in results:
            if result.name in timings:
                wall, cpu = timings[result.name]
                result.seconds, result.spread, result.rounds = wall.median, wall.spread, wall.seconds
                result.images_per_second = batch_size / wall.median
                result.cpu_seconds = None if workers else cpu.median
        peer = min((result.seconds for result in results if result.library == "timm" and result.seconds), default=None)
        for result in results:
            if peer and result.seconds:
                result.times_timm = peer / result.seconds
    return Loading(batch_size, workers, image_size, results)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """So that a loader without workers, or its part in the main process, takes one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_files(folder: Path, count: int) -> None:
    """Folders of ten classes with `count` JPEGs, those of `write_parquet`."""
    files = jpegs(PHOTOGRAPH, min(count, DIFFERENT_PHOTOGRAPHS))
    for index in range(count):
        file = folder / f"class {index % CLASSES}" / f"{index:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(files[index % len(files)])


def make_contestants(root: Path, batch_size: int, workers: int, image_size: int) -> dict[str, Batches]:
    """Name -> what starts another epoch of it."""
    common = {"batch_size": batch_size, "workers": workers, "image_size": image_size}
    files = root / "files"
    return {
        "ours, files": ours({"train_dir": str(files / "train")}, **common),
        "ours, Parquet": ours({"dataset_name": str(root / "parquet")}, **common),
        "timm, no prefetcher": timm(files, prefetcher=False, **common),
        "timm, prefetcher": timm(files, prefetcher=True, **common),
        "torchvision": torchvision(files / "train", **common),
    }


def ours(data: dict[str, str], *, batch_size: int, workers: int, image_size: int) -> Batches:
    """As `train.py` makes it."""
    try:
        from hf_poolformer.data.datasets import open_datasets
        from hf_poolformer.data.loader import make_loader
        from hf_poolformer.settings.training import TrainingSettings
        from hf_poolformer.training.device_pipeline import Preprocessing, make_pipeline
    except ImportError as error:
        raise UserError(f"{error.name} missing: pip install 'hf-poolformer[train]'") from error

    settings = TrainingSettings.from_recipe("paper", **data, output_dir="unused")
    square = {"height": image_size, "width": image_size}
    processor = PoolFormerImageProcessor(size={"shortest_edge": image_size}, crop_size=square)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        dataset = open_datasets(**data, train_val_split=None)["train"]
    loader = make_loader(
        dataset,
        batch_size=batch_size,
        training=True,
        num_workers=workers,
        shuffle_buffer_size=settings.shuffle_buffer_size,
        **make_pipeline(settings, processor, torch.device("cpu"), Preprocessing()),
    )
    epochs = itertools.count()

    def batches() -> Iterator[torch.Tensor]:
        loader.set_epoch(next(epochs))
        return (batch["pixel_values"] for batch in loader)

    return batches


def timm(root: Path, *, prefetcher: bool, batch_size: int, workers: int, image_size: int) -> Batches:
    """With the settings that the recipe follows. Its prefetcher normalises and erases whole batches on the device."""
    try:
        from timm.data import create_dataset, create_loader
    except ImportError as error:
        raise UserError(f"{error.name} missing: pip install 'hf-poolformer[benchmark]'") from error

    loader = create_loader(
        create_dataset("", root=str(root), split="train", is_training=True),
        input_size=(3, image_size, image_size),
        batch_size=batch_size,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        interpolation="random",
        num_workers=workers,
        device=torch.device("cpu"),
        use_prefetcher=prefetcher,
    )
    return partial(map, lambda batch: batch[0], loader)


def torchvision(root: Path, *, batch_size: int, workers: int, image_size: int) -> Batches:
    """As near to the recipe as its own transforms come: another RandAugment, and bilinear throughout."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    processor = PoolFormerImageProcessor()
    steps = [
        v2.ToImage(),  # tensors are faster than PIL images, as its documentation says
        v2.RandomResizedCrop(image_size, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(num_ops=2, magnitude=9),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(processor.image_mean, processor.image_std),
        v2.RandomErasing(p=0.25, value="random"),
    ]
    loader = DataLoader(
        ImageFolder(root, v2.Compose(steps)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return partial(map, lambda batch: batch[0], loader)


def judge(
    result: LoaderResult, batches: Iterator[torch.Tensor], shape: tuple[int, ...], standard: float | None
) -> None:
    """Sets status, mean and note: whether an epoch holds batches of this shape, float32, normalised, as the standard's
    mean says."""
    means, deviations = [], []
    result.status = "failed"
    for batch in batches:
        if batch.dtype != torch.float32 or tuple(batch.shape) != shape:
            result.note = f"{batch.dtype} {tuple(batch.shape)}, not float32 {shape}"
            return
        means.append(batch.mean().item())
        deviations.append(batch.std().item())
    if not means:
        result.note = "no batches"
        return
    result.mean, deviation = statistics.mean(means), statistics.mean(deviations)
    near = standard is None or abs(result.mean - standard) <= DIFFERENCE
    if near and MEANS[0] <= result.mean <= MEANS[1] and DEVIATIONS[0] <= deviation <= DEVIATIONS[1]:
        result.status = "passed"
    else:
        result.note = f"mean {result.mean:.2f}, standard deviation {deviation:.2f}"
