"""Settings of `hf-poolformer evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..foundation.errors import UserError
from ..foundation.origin import Origin
from ..foundation.settings import SettingsParser, setting


@dataclass
class EvaluationSettings:
    """Everything that `evaluation.classification.evaluate_checkpoint` needs to know."""

    model: str | None = dataclasses.field(default=None, init=False)  # the positional argument
    dataset_name: str | None = setting(None, "Hub id, or a folder or file: image folder, Parquet, WebDataset tars.")
    dataset_config_name: str | None = setting(None, "Configuration of the dataset.")
    dataset_revision: str | None = setting(None, "Branch, tag or commit of the dataset.")
    validation_dir: str | None = setting(None, "Folder with the images, one folder per class.")
    split: str | None = setting(None, "Name of the split. Unset: validation, valid, dev or test.")
    train_val_split: float | None = setting(
        None,
        "Measure on the part that training held out with this setting. Unset: the run's own, where the images are "
        "those it was trained on; else, and with 0, all of them.",
    )
    image_column_name: str | None = setting(None, "Image column. Unset: found by its type.")
    label_column_name: str | None = setting(None, "Label column. Unset: found by its type.")
    streaming: bool = setting(True, "Read the dataset as a stream rather than download it first.")
    per_device_eval_batch_size: int = setting(64, "Images per device.", ["--batch_size"])
    num_workers: int | None = setting(None, "Processes that decode images, per device. Unset: by the number of cores.")
    max_skipped: float = setting(
        0.01, "Broken images tolerated before the run stops: a fraction if below 1, else a number."
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: an accelerator if there is one.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(None, "Unset: accelerate's own setting.")
    trust_remote_code: bool = setting(False, "Run code that comes with a checkpoint from the Hub.")
    model_revision: str = setting("main", "Branch, tag or commit of the checkpoint.", ["--revision"])
    cache_dir: str | None = setting(None, "Where downloads are kept. Unset: the Hub's usual cache.")
    hub_token: str | None = setting(None, "Access token. Unset: the one you logged in with.", ["--token"])
    output_dir: str | None = setting(
        None, "Folder for all_results.json and the pictures. Unset: they are only shown.", ["--output"]
    )
    json: bool = setting(False, "Print the results as JSON, for programs.")

    def origin(self) -> Origin:
        """Of the checkpoint."""
        return Origin(self.model_revision, self.hub_token, self.cache_dir, self.trust_remote_code)

    def __post_init__(self) -> None:
        if self.train_val_split is not None and not 0 <= self.train_val_split < 1:
            raise UserError(f"--train_val_split must be at least 0 and below 1, not {self.train_val_split}.")
        if (self.dataset_name is None) == (self.validation_dir is None):
            raise UserError("give the images by either --dataset_name or --validation_dir.")
        if self.per_device_eval_batch_size < 1:
            raise UserError(f"--per_device_eval_batch_size must be at least 1, not {self.per_device_eval_batch_size}.")


def parse_evaluation(argv: Sequence[str] | None = None, prog: str | None = None) -> EvaluationSettings:
    """Settings of `hf-poolformer evaluate` from the command line."""
    parser = SettingsParser(
        (EvaluationSettings,), prog=prog, description="Evaluates an image classifier on a labelled dataset."
    )
    parser.add_argument("model", metavar="MODEL", help="Checkpoint: a Hub id or a folder.")
    names = [field.name for field in dataclasses.fields(EvaluationSettings)]
    settings, rest = parser.parse(argv, names)
    settings.model = rest.model
    return settings
