"""Settings of segmenters and detectors: what differs from those of all runs, and what boxes and masks need besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..foundation.errors import UserError
from ..foundation.settings import altered, setting
from ..foundation.tasks import TASKS
from .data import DenseDataSettings
from .training import (
    ModelSettings,
    OptimisationSettings,
    PublishingSettings,
    RecipeSettings,
    RunSettings,
    TrainingSettings,
)


@dataclass
class DenseRecipeSettings(RecipeSettings):
    recipe: str = altered(RecipeSettings, "recipe", "paper", "Where all defaults come from: paper or demo.")


@dataclass
class DenseModelSettings(ModelSettings):
    image_size: int | None = altered(
        ModelSettings, "image_size", 800, "Shorter side to which images are resized, in pixels.", low=32, high=10_000
    )
    longest_edge: int | None = setting(
        1333, "Longer side at most, in pixels; wins over --image_size.", low=32, high=10_000, shown=True
    )
    drop_path_rate: float | None = altered(ModelSettings, "drop_path_rate", 0.0, "Stochastic depth of the last block.")


@dataclass
class GeometrySettings:
    _argument_group_name = "augmentation"

    scale_min: float = setting(1.0, "Images are resized to between this ...", low=0.05, high=20, shown=True)
    scale_max: float = setting(1.0, "... and this many times their size in evaluation.", low=0.05, high=20, shown=True)
    crop_size: int | None = setting(
        None, "Side of the random square crop, in pixels; smaller images are padded.", low=32, high=10_000, shown=True
    )
    max_class_share: float = setting(
        1.0,
        "Segmentation: a crop is drawn again, up to ten times, while one class covers more than this part.",
        low=0.05,
        high=1,
        shown=True,
    )
    horizontal_flip: float = setting(0.5, "Probability of a horizontal flip.", low=0, high=1, shown=True)
    photometric_distortion: bool = setting(False, "Random brightness, contrast, saturation and hue.", shown=True)


@dataclass
class DenseOptimisationSettings(OptimisationSettings):
    num_train_epochs: int = altered(OptimisationSettings, "num_train_epochs", 12)
    per_device_train_batch_size: int | Literal["auto"] = altered(
        OptimisationSettings, "per_device_train_batch_size", 16
    )
    learning_rate: float | Literal["auto"] = altered(OptimisationSettings, "learning_rate", 1e-4)
    lr_scheduler_type: Literal["poly", "step", "cosine", "linear", "constant"] = altered(
        OptimisationSettings, "lr_scheduler_type", "step"
    )
    lr_power: float = setting(0.9, "Exponent of the course 'poly'.", low=0, high=100, shown=True)
    lr_steps: str = setting(
        "8,11",
        "Epochs after which the course 'step' multiplies the learning rate by --lr_gamma.",
        shown=True,
        in_file="list",
    )
    lr_gamma: float = setting(0.1, "See --lr_steps.", low=0, high=1, shown=True)
    num_warmup_steps: int | None = altered(
        OptimisationSettings, "num_warmup_steps", 500, "Linear warm-up in optimiser steps."
    )
    warmup_learning_rate: float = altered(OptimisationSettings, "warmup_learning_rate", 1e-7)
    min_learning_rate: float = altered(
        OptimisationSettings, "min_learning_rate", 0.0, "Learning rate at the end of 'poly', 'cosine' and 'linear'."
    )
    weight_decay: float = altered(OptimisationSettings, "weight_decay", 1e-4)
    layer_decay: float = altered(OptimisationSettings, "layer_decay", 1.0)
    max_grad_norm: float = altered(OptimisationSettings, "max_grad_norm", 0.0)


@dataclass
class DenseRunSettings(RunSettings):
    logging_steps: int = altered(RunSettings, "logging_steps", 50)
    per_device_eval_batch_size: int = altered(RunSettings, "per_device_eval_batch_size", 1)


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


@dataclass
class DenseSettings(
    TrainingSettings,
    PublishingSettings,
    DenseRunSettings,
    DenseOptimisationSettings,
    GeometrySettings,
    DenseDataSettings,
    DenseModelSettings,
    DenseRecipeSettings,
):
    @classmethod
    def recipes(cls, task: str) -> Mapping[str, Mapping[str, Any]]:
        return {recipe: of_tasks.get(task, {}) for recipe, of_tasks in RECIPES.items()}

    def check(self) -> None:
        super().check()
        if self.dataset_name is None:
            raise UserError("give the data by --dataset_name: a Hub id or a folder.")
        if self.scale_min > self.scale_max:
            raise UserError(f"--scale_min {self.scale_min} is larger than --scale_max {self.scale_max}.")
        if self.longest_edge < self.image_size:
            raise UserError(f"--longest_edge {self.longest_edge} is smaller than --image_size {self.image_size}.")
        if self.reduce_labels and TASKS[self.task].reads != "map":
            raise UserError("--reduce_labels is about annotation maps, which only semantic segmentation has.")
        self.step_epochs()

    def course(self) -> dict[str, Any]:
        return {
            "kind": self.lr_scheduler_type,
            "power": self.lr_power,
            "epochs": self.step_epochs(),
            "gamma": self.lr_gamma,
        }

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
