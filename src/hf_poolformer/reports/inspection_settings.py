"""Settings of `hf-poolformer inspect`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..evaluation.settings import EvaluationSettings
from ..foundation.names import printable
from ..foundation.settings import SettingsParser, altered, check_names, check_values, setting
from ..foundation.tasks import TASKS
from ..settings.classification import RECIPES, ChannelSettings
from ..settings.data import CheckpointSettings, LabelledSettings, SeveralLabelsSettings, SplitSettings
from ..settings.training import RunSettings


# What `--fail_on` knows -> what it means.
FAULTS = {
    "leaks": "images of one split that are in another, too, or nearly so",
    "duplicates": "images that are several times in a split, or nearly so",
    "broken": "images that cannot be read",
    "contradictions": "pictures that are there several times with different labels",
}
# Flags by which data is opened here as in training.
OPENED_BY = ("dataset_config_name", "image_column_name", "label_column_name", "label_separator", "label_names")
# Exit status where one of them was found.
FAULTY = 4


@dataclass
class InspectionSettings(SeveralLabelsSettings, LabelledSettings, CheckpointSettings):
    """What is to be looked at, and how."""

    _argument_group_name = "inspection"

    dataset_name: str | None = dataclasses.field(default=None, init=False)  # the positional argument
    max_skipped: float = dataclasses.field(default=1.0, init=False)  # every broken image is told, and none ends it
    validation_dir: str | None = altered(
        LabelledSettings, "validation_dir", None, "Folder with validation images, where they lie elsewhere."
    )
    train_split: str = altered(SplitSettings, "train_split", "train")
    validation_split: str | None = altered(SplitSettings, "validation_split", None)
    task: Literal["auto", "image-classification", "multi-label-classification", "image-regression"] = setting(
        "auto", "What the labels are. auto: told by their columns."
    )
    recipe: str | None = setting(
        None, f"Recipe whose augmentation is shown: {', '.join(RECIPES)}. Unset: the one that is suggested."
    )
    model: str | None = setting(
        None,
        "Checkpoint whose features tell which images look like another class than their own: a Hub id or a folder.",
        path=True,
    )
    num_channels: int | None = altered(
        ChannelSettings, "num_channels", None, "Channels of the images, where they are not RGB."
    )
    max_images: int | None = setting(None, "Images of each split at most. Unset: all.", low=1)
    fail_on: str | None = setting(
        None,
        f"Exit status {FAULTY} where there are any of these, separated by commas: {', '.join(FAULTS)}.",
        in_file="list",
        decides=False,
    )
    seed: int = altered(RunSettings, "seed", 42, "Seed of the choice of images that are shown.")
    per_device_eval_batch_size: int = altered(EvaluationSettings, "per_device_eval_batch_size", 64)
    device: str = altered(EvaluationSettings, "device", "auto")
    output_dir: str | None = setting(
        None,
        "Folder for report.html, report.json and images.parquet. Unset: inspection-NAME, with the dataset's name.",
        ["--output"],
        path=True,
        decides=False,
    )
    overwrite: bool = setting(False, "Replace a report that is in the folder.", decides=False)
    json: bool = setting(False, "Print the findings as JSON, for programs.", decides=False)

    def __post_init__(self) -> None:
        check_values(self)
        check_names(self.faults, list(FAULTS), "word in --fail_on")
        check_names(filter(None, [self.recipe]), list(RECIPES), "recipe")

    @property
    def faults(self) -> list[str]:
        """Those that `fail_on` names."""
        return [word.strip() for word in (self.fail_on or "").split(",") if word.strip()]

    @property
    def name(self) -> str:
        """The dataset's, fit for a folder."""
        name = printable(Path(self.dataset_name).name or Path(self.dataset_name).resolve().name)
        return re.sub(r"[^\w.-]+", "-", name)[:60].strip("-.") or "dataset"

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return Path(self.output_dir or f"inspection-{self.name}")

    @property
    def opening(self) -> dict[str, Any]:
        """What `data.datasets.open_every_split` is told."""
        place = "train_dir" if self.validation_dir else "dataset_name"
        names = (*OPENED_BY, "validation_dir", "train_split", "validation_split", "cache_dir", "streaming")
        problem = None if self.task == "auto" else TASKS[self.task].problem_type
        access = {"revision": self.dataset_revision, "token": self.hub_token, "problem_type": problem}
        return {place: self.dataset_name, **{name: getattr(self, name) for name in names}, **access}

    @property
    def data_flags(self) -> dict[str, str]:
        """What says to `train` where the same data is."""
        place = "train_dir" if self.validation_dir else "dataset_name"
        flags = {place: self.dataset_name}
        for name in (*OPENED_BY, "validation_dir", "dataset_revision", "num_channels"):
            if getattr(self, name) is not None:
                flags[name] = getattr(self, name)
        return flags


def parse_inspection(argv: Sequence[str] | None = None, prog: str | None = None) -> InspectionSettings:
    """Settings of `hf-poolformer inspect` from the command line."""
    parser = SettingsParser(
        InspectionSettings,
        positional="DATASET",
        prog=prog,
        description="Looks at a dataset before anything is trained on it: classes, sizes, broken images, duplicates, "
        "leaks between splits, what augmentation makes of it; and suggests flags for train.",
        epilog=f"Exit status: 0; {FAULTY} where something is found that --fail_on names; 2 for a mistake.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="A Hub id, or a folder or file, as train takes it.")
    told = parser.parse(argv)
    dataset = told.pop("dataset")
    settings = InspectionSettings(**told)
    settings.dataset_name = dataset
    return settings
