"""Settings of `hf-poolformer evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..foundation.errors import UserError
from ..foundation.settings import SettingsParser, altered, check_values, setting
from ..settings.data import CheckpointSettings, LabelledSettings, SeveralLabelsSettings


@dataclass
class EvaluationSettings(SeveralLabelsSettings, LabelledSettings, CheckpointSettings):
    """Everything that `evaluation.classification.evaluate_checkpoint` needs to know."""

    _argument_group_name = "evaluation"

    model: str | None = dataclasses.field(default=None, init=False)  # the positional argument
    validation_dir: str | None = altered(
        LabelledSettings, "validation_dir", None, "Folder with the images, one folder per class."
    )
    split: str | None = setting(None, "Name of the split. Unset: validation, valid, dev or test.")
    train_val_split: float | None = setting(
        None,
        "Measure on the part that training held out with this setting. Unset: the run's own, where the images are "
        "those it was trained on; else, and with 0, all of them.",
    )
    per_device_eval_batch_size: int = setting(64, "Images per device.", ["--batch_size"], low=1)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: an accelerator if there is one.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(None, "Unset: accelerate's own setting.")
    output_dir: str | None = setting(
        None, "Folder for all_results.json and the pictures. Unset: they are only shown.", ["--output"]
    )
    json: bool = setting(False, "Print the results as JSON, for programs.")
    report: str | None = setting(
        None,
        "Folder for a report of single images: report.html, its figures as report.json, and a row for each image as "
        "images.parquet.",
    )
    slice_by: str | None = setting(
        None,
        "Columns of the dataset by which the report tells results apart: names with commas between them, or a pattern "
        "such as 'cam*'.",
        in_file="list",
    )
    overwrite: bool = setting(False, "Replace a report that is there already.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.train_val_split is not None and not 0 <= self.train_val_split < 1:
            raise UserError(f"--train_val_split must be at least 0 and below 1, not {self.train_val_split}.")
        if (self.dataset_name is None) == (self.validation_dir is None):
            raise UserError("give the images by either --dataset_name or --validation_dir.")
        if self.slice_by is not None and self.report is None:
            raise UserError("--slice_by is for the report: give its folder with --report.")


def parse_evaluation(argv: Sequence[str] | None = None, prog: str | None = None) -> EvaluationSettings:
    """Settings of `hf-poolformer evaluate` from the command line."""
    parser = SettingsParser(
        EvaluationSettings, prog=prog, description="Evaluates an image classifier or regressor on a labelled dataset."
    )
    parser.add_argument("model", metavar="MODEL", help="Checkpoint: a Hub id or a folder.")
    told = parser.parse(argv)
    model = told.pop("model")
    settings = EvaluationSettings(**told)
    settings.model = model
    return settings
