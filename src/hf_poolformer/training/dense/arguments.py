"""Settings of `scripts/train_dense.py`: what `training.arguments` has, and what boxes and masks need besides."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...foundation.errors import UserError
from ...foundation.settings import QuietParser, SettingsParser, as_flags, check_names, check_values, read_yaml, setting
from ...foundation.tasks import TASKS, dense_tasks
from ..arguments import (
    LIMITS,
    HubSettings,
    ModelSettings,
    OptimisationSettings,
    RunSettings,
    TrainingSettings,
    check_keep_best,
)


@dataclass
class DenseRecipeSettings:
    _argument_group_name = "recipe"

    task: str | None = setting(None, "What to train: Semantic FPN, RetinaNet or Mask R-CNN.")
    recipe: str = setting("paper", "Where all defaults come from: paper or demo.")
    config_file: str | None = setting(None, "YAML file with settings under the names of these flags.")


@dataclass
class DenseModelSettings(ModelSettings):
    _argument_group_name = "model"

    image_size: int | None = setting(800, "Shorter side to which images are resized, in pixels.")
    longest_edge: int | None = setting(1333, "Longer side at most, in pixels; wins over --image_size.")
    drop_path_rate: float | None = setting(0.0, "Stochastic depth of the last block.")


@dataclass
class DenseDataSettings:
    _argument_group_name = "data"

    dataset_name: str | None = setting(
        None, "Hub id, or a folder or file: Parquet, WebDataset tars, images with a metadata file."
    )
    dataset_config_name: str | None = setting(None, "Configuration of the dataset.")
    dataset_revision: str | None = setting(None, "Branch, tag or commit of the dataset.")
    train_split: str = setting("train", "Name of the training split.")
    validation_split: str | None = setting(
        None, "Name of the evaluation split. Unset: validation, valid, dev or test."
    )
    train_val_split: float = setting(0.15, "Part held out for validation where the dataset has no such split.")
    image_column_name: str | None = setting(None, "Image column. Unset: found by its type.")
    annotation_column_name: str | None = setting(
        None, "Column of the annotation maps, or of the objects. Unset: found by its type and name."
    )
    label_names: str | None = setting(
        None,
        "Names of the classes: separated by commas, or a JSON file with a list, with id2label, whose keys are the "
        "stored values, or with COCO's categories. Unset: the dataset's ClassLabel, else its id2label.json.",
    )
    bbox_format: Literal["xywh", "xyxy", "cxcywh"] = setting(
        "xywh",
        "Boxes in the dataset, in pixels: left, top, width, height as in COCO; left, top, right, bottom; or centre x "
        "and y, width, height.",
    )
    annotation_pixels: Literal["auto", "stored", "upright"] = setting(
        "auto",
        "Of images that EXIF turns, the pixels that boxes, masks and maps count: those of the stored image, or of the "
        "upright one. auto: told by their size, or by the row's width and height; where these say nothing, by where "
        "boxes fit, else stored.",
    )
    reduce_labels: bool = setting(
        False,
        "Annotation maps count classes from 1, and 0 is no class: ADE20K's 150 classes. 0 is then ignored. Keys of "
        "id2label that begin at 0 count from the first class, others are the stored values.",
    )
    check_annotations: bool = setting(
        True,
        "Refuse annotations that cannot be meant as they are read, by a look at the first few hundred: boxes in other "
        "units, masks without a pixel, values that no class has. false says so and goes on.",
    )
    streaming: bool = setting(True, "Read the dataset as a stream rather than download it first.")
    shuffle_buffer_size: int = setting(1000, "Images (still encoded) among which the stream is shuffled.")
    num_workers: int | None = setting(None, "Processes that decode images, per device. Unset: by the number of cores.")
    max_skipped: float = setting(
        0.01,
        "Images with broken pixels or annotations tolerated before the run stops: a fraction if below 1, else a "
        "number.",
    )
    max_skipped_shards: int = setting(
        0, "Shards tolerated, per process and epoch, that end early: truncated, gone. Network trouble is waited for."
    )


@dataclass
class GeometrySettings:
    _argument_group_name = "augmentation"

    scale_min: float = setting(1.0, "Images are resized to between this ...")
    scale_max: float = setting(1.0, "... and this many times their size in evaluation.")
    crop_size: int | None = setting(None, "Side of the random square crop, in pixels; smaller images are padded.")
    max_class_share: float = setting(
        1.0, "Segmentation: a crop is drawn again, up to ten times, while one class covers more than this part."
    )
    horizontal_flip: float = setting(0.5, "Probability of a horizontal flip.")
    photometric_distortion: bool = setting(False, "Random brightness, contrast, saturation and hue.")


@dataclass
class ScheduleSettings(OptimisationSettings):
    _argument_group_name = "optimisation"

    num_train_epochs: int = setting(12, "Passes over the training data.")
    per_device_train_batch_size: int = setting(16, "Images per device and micro-batch.")
    learning_rate: float = setting(1e-4, "Peak learning rate.")
    lr_scheduler_type: Literal["poly", "step", "cosine", "linear", "constant"] = setting(
        "step", "Course after warm-up."
    )
    lr_power: float = setting(0.9, "Exponent of the course 'poly'.")
    lr_steps: str = setting("8,11", "Epochs after which the course 'step' multiplies the learning rate by --lr_gamma.")
    lr_gamma: float = setting(0.1, "See --lr_steps.")
    num_warmup_steps: int | None = setting(500, "Linear warm-up in optimiser steps.")
    warmup_learning_rate: float = setting(1e-7, "Learning rate of the first step.")
    min_learning_rate: float = setting(0.0, "Learning rate at the end of 'poly', 'cosine' and 'linear'.")
    weight_decay: float = setting(1e-4, "Weight decay of AdamW; never on norms, biases and scales.")
    layer_decay: float = setting(
        1.0, "Factor on the learning rate per block on the way from the head down to the stem; 1: off."
    )
    max_grad_norm: float = setting(0.0, "Longest gradient; 0: no clipping.")


@dataclass
class DenseRunSettings(RunSettings):
    _argument_group_name = "run"

    logging_steps: int = setting(50, "Optimiser steps between two points of the training curve.")
    per_device_eval_batch_size: int = setting(1, "Images per device when evaluating.")


GROUPS = (
    DenseRecipeSettings,
    DenseModelSettings,
    DenseDataSettings,
    GeometrySettings,
    ScheduleSettings,
    DenseRunSettings,
    HubSettings,
)

# arXiv 2111.11418, sections 4.2 and 4.3, and the configurations of the official repository (detection/configs,
# segmentation/configs): what the fields above say, which are RetinaNet's, and this.
PAPER: dict[str, dict[str, Any]] = {
    "object-detection": {},
    "instance-segmentation": {"learning_rate": 2e-4, "warmup_learning_rate": 2e-7},
    "semantic-segmentation": {
        "image_size": 512,
        "longest_edge": 2048,
        "scale_min": 0.5,
        "scale_max": 2.0,
        "crop_size": 512,
        "max_class_share": 0.75,
        "photometric_distortion": True,
        "max_train_steps": 40_000,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "poly",
        "num_warmup_steps": 0,
        "warmup_learning_rate": 0.0,
        "eval_epochs": 5,
    },
}
# Small models from scratch on small images, in minutes on two cores: examples/tuxpaint_stamps.py.
SMALL_BACKBONE = '"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 192], "layer_scale_init_value": 0.1'
DEMO: dict[str, Any] = {
    "config_name": "poolformer_s12",
    "image_size": 128,
    "longest_edge": 128,
    "num_train_epochs": 20,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "lr_scheduler_type": "poly",
    "learning_rate": 2e-3,
    "num_warmup_steps": 100,
    "warmup_learning_rate": 1e-5,
    "max_grad_norm": 5.0,
    "num_workers": 1,
    "logging_steps": 10,
    "eval_epochs": 5,
}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {task: {"model_name_or_path": "sail/poolformer_s12", **changes} for task, changes in PAPER.items()},
    "demo": {
        "semantic-segmentation": {
            **DEMO,
            "config_overrides": f'{{{SMALL_BACKBONE}, "fpn_feature_size": 64, "decoder_hidden_size": 32}}',
            "num_train_epochs": 12,
            "eval_epochs": 3,
            "scale_min": 0.75,
            "scale_max": 1.5,
            "crop_size": 128,
        },
        "object-detection": {
            **DEMO,
            "config_overrides": f'{{{SMALL_BACKBONE}, "fpn_feature_size": 64, "max_detections": 20}}',
        },
        "instance-segmentation": {
            **DEMO,
            "config_overrides": f'{{{SMALL_BACKBONE}, "fpn_feature_size": 64, "box_head_hidden_size": 256, '
            '"mask_head_num_convs": 2, "rpn_num_proposals": 200, "rpn_batch_size": 128, "roi_batch_size": 64, '
            '"max_detections": 20}',
            "num_train_epochs": 5,
            "eval_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
        },
    },
}

DENSE_LIMITS: dict[str, tuple[float, float]] = {
    "image_size": (32, 10_000),
    "longest_edge": (32, 10_000),
    "scale_min": (0.05, 20),
    "scale_max": (0.05, 20),
    "crop_size": (32, 10_000),
    "max_class_share": (0.05, 1),
    "lr_power": (0, 100),
    "lr_gamma": (0, 1),
}


@dataclass
class DenseSettings(
    HubSettings,
    DenseRunSettings,
    ScheduleSettings,
    GeometrySettings,
    DenseDataSettings,
    DenseModelSettings,
    DenseRecipeSettings,
):
    """Everything that `training.dense.loop.train` needs to know.

    Raises:
        UserError: a value that is out of range, or two settings that exclude each other.
    """

    # What the dataclass of the classifier does with the fields that both have.
    overrides = TrainingSettings.overrides
    to_dict = TrainingSettings.to_dict
    save = TrainingSettings.save

    def __post_init__(self) -> None:
        if isinstance(self.config_overrides, dict):
            self.config_overrides = json.dumps(self.config_overrides)
        self.check()

    @classmethod
    def from_recipe(cls, task: str, recipe: str = "paper", **settings: Any) -> DenseSettings:
        """The settings of a recipe with some of them changed."""
        check_names(settings, [field.name for field in dataclasses.fields(cls)], "setting")
        return cls(**{**defaults_of(task, recipe, settings), "task": task, "recipe": recipe, **settings})

    def check(self) -> None:
        check_task(self.task)
        check_values(self, {**LIMITS, **DENSE_LIMITS})
        check_keep_best(self.keep_best, TASKS[self.task].kept_by)
        if self.output_dir is None:
            raise UserError("say where the run is to be written: --output_dir FOLDER.")
        if self.dataset_name is None:
            raise UserError("give the data by --dataset_name: a Hub id or a folder.")
        if self.model_name_or_path and self.config_name:
            raise UserError(
                "--model_name_or_path (start from a checkpoint) and --config_name (from scratch) exclude each other."
            )
        if not self.model_name_or_path and not self.config_name:
            raise UserError("give a checkpoint with --model_name_or_path or an architecture with --config_name.")
        if self.checkpointing_steps not in ("epoch", "no") and not (
            self.checkpointing_steps.isdigit() and int(self.checkpointing_steps) > 0
        ):
            raise UserError(
                f"--checkpointing_steps takes a number of steps, 'epoch' or 'no', not {self.checkpointing_steps!r}."
            )
        if self.scale_min > self.scale_max:
            raise UserError(f"--scale_min {self.scale_min} is larger than --scale_max {self.scale_max}.")
        if self.longest_edge < self.image_size:
            raise UserError(f"--longest_edge {self.longest_edge} is smaller than --image_size {self.image_size}.")
        if self.reduce_labels and TASKS[self.task].reads != "map":
            raise UserError("--reduce_labels is about annotation maps, which only semantic segmentation has.")
        self.overrides()
        self.step_epochs()

    def step_epochs(self) -> list[float]:
        """`lr_steps` as numbers."""
        try:
            epochs = [float(part) for part in self.lr_steps.split(",") if part.strip()]
        except ValueError as error:
            raise UserError(
                f"--lr_steps takes epochs separated by commas, such as 8,11, not {self.lr_steps!r}."
            ) from error
        if any(not 0 < epoch < float("inf") for epoch in epochs):
            raise UserError(f"--lr_steps takes epochs above 0, not {self.lr_steps!r}.")
        return epochs


def check_task(task: str | None) -> None:
    known = dense_tasks()
    if task not in known:
        raise UserError(f"say what to train: --task {', '.join(known[:-1])} or {known[-1]}.")


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> DenseSettings:
    """Settings from the command line: a flag wins over the YAML file, and that over the recipe.

    Raises:
        UserError: unknown flags, keys, recipes or tasks (with what was probably meant), and values that do not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = QuietParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--recipe")
    first.add_argument("--config_file", "--config-file")
    known, _ = first.parse_known_args(argv)
    from_file = read_yaml(known.config_file) if known.config_file else {}
    names = [field.name for field in dataclasses.fields(DenseSettings)]
    check_names(from_file, names, f"key in {known.config_file}")

    task = known.task or from_file.get("task")
    recipe = known.recipe or str(from_file.get("recipe") or "paper")
    parser = SettingsParser(
        GROUPS,
        prog=prog,
        description="Trains a segmenter or detector on a streamed dataset. Several devices: accelerate launch -m "
        "hf_poolformer train-dense ...",
        epilog="--task TASK --recipe NAME --help shows the defaults of that task and recipe.",
    )
    flags = parser.names_in(argv) | {name for name, value in from_file.items() if value is not None}
    if task is None and not {"help", "-h"} & {text.lstrip("-") if text != "-h" else text for text in argv}:
        check_task(task)
    parser.set_defaults(**defaults_of(task or "object-detection", recipe, flags), task=task, recipe=recipe)
    parser.set_choices("task", dense_tasks())
    # An explicit null in the file unsets what the recipe set.
    unset = [name for name, value in from_file.items() if value is None and name not in ("task", "recipe")]
    parser.set_defaults(**dict.fromkeys(unset))
    parts = parser.parse(as_flags(from_file, DenseSettings) + argv, names)
    return DenseSettings(**{key: value for part in parts for key, value in vars(part).items()})


def defaults_of(task: str, recipe: str, given: Any = ()) -> dict[str, Any]:
    """What a recipe sets for a task, less what makes no sense beside the settings that were given."""
    check_names([recipe], list(RECIPES), "recipe")
    check_names([task], dense_tasks(), "task")
    defaults = dict(RECIPES[recipe].get(task, {}))
    # A checkpoint replaces an architecture and the other way round; its head knows its own image size.
    if "model_name_or_path" in given:
        for name in ("config_name", "config_overrides"):
            defaults.pop(name, None)
    if "config_name" in given:
        for name in ("model_name_or_path", "config_overrides"):
            defaults.pop(name, None)
    return defaults
