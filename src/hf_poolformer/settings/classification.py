"""Settings of classifiers, and their recipes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..foundation.errors import UserError, one_line
from ..foundation.settings import altered, setting
from .data import ClassificationDataSettings, ImageDataSettings, LabelledSettings, SeveralLabelsSettings
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
    vertical_flip: float = setting(
        0.0,
        "Probability of a vertical flip, for images that have no top: from above, of cells.",
        low=0,
        high=1,
        shown=True,
    )
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
    size_schedule: str | None = setting(
        None,
        "Sides of the training images by the epoch that begins with them, the first being 0, as JSON: "
        '\'{"0": 160, "100": 192, "200": 224}\'; in YAML, a mapping. Unset, and before the first of them: the size at '
        "which the model is evaluated and saved.",
        shown=True,
        in_file="mapping",
    )

    def training_sides(self) -> list[tuple[int, int]]:
        """`size_schedule` as pairs of an epoch and the side of the images from there on, in pixels, in order.

        Raises:
            UserError: it is no such thing.
        """
        if not self.size_schedule:
            return []
        try:
            given = json.loads(self.size_schedule)
            sides = sorted((int(epoch), side) for epoch, side in given.items())
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f'--size_schedule takes sides by epochs as JSON, \'{{"0": 160, "100": 224}}\', not '
                f"{self.size_schedule!r}."
            ) from error
        for epoch, side in sides:
            if epoch < 0 or not isinstance(side, int) or isinstance(side, bool) or side < 1:
                raise UserError(f"--size_schedule: {side!r} pixels from epoch {epoch} on is no size of an image.")
        return sides


@dataclass
class MixingSettings:
    _argument_group_name = "augmentation"

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


# What `operating_point` can make best.
OPERATING_FIGURES = ("none", "f1_macro", "balanced_accuracy", "mcc")


@dataclass
class RareClassSettings:
    _argument_group_name = "rare classes"

    class_weights: str = setting(
        "none",
        "How much an image counts in the loss, by its class. none: all alike; auto: in inverse proportion to the "
        "images of the class; effective: less so (arXiv 1901.05555); or numbers by the names of classes, as JSON "
        "('{\"cat\": 5}', others: 1; in YAML, a mapping) or in a JSON file.",
        shown=True,
        path=True,
        in_file="mapping",
    )
    class_weights_beta: float | None = setting(
        None,
        "Of --class_weights effective: from 0, all alike, towards 1, as auto. Unset: 1 - 1 / number of images.",
        low=0,
        high=1 - 1e-12,
        shown=True,
    )
    focal_gamma: float = setting(
        0.0,
        "Focal loss: the more probable the right label is already, the less an image counts, by this power; 0: off.",
        low=0,
        high=10,
        shown=True,
    )
    sampling: Literal["shuffle", "balanced"] = setting(
        "shuffle",
        "How often an image comes in an epoch. shuffle: once; balanced: the rarer its class, the more often, so that "
        "all classes come equally often. An epoch has as many images either way.",
        shown=True,
    )
    sampling_power: float = setting(
        1.0,
        "Of --sampling balanced: 1 balances all, 0.5 goes half of the way, 0 none of it.",
        low=0,
        high=1,
        shown=True,
    )

    operating_point: str = setting(
        "none",
        "Move the answers of the trained model from frequent classes to rare ones, or back, by as much as makes "
        "f1_macro, balanced_accuracy or mcc best on the validation images; or towards one class, until this share of "
        "its images is found (defective=0.8). The biases of its last layer take that up.",
        shown=True,
    )

    @property
    def asks_for_counts(self) -> bool:
        """Whether it must be known how many images each class has."""
        return self.class_weights != "none" or self.sampling != "shuffle"

    def recall_asked_for(self) -> tuple[str, float] | None:
        """The class and the share of `operating_point`; None where it names a figure.

        Raises:
            UserError: it is neither.
        """
        if self.operating_point in OPERATING_FIGURES:
            return None
        name, _, share = self.operating_point.rpartition("=")
        try:
            recall = float(share)
        except ValueError:
            recall = math.nan
        if not name or not 0 < recall < 1:
            raise UserError(
                f"--operating_point is one of {', '.join(OPERATING_FIGURES)}, or a class and the share of its images "
                f"that is to be found, like defective=0.8; not {self.operating_point!r}."
            )
        return name, recall

    def rare_class_choices(self) -> dict[str, Any]:
        """Of these settings, those that do anything, with what they mean wherever it stands."""
        chosen: dict[str, Any] = {}
        if self.class_weights != "none":
            chosen["class_weights"] = self.given_weights() or self.class_weights
        if self.class_weights == "effective":
            chosen["class_weights_beta"] = self.class_weights_beta
        if self.focal_gamma:
            chosen["focal_gamma"] = self.focal_gamma
        if self.sampling != "shuffle":
            chosen |= {"sampling": self.sampling, "sampling_power": self.sampling_power}
        if self.operating_point != "none":
            chosen["operating_point"] = self.operating_point
        return chosen

    def given_weights(self) -> dict[str, float] | None:
        """Those of `class_weights` that are given by name; None where it names a rule.

        Raises:
            UserError: it is neither, or no file that can be read, or holds other things than weights.
        """
        given = self.class_weights.strip()
        if given in ("none", "auto", "effective"):
            return None
        try:
            text = given if given.startswith("{") else Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--class_weights {given} is neither none, auto or effective, nor JSON, nor a file that can be read "
                f"({one_line(error)})."
            ) from error
        try:
            weights = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--class_weights is not JSON ({error}): {text[:100]!r}.") from error
        if not isinstance(weights, dict):
            raise UserError(f"--class_weights takes weights by the names of classes, not {text[:100]!r}.")
        for name, weight in weights.items():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
            if not number or weight < 0:
                raise UserError(f"--class_weights: the weight of {name} is {weight!r}, and not a number from 0 on.")
        return weights

    def refuse_rare_classes(self, why: str) -> None:
        """Raises a UserError if any of this is asked for where it means nothing."""
        for name, value in self.rare_class_choices().items():
            raise UserError(f"--{name} {value}: {why}.")


@dataclass
class HeadSettings:
    _argument_group_name = "model"

    head_dropout: float | None = setting(
        None,
        "Dropout before the last layer. Unset: the paper's value for a variant, else the configuration's.",
        low=0,
        high=0.99,
        shown=True,
    )
    head_mapping: Literal["off", "names"] = setting(
        "off",
        "What a new head takes from a checkpoint with other labels: nothing, or the rows of the labels whose names "
        "agree, and for the others the mean of all rows.",
        shown=True,
    )


# What both papers took from DeiT: the defaults of train.py in their repositories.
FROM_SCRATCH: dict[str, Any] = {
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
}

# 0.56 million weights, 5 stages that halve the sides each.
SMALL_MODEL: dict[str, Any] = {
    "num_encoder_blocks": 5,
    "depths": [1] * 5,
    "hidden_sizes": [16, 32, 64, 128, 192],
    "patch_sizes": [3] * 5,
    "strides": [2] * 5,
    "padding": [1] * 5,
    "token_mixers": ["pooling"] * 5,
    "res_scale_init_values": [None] * 5,
    "position_embeddings": [False] * 5,
    "mlp_ratio": 2,
    "norm_layer": "batch_norm",
    "use_layer_scale": False,
}

# What each recipe changes; `finetune` is what the fields above say.
RECIPES: dict[str, dict[str, Any]] = {
    # From a pretrained checkpoint to your own images.
    "finetune": {"model_name_or_path": "sail/poolformer_s12"},
    # ImageNet-1K from scratch: arXiv 2111.11418, section 4.1, and the official train.py.
    "paper": {**FROM_SCRATCH, "config_name": "poolformer_s12"},
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
    # A few thousand photographs of one kind, of parts or tissue say, and no checkpoint that has seen such. Five stages
    # of 3x3 convolutions see finer than one of 7x7 with stride 4, and batch norm learns from few steps. Movements
    # leave black borders, and RandAugment changes what tells such images apart.
    "scratch": {
        "config_name": "metaformer_id_s12",
        "config_overrides": json.dumps(SMALL_MODEL),
        "image_size": 96,
        "drop_path_rate": 0.0,
        "crop_min_scale": 1.0,
        "horizontal_flip": 0.5,
        "rand_augment_magnitude": 0.0,
        "num_train_epochs": 24,
        "learning_rate": 2e-3,
        "num_warmup_epochs": 3.0,
        "min_learning_rate": 1e-5,
        "layer_decay": 1.0,
        "num_workers": 1,
        "eval_epochs": 2,
    },
    # ImageNet-1K from scratch with the models of the second paper, arXiv 2210.13452: train.py and scripts/ of
    # sail-sg/metaformer. `OF_FAMILIES` has what differs; depth and dropout of the head are columns of `VARIANTS`.
    "metaformer-paper": {
        **FROM_SCRATCH,
        "config_name": "caformer_s18",
        "total_train_batch_size": 4096,
    },
    # From that, or from ImageNet-21K, to larger images: scripts/*/finetune_*_384.sh there, which keep train.py's other
    # settings, a constant learning rate (`--sched None`) and its 300 epochs; 30 epochs is what the paper says.
    "metaformer-384": {
        **FROM_SCRATCH,
        "image_size": 384,
        "head_mapping": "names",
        "mixup_alpha": 0.0,
        "cutmix_alpha": 0.0,
        "num_train_epochs": 30,
        "num_cooldown_epochs": 0,
        "total_train_batch_size": 1024,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "num_warmup_epochs": 0.0,
        "ema_decay": 0.9999,
        "ema_warmup": False,
    },
}

# What a recipe says otherwise of a family: scripts/ of sail-sg/metaformer. LAMB is timm's, which has an epsilon of its
# own and clips gradients.
LAMB = {"optimizer": "lamb", "adam_epsilon": 1e-6, "max_grad_norm": 1.0}
OF_FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "metaformer-paper": {
        "convformer": {"num_warmup_epochs": 20.0},
        "caformer": {**LAMB, "learning_rate": 2e-3, "num_warmup_epochs": 20.0},
    },
    "metaformer-384": {
        "convformer": {},
        "caformer": {**LAMB, "learning_rate": 1e-4},
    },
}


@dataclass
class ClassificationSettings(
    TrainingSettings,
    PublishingSettings,
    RunSettings,
    TransferSettings,
    RareClassSettings,
    OptimisationSettings,
    MixingSettings,
    AugmentationSettings,
    ChannelSettings,
    ClassificationDataSettings,
    HeadSettings,
    ModelSettings,
    RecipeSettings,
):
    of_architecture = ("config_name", "config_overrides", "image_size")

    def __post_init__(self) -> None:
        if isinstance(self.size_schedule, dict):
            self.size_schedule = json.dumps(self.size_schedule)
        super().__post_init__()

    @classmethod
    def recipes(cls, task: str) -> Mapping[str, Mapping[str, Any]]:
        return RECIPES

    def recipe_of_model(self) -> Mapping[str, Any]:
        from ..configuration_poolformer import VARIANTS, family_of, variant_of  # not before --help

        families = OF_FAMILIES.get(self.recipe)
        if families is None:
            return {}
        config = self.config_of_model()
        name = variant_of(config)
        changes = dict(families.get(family_of(config), {}))
        fine_tuned = VARIANTS.get(f"{name}_384")
        if self.model_name_or_path and fine_tuned is not None:
            changes |= {"drop_path_rate": fine_tuned.drop_path_rate, "head_dropout": fine_tuned.head_dropout}
        return changes

    def config_of_model(self) -> Any:
        """The configuration that the run starts from."""
        from ..configuration_poolformer import VARIANTS, MetaFormerConfig
        from ..foundation.loading import load_config

        if self.config_name in VARIANTS:
            return MetaFormerConfig.from_variant(self.config_name)
        if self.config_name:
            return load_config(self.config_name, self.origin_of_others())
        return load_config(self.model_name_or_path, self.origin())

    def check(self) -> None:
        super().check()
        self.training_sides()
        self.check_images_named()
        self.given_weights()
        self.recall_asked_for()
        if self.distillation == "hard" and not self.teacher:
            raise UserError("--distillation hard needs a teacher: --teacher MODEL.")
        if self.lora and self.freeze_backbone:
            raise UserError("--lora and --freeze_backbone exclude each other: adapters are trained in the backbone.")
        if (self.lora or self.freeze_backbone) and not self.model_name_or_path:
            flag = "--lora" if self.lora else "--freeze_backbone"
            raise UserError(f"{flag} adapts a trained model: give one with --model_name_or_path.")


@dataclass
class MultiLabelSettings(SeveralLabelsSettings, ClassificationSettings):
    """Images with any number of classes each."""

    _argument_group_name = "several labels"

    label_smoothing: float = altered(
        MixingSettings,
        "label_smoothing",
        0.0,
        "How far the target of each class is drawn towards one half: (1 - s) y + s / 2.",
    )
    loss: Literal["bce", "asymmetric"] = setting(
        "bce",
        "What each class costs. bce: binary cross-entropy; asymmetric: the same with less weight on what is easy, "
        "above all on the many classes that an image does not have (arXiv 2009.14119).",
        shown=True,
    )
    asymmetric_gamma_negative: float = setting(
        4.0, "Of the asymmetric loss: how much less an easy class that is not there counts.", low=0, shown=True
    )
    asymmetric_gamma_positive: float = setting(1.0, "The same for an easy class that is there.", low=0, shown=True)
    asymmetric_clip: float = setting(
        0.05, "A class that is not there costs nothing below this probability.", low=0, high=0.5, shown=True
    )
    pos_weight: str = setting(
        "none",
        "How many times as much it costs to miss a class than to find it where it is not. none: once; auto: as many "
        "times as more images lack it than have it, 20 at most and a twentieth at least; or a number, or numbers by "
        "the names of classes, as JSON ('{\"cat\": 5}', others: 1; in YAML, a mapping).",
        shown=True,
        in_file="mapping",
    )
    label_thresholds: Literal["f1", "0.5"] = setting(
        "f1",
        "From which probability on an image has a class, which is saved with the model. f1: for each class what gives "
        "a good F1 on the validation images, chosen at the end; 0.5: one half.",
        shown=True,
    )

    @property
    def asks_for_counts(self) -> bool:
        return super().asks_for_counts or self.pos_weight == "auto"

    def check(self) -> None:
        super().check()
        self.given_pos_weight()
        if self.operating_point != "none":
            raise UserError(
                f"--operating_point {self.operating_point} is for one class per image. Of several each has a "
                "threshold of its own: --label_thresholds f1."
            )
        if self.focal_gamma and self.loss == "asymmetric":
            raise UserError("--focal_gamma is for --loss bce: the asymmetric loss has gammas of its own.")
        if self.sampling == "balanced" and self.class_weights in ("auto", "effective"):
            raise UserError(
                f"--sampling balanced and --class_weights {self.class_weights} exclude each other for --task "
                f"{self.task}: how often each class comes is not known beforehand where images have several."
            )

    def given_pos_weight(self) -> float | dict[str, float] | None:
        """What `pos_weight` says in JSON; None where it names a rule.

        Raises:
            UserError: it is neither, or holds other things than weights.
        """
        if self.pos_weight in ("none", "auto"):
            return None
        try:
            given = json.loads(self.pos_weight)
        except json.JSONDecodeError as error:
            raise UserError(f"--pos_weight {self.pos_weight} is neither none nor auto nor JSON ({error}).") from error
        for weight in given.values() if isinstance(given, dict) else [given]:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise UserError(f"--pos_weight takes numbers above 0, not {weight!r}.")
        return given


# What nothing of a number can be.
_OF_CLASSES = {
    "cutmix_alpha": "what a part of another image shows is no part of its number. --mixup_alpha mixes numbers, too",
    "label_smoothing": "there are no classes that a number could be spread over",
    "head_mapping": "it carries over what a head knows of classes. One of the same numbers is kept anyway",
}


@dataclass
class RegressionSettings(ClassificationSettings):
    """Images with numbers."""

    _argument_group_name = "numbers"

    cutmix_alpha: float = altered(MixingSettings, "cutmix_alpha", 0.0, "Nothing for numbers.")
    label_smoothing: float = altered(MixingSettings, "label_smoothing", 0.0, "Nothing for numbers.")
    loss: Literal["mse", "l1", "huber"] = setting(
        "mse",
        "What a wrong number costs: its square, its absolute value, or the square up to --huber_delta and then "
        "linear. Numbers are standardised for it, to mean 0 and standard deviation 1.",
        shown=True,
    )
    huber_delta: float = setting(
        1.0, "Of --loss huber: from here on linear, in standard deviations.", low=0.001, shown=True
    )

    @classmethod
    def recipes(cls, task: str) -> Mapping[str, Mapping[str, Any]]:
        """Those of classifiers, without what is only of classes."""
        return {
            recipe: {name: value for name, value in changes.items() if name not in _OF_CLASSES}
            for recipe, changes in RECIPES.items()
        }

    def check(self) -> None:
        super().check()
        for name, reason in _OF_CLASSES.items():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UserError(f"--{name} is nothing for --task {self.task}: {reason}.")
        self.refuse_rare_classes("numbers have no classes that could be rare")
        if self.distillation == "hard":
            raise UserError(f"--distillation hard is nothing for --task {self.task}: numbers have no likely label.")


# Recipes of classifiers that suit an encoder, too; the others are fixed by heads and by labels.
_RECIPES_OF_ENCODERS = ("finetune", "paper", "demo", "scratch")


@dataclass
class FeatureDistillationSettings(
    TrainingSettings,
    PublishingSettings,
    RunSettings,
    OptimisationSettings,
    AugmentationSettings,
    ImageDataSettings,
    ModelSettings,
    RecipeSettings,
):
    """Images without labels, and a teacher that says what is in them."""

    _argument_group_name = "distillation"

    of_architecture = ClassificationSettings.of_architecture

    teacher: str | None = altered(
        TransferSettings,
        "teacher",
        None,
        "Vision model whose features of each image the model learns: a Hub id or a folder, timm's too.",
    )
    distillation: Literal["features"] = setting("features", "What the model learns of the teacher.", shown=True)
    train_dir: str | None = altered(
        ImageDataSettings, "train_dir", None, "Folder with the training images, with or without folders for classes."
    )
    validation_dir: str | None = altered(LabelledSettings, "validation_dir", None)

    @classmethod
    def recipes(cls, task: str) -> Mapping[str, Mapping[str, Any]]:
        """Those of classifiers, without what is only of labels."""
        known = cls.__dataclass_fields__
        return {
            recipe: {name: value for name, value in RECIPES[recipe].items() if name in known}
            for recipe in _RECIPES_OF_ENCODERS
        }

    def check(self) -> None:
        super().check()
        self.training_sides()
        self.check_images_named()
        if not self.teacher:
            raise UserError(f"--task {self.task} needs a teacher: --teacher MODEL.")
