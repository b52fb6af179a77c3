"""Data on which a run takes seconds, and processes that may be killed. Everything in this room is slow."""

import hashlib
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features
from datasets.utils.logging import disable_progress_bar
from digits import FEATURES, NAMES, TINY_MODEL
from digits import digit_rows as all_digit_rows
from harness import ENOUGH, Job, make_context, train_with

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor


NUMBERS = itertools.count()


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def context(tmp_path_factory):
    made = make_context()
    # The first start waits until everything is imported.
    assert Job(made, print, ("ready",), tmp_path_factory.mktemp("context") / "log").wait(ENOUGH) == [0]
    return made


@pytest.fixture(scope="session")
def digit_rows():
    """The 1797 digits as rows of a dataset."""
    return all_digit_rows()


@pytest.fixture(scope="session")
def write_parquet():
    """Writes rows as one Parquet file, in row groups of `group` rows."""
    disable_progress_bar()

    def write(rows: list[dict], path: Path, group: int = 20) -> Path:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        features = Features({name: FEATURES[name] for name in rows[0]})
        Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=group)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A classifier of 20 thousand parameters for 32 x 32 pixels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    model = PoolFormerForImageClassification(PoolFormerConfig(**TINY_MODEL, **labels))
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.5)
    model.save_pretrained(folder)
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    PoolFormerImageProcessor(size=size[0], crop_size=size[1]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def digits(digit_rows, write_parquet, tmp_path_factory) -> Path:
    """300 digits in five Parquet files, 60 in a sixth as test split."""
    folder = tmp_path_factory.mktemp("digits")
    for number in range(5):
        write_parquet(digit_rows[number * 60 : (number + 1) * 60], folder / f"train-{number}.parquet")
    write_parquet(digit_rows[300:360], folder / "test-0.parquet")
    return folder


class Runs:
    """Trainings of seconds: 60 steps of 10 images where nothing else is said, a checkpoint every fourth."""

    def __init__(self, context, digits: Path, folder: Path):
        self._context, self._digits, self._folder = context, digits, folder
        self._whole: dict[str, tuple[Path, float]] = {}

    def start(self, output: Path, processes: int = 1, function=train_with, arguments: tuple = (), **changes) -> Job:
        values = {
            "dataset_name": str(self._digits),
            "output_dir": str(output),
            "config_overrides": json.dumps(TINY_MODEL),
            "per_device_train_batch_size": 10,
            "num_train_epochs": 2,
            "num_warmup_epochs": 0.5,
            "num_workers": 0,
            "shuffle_buffer_size": 50,
            "logging_steps": 3,
            "eval_epochs": 1,
            "checkpointing_steps": "4",
            "save_total_limit": 2,
            "resume_from_checkpoint": "latest",
            **changes,
        }
        log = output.with_name(f"{output.name}-{next(NUMBERS)}.log")
        return Job(self._context, function, (json.dumps(values), *arguments), log, processes)

    def whole(self, processes: int = 1, **changes) -> tuple[Path, float]:
        """An uninterrupted run, made once, and its duration in seconds."""
        name = f"{processes}-{hashlib.sha1(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]}"
        if name not in self._whole:
            clock = time.monotonic()
            job = self.start(self._folder / name, processes, **changes)
            assert set(job.wait(ENOUGH)) == {0}, job.output()
            self._whole[name] = self._folder / name, time.monotonic() - clock
        return self._whole[name]


@pytest.fixture(scope="session")
def runs(context, digits, tmp_path_factory) -> Runs:
    return Runs(context, digits, tmp_path_factory.mktemp("whole"))
