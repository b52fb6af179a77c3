"""Settings of `hf-poolformer evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..foundation.errors import UserError
from ..foundation.settings import SettingsParser, altered, check_values, names_of, setting
from ..foundation.tasks import Task
from ..settings.data import AnnotationSettings, CheckpointSettings, LabelledSettings, SeveralLabelsSettings


@dataclass
class EvaluationSettings(SeveralLabelsSettings, LabelledSettings, AnnotationSettings, CheckpointSettings):
    """Everything that evaluating a checkpoint needs to know: `evaluation.classification`, and `evaluation.dense` for
    segmenters and detectors.

    Attributes:
        task: key of `TASKS`, of a segmenter or detector; it is told from the model.
    """

    _argument_group_name = "evaluation"

    model: str | None = dataclasses.field(default=None, init=False)  # the positional argument
    task: str | None = dataclasses.field(default=None, init=False)
    validation_dir: str | None = altered(
        LabelledSettings, "validation_dir", None, "Folder with the images, one folder per class."
    )
    split: str | None = setting(None, "Name of the split. Unset: validation, valid, dev or test.")
    train_val_split: float | None = setting(
        None,
        "Measure on the part that training held out with this setting. Unset: the run's own, where the images are "
        "those it was trained on; else, and with 0, all of them.",
    )
    per_device_eval_batch_size: int | None = setting(
        None, "Images per device. Unset: 64; of segmenters and detectors 1.", ["--batch_size"], low=1
    )
    reduce_labels: bool | None = altered(
        AnnotationSettings,
        "reduce_labels",
        None,
        "Annotation maps count classes from 1, and 0 is no class: ADE20K's 150 classes. Unset: as in training.",
    )
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

    def check_for(self, task: Task) -> None:
        """
        Refuses what is said to another kind of model.

        Args:
            task: the model's.

        Raises:
            UserError: a setting was given that says nothing to models for this task.
        """
        strange = [*names_of(LabelledSettings), *names_of(SeveralLabelsSettings), "slice_by"]
        known, others = set(names_of(AnnotationSettings)), "classifiers and regressors"
        if not task.is_dense:
            strange, known, others = list(known), {*strange, "label_names"}, "segmenters and detectors"
        for name in strange:
            default = type(self).__dataclass_fields__[name].default
            if name not in {*known, "label_names"} and getattr(self, name) != default:
                raise UserError(f"--{name} is for {others}, and {self.model} is another model: {task.noun}.")


def parse_evaluation(argv: Sequence[str] | None = None, prog: str | None = None) -> EvaluationSettings:
    """Settings of `hf-poolformer evaluate` from the command line."""
    parser = SettingsParser(
        EvaluationSettings,
        positional="MODEL [DATASET]",
        prog=prog,
        description="Evaluates a classifier, regressor, segmenter or detector on a labelled dataset.",
    )
    parser.add_argument("model", metavar="MODEL", help="Checkpoint: a Hub id or a folder.")
    parser.take_dataset()
    told = parser.parse(argv)
    model = told.pop("model")
    settings = EvaluationSettings(**told)
    settings.model = model
    return settings
