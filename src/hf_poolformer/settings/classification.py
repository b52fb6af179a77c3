"""Settings of classifiers, and their recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..foundation.errors import UserError
from ..foundation.settings import setting
from .data import ClassificationDataSettings
from .training import (
    ModelSettings,
    OptimisationSettings,
    PublishingSettings,
    RecipeSettings,
    RunSettings,
    TrainingSettings,
)


@dataclass
class AugmentationSettings:
    _argument_group_name = "augmentation"

    crop_min_scale: float = setting(
        0.35, "Smallest part of the image's area that a random crop takes; 1: no crop.", low=0.01, high=1, shown=True
    )
    horizontal_flip: float = setting(0.5, "Probability of a horizontal flip.", low=0, high=1, shown=True)
    affine_degrees: float = setting(0.0, "Random rotation up to this many degrees.", low=0, high=180, shown=True)
    affine_translate: float = setting(0.0, "Random shift up to this part of the side.", low=0, high=1, shown=True)
    affine_scale: float = setting(0.0, "Random zoom by up to this part, in or out.", low=0, high=0.9, shown=True)
    rand_augment_magnitude: float = setting(
        6.0, "Strength of RandAugment, 0 to 10; 0: off.", low=0, high=10, shown=True
    )
    rand_augment_std: float = setting(
        0.5, "Standard deviation of that strength from operation to operation.", low=0, high=10
    )
    rand_augment_ops: int = setting(2, "Operations per image.", low=1)
    random_erasing: float = setting(
        0.0, "Probability that a rectangle is overwritten with noise.", low=0, high=1, shown=True
    )
    mixup_alpha: float = setting(0.0, "Mixup, Beta(alpha, alpha); 0: off.", low=0, shown=True)
    cutmix_alpha: float = setting(0.0, "CutMix, Beta(alpha, alpha); 0: off.", low=0, shown=True)
    mixup_switch_prob: float = setting(0.5, "How often CutMix rather than mixup, where both are on.", low=0, high=1)
    label_smoothing: float = setting(
        0.1, "Part of the target that is spread over all classes.", low=0, high=0.999, shown=True
    )


@dataclass
class ChannelSettings:
    _argument_group_name = "channels"

    num_channels: int | None = setting(
        None,
        "Channels of the images, where they are not RGB: 1 for grey, or those of multispectral images. A checkpoint's "
        "stem is adapted. Unset: the checkpoint's.",
        low=1,
        shown=True,
    )
    image_statistics: Literal["auto", "checkpoint", "data"] = setting(
        "auto",
        "Mean and standard deviation that images are normalised with: the checkpoint's (of other channels their "
        "average), or the training images'. auto: theirs where --num_channels is new to the checkpoint and not 3.",
        shown=True,
    )


@dataclass
class TransferSettings:
    _argument_group_name = "distillation and adaptation"

    teacher: str | None = setting(
        None,
        "Classifier with the same labels, whose answers the model learns as well: a Hub id or a folder, timm's too.",
        path=True,
        decides=False,
    )
    distillation: Literal["soft", "hard"] = setting(
        "soft",
        "What the model learns of the teacher: its probabilities, or the label it thinks most probable.",
        shown=True,
    )
    distillation_alpha: float = setting(
        0.5, "Part of the loss that is the teacher's; the rest is the labels'.", low=0, high=1, shown=True
    )
    distillation_temperature: float = setting(
        3.0,
        "Divides the logits of both in soft distillation: the higher, the more the less probable labels count.",
        low=0.01,
        high=1000,
        shown=True,
    )
    lora: int = setting(
        0,
        "Train adapters of this rank (LoRA) beside the checkpoint's frozen weights, and the head; 0: off.",
        low=0,
        shown=True,
    )
    lora_alpha: float | None = setting(
        None,
        "What the adapters add is multiplied by this and divided by the rank. Unset: twice the rank.",
        low=0,
        shown=True,
    )
    lora_dropout: float = setting(0.0, "Dropout before the adapters.", low=0, high=0.99, shown=True)
    freeze_backbone: bool = setting(False, "Train nothing but the checkpoint's head (linear probe).", shown=True)


# What each recipe changes; `finetune` is what the fields above say.
RECIPES: dict[str, dict[str, Any]] = {
    # From a pretrained checkpoint to your own images.
    "finetune": {"model_name_or_path": "sail/poolformer_s12"},
    # ImageNet-1K from scratch: arXiv 2111.11418, section 4.1, and the official train.py.
    "paper": {
        "config_name": "poolformer_s12",
        "image_size": 224,
        "crop_min_scale": 0.08,
        "rand_augment_magnitude": 9.0,
        "random_erasing": 0.25,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "num_train_epochs": 300,
        "per_device_train_batch_size": 128,
        "per_device_eval_batch_size": 128,
        "learning_rate": 1e-3,
        "scale_learning_rate": True,
        "num_warmup_epochs": 5.0,
        "min_learning_rate": 1e-5,
        "num_cooldown_epochs": 10,
        "layer_decay": 1.0,
        "max_grad_norm": 0.0,
        "shuffle_buffer_size": 10000,
        "logging_steps": 50,
    },
    # Small images that must not be mirrored, such as digits, in a minute or two on two cores.
    "demo": {
        "config_name": "poolformer_s12",
        "config_overrides": '{"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 192]}',
        "image_size": 32,
        "drop_path_rate": 0.0,
        "crop_min_scale": 1.0,
        "horizontal_flip": 0.0,
        "affine_degrees": 10.0,
        "affine_translate": 0.1,
        "affine_scale": 0.1,
        "rand_augment_magnitude": 0.0,
        "num_train_epochs": 40,
        "per_device_train_batch_size": 64,
        "learning_rate": 4e-3,
        "num_warmup_epochs": 3.0,
        "min_learning_rate": 1e-5,
        "layer_decay": 1.0,
        "num_workers": 1,
        "eval_epochs": 5,
    },
}


@dataclass
class ClassificationSettings(
    TrainingSettings,
    PublishingSettings,
    RunSettings,
    TransferSettings,
    OptimisationSettings,
    AugmentationSettings,
    ChannelSettings,
    ClassificationDataSettings,
    ModelSettings,
    RecipeSettings,
):
    of_architecture = ("config_name", "config_overrides", "image_size")

    @classmethod
    def recipes(cls, task: str) -> Mapping[str, Mapping[str, Any]]:
        return RECIPES

    def check(self) -> None:
        super().check()
        if (self.dataset_name is None) == (self.train_dir is None):
            raise UserError("give the training images by either --dataset_name or --train_dir.")
        if self.distillation == "hard" and not self.teacher:
            raise UserError("--distillation hard needs a teacher: --teacher MODEL.")
        if self.lora and self.freeze_backbone:
            raise UserError("--lora and --freeze_backbone exclude each other: adapters are trained in the backbone.")
        if (self.lora or self.freeze_backbone) and not self.model_name_or_path:
            flag = "--lora" if self.lora else "--freeze_backbone"
            raise UserError(f"{flag} adapts a trained model: give one with --model_name_or_path.")


@dataclass
class MultiLabelSettings(ClassificationSettings):
    """Images with any number of classes each."""


@dataclass
class RegressionSettings(ClassificationSettings):
    """Images with numbers."""
