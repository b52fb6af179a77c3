"""`predict`: from inputs of any length to a table, or to a folder of parts that survives being killed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..foundation.errors import UserError
from ..foundation.files import make_folder
from ..foundation.folders import hold
from ..foundation.origin import Origin
from .inference import Predictor, make_loader, workers_for
from .inputs import HubDataset, Images, Position, Shard, find_images
from .parts import (
    BROKEN,
    Parts,
    Rows,
    claim_folder,
    claimed_run,
    clear_folder,
    describe_run,
    is_claimed,
    offer_run,
    remove_left_overs,
)
from .tables import check_parquet, check_table, table
from .ways import choose_way


PART_SIZE = 10_000


@dataclass
class Summary:
    """What a call of `predict` did.

    Attributes:
        predicted, broken: images in the output; of a folder that is not complete yet, this process's.
        before: images that an earlier start of this process's share had written already.
        seconds, rate: of this call; the rate is in images per second and process.
        examples: describe the first few broken images it met.
        complete: nothing is missing in the output.
        held_back: images of this call that the CPU decoded although the device was to, being no plain JPEGs.
    """

    output: Path
    predicted: int = 0
    broken: int = 0
    before: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    examples: list[str] = field(default_factory=list)
    complete: bool = True
    held_back: int = 0

    def __str__(self) -> str:
        where = BROKEN if self.output.is_dir() else "the column `error`"
        broken = f", {self.broken} broken (see {where})" if self.broken else ""
        before = f", {self.before} of them by an earlier start" if self.before else ""
        held_back = f", {self.held_back} decoded by the CPU (no plain JPEGs)" if self.held_back else ""
        rest = "" if self.complete else "; not complete yet: other processes are at work, or have died"
        return (
            f"{self.predicted} images predicted{broken}{before}{held_back}, {self.rate:.1f} images/s, "
            f"written to {self.output}{rest}"
        )


def predict(
    model: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    embeddings: bool = False,
    batch_size: int = 32,
    part_size: int = PART_SIZE,
    device: str | torch.device = "auto",
    dtype: str = "float32",
    device_preprocessing: str = "no",
    num_workers: int | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    image_column_name: str | None = None,
    revision: str = "main",
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    process_index: int | None = None,
    num_processes: int | None = None,
    should_stop: Callable[[], object] = lambda: False,
) -> Summary:
    """Classifies images and writes one row for each, in input order, into a table or into a folder of parts.

    The columns are `path`, what the model answers, `embedding` if asked for, and `error`, null or the reason why an
    image could not be read. `path` is a file's; for a row of a dataset it is the dataset's, `#` and the row's number,
    or the name in a tar; for a dataset of the Hub in several files that is written to a folder, `#` and the file's
    number, `:` and the row's number in it. What a model answers depends on its `problem_type`:

    - One class of many: `label` and `score` of the best, the lists `labels` and `scores` of the best `top_k`. Scores
      are softmax probabilities.
    - Several labels: `labels` and `scores` of those whose probability reaches their threshold, best first, of which
      there may be none; `label` and `score` are the first, null where there is none.
    - A regression: a column of float32 for each target, called like it, in its units. A target that is called like
      another column has its number behind its name.

    A table appears under its name when it is complete. A folder fills with parts of `part_size` rows; whatever kills
    the processes, the same call goes on after the last part of each and neither repeats nor loses an image, with any
    number of processes. See `prediction/parts.py` for what the folder holds.

    Args:
        model: folder or Hub id of an image classifier; with `embeddings` also of a model without a head.
        inputs: image files, folders (searched to the bottom), globs, Parquet files, WebDataset tars, folders that
            `save_to_disk` wrote.
        output: `.parquet`, `.csv` or `.jsonl` by its suffix; without one, a folder. In CSV the lists are JSON.
        top_k: classes in `labels`, 5 if None. Of several labels, the best so many whatever their thresholds; with
            `threshold`, at most so many.
        threshold: probability from which an image has a label, in the place of the model's `label_thresholds` (or of
            0.5, where it has none).
        embeddings: also write the features that the head classifies, float32, `hidden_sizes[-1]` numbers each.
        batch_size: images at once.
        part_size: rows of a part: what a kill costs at most, for each process.
        device: `auto` takes the accelerator if there is one.
        dtype: of the model's weights and arithmetic.
        device_preprocessing: "decode" has a CUDA GPU decode the JPEGs, too; see `prediction/pixels.py`. "auto"
            measures whether that is faster; a folder that was begun keeps to its way.
        num_workers: processes that decode; chosen by the number of images and cores if None.
        dataset_name: a Hub dataset, in the place of inputs or after them.
        split, dataset_config_name: which part of it.
        image_column_name: of tables; found by its type if None.
        revision, token, cache_dir, trust_remote_code: for loading the model; the token also for the dataset.
        overwrite: replaces an existing output; a folder's parts are deleted.
        progress: shows a bar, on the first process.
        process_index, num_processes: this process's among all that fill the folder; None takes them from the
            environment that `accelerate launch` and torchrun set.
        should_stop: asked after each batch; when it says so, KeyboardInterrupt is raised.

    Raises:
        UserError: no model, no images, a choice that the model does not give, an output that cannot be written or
            holds something else, storage that stays out of reach. A broken image is a row, not an error.
    """
    output = Path(output)
    index, processes = _place(process_index, num_processes)
    if batch_size < 1 or part_size < 1:
        raise UserError(f"batch_size and part_size must be at least 1, not {batch_size} and {part_size}")
    to_folder = not output.suffix
    if to_folder:
        check_parquet()
        _check_folder(output, overwrite)
    elif processes > 1:
        raise UserError(f"several processes fill a folder of parts: give an --output without {output.suffix}")
    else:
        check_table(output, overwrite)
    images: list[Images] = [*find_images(inputs, image_column_name=image_column_name, leave_out=output)]
    if dataset_name is not None:
        options = {"config_name": dataset_config_name, "split": split, "image_column_name": image_column_name}
        images.append(HubDataset(dataset_name, {**options, "token": token, "cache_dir": cache_dir}))
    if not images:
        raise UserError("there is nothing to predict: give files, folders or a dataset")
    origin = Origin(revision, token, cache_dir, trust_remote_code)
    auto = device_preprocessing == "auto"
    how = {"device": device, "dtype": dtype, "device_preprocessing": "no" if auto else device_preprocessing}
    how |= {"top_k": top_k, "threshold": threshold, "embeddings": embeddings}
    predictor = Predictor(str(model), origin=origin, **how)
    job = Job(predictor, images, output, batch_size, num_workers, progress and index == 0, should_stop, auto)
    if not to_folder:
        return job.fill_table()
    make_folder(output)
    # A restart by torchrun goes on with what this very job has begun to write.
    if overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        _clear_together(output, index, processes)
    about = {"model_name": str(model), "given": [os.fspath(text) for text in inputs], "dataset_name": dataset_name}
    with hold(output, f".process-{index}.lock"):  # two that do the same would remove each other's unfinished parts
        return job.fill_folder(part_size, index, processes, about)


@dataclass
class Job:
    """What is predicted by what, and how it is followed.

    Attributes:
        auto: whether `predictor.preprocessing` is to be chosen first.
    """

    predictor: Predictor
    images: list[Images]
    output: Path
    batch_size: int
    num_workers: int | None
    progress: bool
    should_stop: Callable[[], object]
    auto: bool = False

    def fill_table(self) -> Summary:
        """One file, by one process; it takes its name when it is complete."""
        counts = [part.count for part in self.images]
        total = None if None in counts else sum(counts)
        shards = [shard for part in self.images for shard in part.shards(None)]
        if self.auto:
            self._choose(shards, total)
        items = (item for shard in shards for item in shard.read(Position()))
        batches = ((batch, None) for batch in iter(lambda: list(islice(items, self.batch_size)), []))
        loader = self._loader(batches, total)
        return self._follow(self._write_table(loader), total, Summary(self.output))

    def fill_folder(self, part_size: int, index: int, processes: int, about: dict[str, Any]) -> Summary:
        """This process's share of the parts, as far as they are not there yet.

        Args:
            about: for the manifest.
        """
        shards = [shard for part in self.images for shard in part.shards(part_size)]
        if self.auto:
            self._choose_together(shards, part_size, about)
        run = claim_folder(self.output, describe_run(self.predictor, shards, part_size), about)
        mine = range(index, len(shards), processes)
        remove_left_overs(self.output, mine)
        parts = Parts(self.output, run, len(shards))
        progress = parts.progress({number: shards[number].state() for number in mine})
        total: int | None = 0
        before = 0
        for number, (_, part) in progress.items():
            rows = part.position["row"] if part is not None else 0
            before += rows
            if part is not None and part.last:
                continue
            count = shards[number].count
            total = None if total is None or count is None else total + count - rows
        batches = parts.batches(shards, progress, part_size, self.batch_size)
        loader = self._loader(batches, total)
        whose = f"process 1 of {processes}" if processes > 1 else None
        written = parts.write(self.predictor.rows, self._table, loader)
        summary = self._follow(written, total, Summary(self.output, before=before), whose)
        whole = parts.finish()
        if whole is not None:
            summary.predicted, summary.broken = whole["predicted"], whole["broken"]
        else:
            summary.predicted, summary.complete = summary.predicted + before, False
        return summary

    def _choose_together(self, shards: Sequence[Shard], part_size: int, about: dict[str, Any]) -> None:
        """The way of the folder, whoever began it; of several processes that begin it, the first chooses for all."""
        there = claimed_run(self.output)
        if there is None:
            counts = [shard.count for shard in shards]
            self._choose(shards, None if None in counts else sum(counts))
            offer_run(self.output, describe_run(self.predictor, shards, part_size), about)
            there = claimed_run(self.output) or {}
        where = there.get("device_preprocessing", self.predictor.preprocessing.where)
        if where == self.predictor.preprocessing.where:
            return
        try:
            self.predictor.preprocess(where)
        except UserError as error:
            raise UserError(f"{self.output} was begun with --device_preprocessing {where}. {error}") from error

    def _choose(self, shards: Sequence[Shard], total: int | None) -> None:
        """By measuring, and says why."""
        items = (item for shard in shards for item in shard.read(Position()))
        workers = workers_for(self.batch_size, total, self.num_workers)
        where, statement = choose_way(self.predictor, items, total, self.batch_size, workers)
        self.predictor.preprocess(where)
        if statement and self.progress:
            print(statement, file=sys.stderr)

    def _loader(self, batches: Iterator[tuple[list[Any], Any]], total: int | None) -> Any:
        pin_memory = self.predictor.device.type == "cuda"
        load = self.predictor.preprocessing.load
        return make_loader(load, batches, self.batch_size, total, self.num_workers, pin_memory)

    def _table(self, path: Path, metadata: Callable[[], dict[str, str]] | None = None) -> Any:
        return table(path, ("path", *self.predictor.columns, "error"), self.predictor.embedding_size, metadata)

    def _write_table(self, loader: Any) -> Iterator[Rows]:
        with self._table(self.output) as write:
            for decoded, _ in loader:
                rows = self.predictor.rows(decoded)
                write(rows)
                yield rows

    def _follow(
        self, predicted: Iterator[Rows], total: int | None, summary: Summary, whose: str | None = None
    ) -> Summary:
        """Counts what is written, shows it, and stops when asked to."""
        start = time.perf_counter()
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=total, unit=" images", desc=whose, disable=not self.progress, mininterval=0.5 if terminal else 10
        )
        # Closed, not left to the garbage collector: an unfinished file is removed when its generator is.
        with bar, closing(predicted):
            for rows in predicted:
                errors = [f"{row['path']}: {row['error']}" for row in rows if row["error"] is not None]
                summary.predicted += len(rows) - len(errors)
                summary.broken += len(errors)
                summary.examples += errors[: 5 - len(summary.examples)]
                bar.update(len(rows))
                if summary.broken:
                    bar.set_postfix_str(f"{summary.broken} broken", refresh=False)
                if self.should_stop():
                    raise KeyboardInterrupt
        summary.seconds = time.perf_counter() - start
        summary.held_back = self.predictor.preprocessing.held_back
        summary.rate = (summary.predicted + summary.broken) / max(summary.seconds, 1e-9)
        return summary


def _place(index: int | None, processes: int | None) -> tuple[int, int]:
    """Which of how many processes this is."""
    processes = int(os.environ.get("WORLD_SIZE", 1)) if processes is None else processes
    index = int(os.environ.get("RANK", 0)) if index is None else index
    if not 0 <= index < processes:
        raise UserError(f"there is no process {index} among {processes}")
    return index, processes


def _check_folder(output: Path, overwrite: bool) -> None:
    """Raises a UserError, before the model is loaded, for a folder that is certainly not one of predictions."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} exists and is not a folder: give another --output")
    if output.is_dir() and not overwrite and not is_claimed(output):
        names = [path.name for path in output.iterdir() if not path.name.startswith(".")]
        if names and not is_claimed(output):  # asked again: another process may just have begun
            raise UserError(f"{output} holds other files, {sorted(names)[0]} for one: give another --output")


def _clear_together(output: Path, index: int, processes: int) -> None:
    """The first process empties the folder before any begins to fill it."""
    if index == 0:
        clear_folder(output)
    if processes > 1:
        import torch.distributed as dist

        started = not dist.is_initialized()
        if started:
            dist.init_process_group("gloo")
        dist.barrier()
        if started:
            dist.destroy_process_group()
