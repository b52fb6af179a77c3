"""Settings of `hf-poolformer compare`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..evaluation.settings import EvaluationSettings
from ..foundation.errors import UserError
from ..foundation.exported import is_exported
from ..foundation.report_folder import ROWS
from ..foundation.settings import SettingsParser, altered, check_values, names_of, setting
from ..settings.data import CheckpointSettings, LabelledSettings, ReadingSettings, SeveralLabelsSettings


# Exit status of `--fail_on worse`.
WORSE = 4


@dataclass
class ComparisonSettings(SeveralLabelsSettings, LabelledSettings, CheckpointSettings):
    """Which models are compared, on what, and how."""

    _argument_group_name = "comparison"

    a: str | None = dataclasses.field(default=None, init=False)  # the positional arguments
    b: str | None = dataclasses.field(default=None, init=False)
    dataset_name: str | None = altered(
        ReadingSettings,
        "dataset_name",
        None,
        "Hub id, or a folder or file: images in one folder per class, Parquet, or WebDataset tars. Two folders of "
        "evaluate --report need none: with it, their images are shown.",
    )
    model_revision: str = altered(CheckpointSettings, "model_revision", "main", "Branch, tag or commit of A.")
    validation_dir: str | None = altered(EvaluationSettings, "validation_dir", None)
    split: str | None = altered(EvaluationSettings, "split", None)
    train_val_split: float | None = altered(
        EvaluationSettings,
        "train_val_split",
        None,
        "Measure on the part that training held out with this setting. Unset: that of the models' own runs, where the "
        "images are those that one of them was trained on; else, and with 0, all of them.",
        low=0,
        high=0.999,
    )
    per_device_eval_batch_size: int = altered(
        EvaluationSettings, "per_device_eval_batch_size", 64, "Images per device, also when the speed is measured."
    )
    device: str = altered(EvaluationSettings, "device", "auto")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = altered(EvaluationSettings, "mixed_precision", None)
    revision_b: str = setting("main", "Branch, tag or commit of B.")
    speed: bool = setting(True, "Measure the speed, too, of two models.")
    speed_seconds: float = setting(10.0, "Seconds that are spent on it, beyond three turns of each.", low=0)
    output_dir: str | None = setting(
        None,
        "Folder for report.html, report.json and images.parquet. Unset: comparison-A-B, with the models' names.",
        ["--output"],
        path=True,
        decides=False,
    )
    overwrite: bool = setting(False, "Replace a report that is in the folder.", decides=False)
    fail_on: Literal["worse"] | None = setting(
        None, f"worse: exit status {WORSE} where B is significantly worse than A (p < 0.05).", decides=False
    )
    json: bool = setting(False, "Print what is found as JSON, for programs.", decides=False)

    def __post_init__(self) -> None:
        check_values(self)

    def check_images_named(self) -> None:
        """Raises a UserError unless it is said, once, where the images are."""
        if self.dataset_name is not None and self.validation_dir is not None:
            raise UserError("give the images by either --dataset_name or --validation_dir.")
        if not self.has_images and not (is_evaluation(self.a) and is_evaluation(self.b)):
            raise UserError(
                "give the images by --dataset_name or --validation_dir; only two folders that evaluate --report wrote "
                "have been measured already."
            )
        if self.folder.resolve() in (Path(name).resolve() for name in (self.a, self.b) if is_evaluation(name)):
            raise UserError(f"--output {self.folder} is what is compared: give another folder.")

    @property
    def has_images(self) -> bool:
        return (self.dataset_name or self.validation_dir) is not None

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        if self.output_dir:
            return Path(self.output_dir)
        # What every file system takes.
        names = [re.sub(r"[^\w.=+-]+", "-", Path(name).resolve().name)[-60:] for name in (self.a, self.b)]
        return Path(f"comparison-{names[0]}-{names[1]}")

    def name_of(self, side: Literal["A", "B"]) -> str:
        return self.a if side == "A" else self.b

    def of_model(self, side: Literal["A", "B"]) -> EvaluationSettings:
        """For the evaluation of one of them."""
        own = {"output_dir", "overwrite", "json"}
        common = {
            name: getattr(self, name)
            for name in names_of(EvaluationSettings)
            if hasattr(self, name) and name not in own
        }
        if side == "B":
            common["model_revision"] = self.revision_b
        settings = EvaluationSettings(**common)
        settings.model = self.name_of(side)
        return settings


def is_evaluation(name: str) -> bool:
    """Whether this is the folder of a report of `evaluate`, and no model that one was written to."""
    folder = Path(name)
    return (folder / ROWS).is_file() and not (folder / "config.json").is_file() and not is_exported(folder)


def parse_comparison(argv: Sequence[str] | None = None, prog: str | None = None) -> ComparisonSettings:
    """Settings of `hf-poolformer compare` from the command line."""
    parser = SettingsParser(
        ComparisonSettings,
        positional="A B [DATASET]",
        prog=prog,
        description="Compares two image classifiers or regressors on the same images: which is better, on which "
        "images, and whether that may be chance. A and B are each a folder or Hub id of a model, a folder that export "
        "wrote, or a folder that evaluate --report wrote.",
    )
    parser.add_argument("a", metavar="A", help="The model that was there before, say.")
    parser.add_argument("b", metavar="B", help="The one that may take its place.")
    parser.take_dataset()
    told = parser.parse(argv)
    names = told.pop("a"), told.pop("b")
    settings = ComparisonSettings(**told)
    settings.a, settings.b = names
    settings.check_images_named()
    return settings
