"""Settings of a run: one dataclass, three recipes, and the order in which flag, YAML file and recipe win."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..foundation.errors import UserError
from ..foundation.names import near_names
from ..foundation.settings import QuietParser, SettingsParser, as_flags, check_names, check_values, read_yaml, setting


@dataclass
class ModelSettings:
    _argument_group_name = "model"

    model_name_or_path: str | None = setting(None, "Checkpoint to start from: a Hub id or a folder.")
    config_name: str | None = setting(
        None, "Architecture to train from scratch: a variant (poolformer_s12), a Hub id or a folder."
    )
    config_overrides: str | None = setting(
        None, "Changes to the configuration as JSON: '{\"depths\": [1, 1, 2, 1]}'; in YAML, a mapping."
    )
    image_size: int | None = setting(None, "Side of the square input in pixels. Unset: the checkpoint's own.")
    drop_path_rate: float | None = setting(
        None, "Stochastic depth of the last block. Unset: the paper's value for a variant, else the configuration's."
    )
    ignore_mismatched_sizes: bool = setting(
        False, "Start afresh where the checkpoint's weights do not fit the model (other labels, other widths)."
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    trust_remote_code: bool = setting(False, "Run code that comes with a checkpoint from the Hub.")
    model_revision: str = setting("main", "Branch, tag or commit of the checkpoint.", ["--revision"])
    cache_dir: str | None = setting(None, "Where downloads are kept. Unset: the Hub's usual cache.")


@dataclass
class DataSettings:
    _argument_group_name = "data"

    dataset_name: str | None = setting(
        None, "Hub id, or a folder or file: images in one folder per class, Parquet, or WebDataset tars."
    )
    dataset_config_name: str | None = setting(None, "Configuration of the dataset.")
    dataset_revision: str | None = setting(None, "Branch, tag or commit of the dataset.")
    train_dir: str | None = setting(None, "Folder with the training images, one folder per class.")
    validation_dir: str | None = setting(None, "Folder with the validation images.")
    train_split: str = setting("train", "Name of the training split.")
    validation_split: str | None = setting(
        None, "Name of the evaluation split. Unset: validation, valid, dev or test."
    )
    train_val_split: float = setting(
        0.15, "Part held out for validation where the dataset has no such split; 0: none, and no validation."
    )
    image_column_name: str | None = setting(None, "Image column. Unset: found by its type.")
    label_column_name: str | None = setting(None, "Label column. Unset: found by its type.")
    streaming: bool = setting(True, "Read the dataset as a stream rather than download it first.")
    shuffle_buffer_size: int = setting(5000, "Images (still encoded) among which the stream is shuffled.")
    num_workers: int | None = setting(None, "Processes that decode images, per device. Unset: by the number of cores.")
    max_skipped: float = setting(
        0.01, "Broken images tolerated before the run stops: a fraction if below 1, else a number."
    )
    max_skipped_shards: int = setting(
        0, "Shards tolerated, per process and epoch, that end early: truncated, gone. Network trouble is waited for."
    )
    reduced_decoding: bool = setting(
        True, "Decode JPEGs at 1/2, 1/4 or 1/8 size where the random crop is large enough. Training only."
    )
    device_preprocessing: Literal["no", "augment", "decode"] = setting(
        "no",
        "What the device does in the place of the data workers: nothing; augmentation; or (CUDA) JPEG decoding, "
        "too. Worth a try where the progress line shows much waiting for data.",
    )


@dataclass
class AugmentationSettings:
    _argument_group_name = "augmentation"

    crop_min_scale: float = setting(0.35, "Smallest part of the image's area that a random crop takes; 1: no crop.")
    horizontal_flip: float = setting(0.5, "Probability of a horizontal flip.")
    affine_degrees: float = setting(0.0, "Random rotation up to this many degrees.")
    affine_translate: float = setting(0.0, "Random shift up to this part of the side.")
    affine_scale: float = setting(0.0, "Random zoom by up to this part, in or out.")
    rand_augment_magnitude: float = setting(6.0, "Strength of RandAugment, 0 to 10; 0: off.")
    rand_augment_std: float = setting(0.5, "Standard deviation of that strength from operation to operation.")
    rand_augment_ops: int = setting(2, "Operations per image.")
    random_erasing: float = setting(0.0, "Probability that a rectangle is overwritten with noise.")
    mixup_alpha: float = setting(0.0, "Mixup, Beta(alpha, alpha); 0: off.")
    cutmix_alpha: float = setting(0.0, "CutMix, Beta(alpha, alpha); 0: off.")
    mixup_switch_prob: float = setting(0.5, "How often CutMix rather than mixup, where both are on.")
    label_smoothing: float = setting(0.1, "Part of the target that is spread over all classes.")


@dataclass
class OptimisationSettings:
    _argument_group_name = "optimisation"

    num_train_epochs: int = setting(10, "Passes over the training data.")
    max_train_steps: int | None = setting(None, "Optimiser steps in all; wins over the number of epochs.")
    per_device_train_batch_size: int = setting(32, "Images per device and micro-batch.")
    gradient_accumulation_steps: int = setting(1, "Micro-batches per optimiser step.")
    learning_rate: float = setting(2e-4, "Peak learning rate.")
    scale_learning_rate: bool = setting(
        False, "Take the learning rates as given for 1024 images per step, and scale --learning_rate to the batch."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting("cosine", "Course after warm-up.")
    num_warmup_steps: int | None = setting(None, "Warm-up in optimiser steps; wins over --num_warmup_epochs.")
    num_warmup_epochs: float = setting(1.0, "Warm-up in epochs.")
    warmup_learning_rate: float = setting(1e-6, "Learning rate of the first step.")
    min_learning_rate: float = setting(1e-6, "Learning rate at the end.")
    num_cooldown_epochs: int = setting(0, "Epochs at the lowest learning rate, after the others.")
    weight_decay: float = setting(0.05, "Weight decay of AdamW; never on norms, biases and scales.")
    adam_beta1: float = setting(0.9, "First moment's decay.")
    adam_beta2: float = setting(0.999, "Second moment's decay.")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.")
    layer_decay: float = setting(
        0.8, "Factor on the learning rate per block on the way from the head down to the stem; 1: off."
    )
    max_grad_norm: float = setting(1.0, "Longest gradient; 0: no clipping.")
    ema_decay: float = setting(
        0.0, "Decay of a moving average of the weights, which is then evaluated and saved; 0: off."
    )


@dataclass
class TransferSettings:
    _argument_group_name = "distillation and adaptation"

    teacher: str | None = setting(
        None,
        "Classifier with the same labels, whose answers the model learns as well: a Hub id or a folder, timm's too.",
    )
    distillation: Literal["soft", "hard"] = setting(
        "soft", "What the model learns of the teacher: its probabilities, or the label it thinks most probable."
    )
    distillation_alpha: float = setting(0.5, "Part of the loss that is the teacher's; the rest is the labels'.")
    distillation_temperature: float = setting(
        3.0, "Divides the logits of both in soft distillation: the higher, the more the less probable labels count."
    )
    lora: int = setting(
        0, "Train adapters of this rank (LoRA) beside the checkpoint's frozen weights, and the head; 0: off."
    )
    lora_alpha: float | None = setting(
        None, "What the adapters add is multiplied by this and divided by the rank. Unset: twice the rank."
    )
    lora_dropout: float = setting(0.0, "Dropout before the adapters.")
    freeze_backbone: bool = setting(False, "Train nothing but the checkpoint's head (linear probe).")


@dataclass
class RunSettings:
    _argument_group_name = "run"

    output_dir: str | None = setting(None, "Where the model and everything about the run go.", ["--output"])
    overwrite_output_dir: bool = setting(
        False, "Write into a folder that holds another run; its checkpoints stay, its results are replaced."
    )
    seed: int = setting(42, "Seed of everything that is random.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(None, "Unset: accelerate's own setting.")
    dynamo_backend: str | None = setting(
        None, "torch.compile backend, such as inductor. Unset: accelerate's own setting."
    )
    memory_format: Literal["auto", "channels_last", "contiguous_format"] = setting(
        "auto", "Layout of images and activations; auto: channels_last."
    )
    checkpointing_steps: str = setting("epoch", "Checkpoint every so many steps, or at each 'epoch', or 'no'.")
    save_total_limit: int = setting(2, "Checkpoints to keep; 0: all.")
    keep_best: str | None = setting(
        None, "Keep the best checkpoint by this metric (eval_accuracy, eval_loss, ...), beyond --save_total_limit."
    )
    checkpoint_failure: Literal["stop", "continue"] = setting(
        "stop", "What the run does when a checkpoint cannot be written, on a full disk say."
    )
    async_checkpointing: bool | None = setting(
        None,
        "Write checkpoints in the background, which takes the memory of one more copy of model and optimiser. "
        "Unset: yes, unless the CPU trains.",
    )
    resume_from_checkpoint: str | None = setting(
        None, "'latest' for the newest complete checkpoint in the output folder, or a checkpoint's folder."
    )
    logging_steps: int = setting(10, "Optimiser steps between two points of the training curve.")
    eval_epochs: int = setting(1, "Epochs between two evaluations; 0: only at the end.")
    per_device_eval_batch_size: int = setting(64, "Images per device when evaluating.")
    with_tracking: bool = setting(False, "Send figures to the experiment trackers that are installed.")
    report_to: str | None = setting(
        None, "Trackers to use, separated by commas: tensorboard, trackio, wandb, ... or all. Implies --with_tracking."
    )
    emissions_country: str | None = setting(
        None, "Estimate energy and CO2 for the card, with the electricity of this country (ISO code like DEU)."
    )


@dataclass
class HubSettings:
    _argument_group_name = "Hub"

    push_to_hub: bool = setting(False, "Publish the model when it is trained and saved.")
    hub_model_id: str | None = setting(None, "Repository to publish to. Unset: named after the output folder.")
    hub_private_repo: bool | None = setting(None, "Make the repository private. Unset: your account's default.")
    hub_token: str | None = setting(
        None, "Access token. Unset: the one you logged in with. Never written anywhere.", ["--token"]
    )


@dataclass
class RecipeSettings:
    _argument_group_name = "recipe"

    recipe: str = setting("finetune", "Where all defaults come from: finetune, paper or demo.")
    config_file: str | None = setting(None, "YAML file with settings under the names of these flags.")


GROUPS = (
    RecipeSettings,
    ModelSettings,
    DataSettings,
    AugmentationSettings,
    OptimisationSettings,
    TransferSettings,
    RunSettings,
    HubSettings,
)

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
class TrainingSettings(
    HubSettings,
    RunSettings,
    TransferSettings,
    OptimisationSettings,
    AugmentationSettings,
    DataSettings,
    ModelSettings,
    RecipeSettings,
):
    """Everything that `training.loop.train` needs to know.

    Raises:
        UserError: a value that is out of range, or two settings that exclude each other.
    """

    def __post_init__(self) -> None:
        if isinstance(self.config_overrides, dict):
            self.config_overrides = json.dumps(self.config_overrides)
        self.check()

    @classmethod
    def from_recipe(cls, recipe: str = "finetune", **settings: Any) -> TrainingSettings:
        """The settings of a recipe with some of them changed."""
        check_names(settings, [field.name for field in dataclasses.fields(cls)], "setting")
        return cls(**{**defaults_of(recipe, settings), "recipe": recipe, **settings})

    def check(self) -> None:
        check_values(self, LIMITS)
        check_keep_best(self.keep_best, METRICS)
        if self.output_dir is None:
            raise UserError("say where the run is to be written: --output_dir FOLDER.")
        if (self.dataset_name is None) == (self.train_dir is None):
            raise UserError("give the training images by either --dataset_name or --train_dir.")
        if self.model_name_or_path and self.config_name:
            raise UserError(
                "--model_name_or_path (start from a checkpoint) and --config_name (from scratch) exclude each other."
            )
        if not self.model_name_or_path and not self.config_name:
            raise UserError("give a checkpoint with --model_name_or_path or an architecture with --config_name.")
        if self.distillation == "hard" and not self.teacher:
            raise UserError("--distillation hard needs a teacher: --teacher MODEL.")
        if self.lora and self.freeze_backbone:
            raise UserError("--lora and --freeze_backbone exclude each other: adapters are trained in the backbone.")
        if (self.lora or self.freeze_backbone) and not self.model_name_or_path:
            flag = "--lora" if self.lora else "--freeze_backbone"
            raise UserError(f"{flag} adapts a trained model: give one with --model_name_or_path.")
        if self.checkpointing_steps not in ("epoch", "no") and not (
            self.checkpointing_steps.isdigit() and int(self.checkpointing_steps) > 0
        ):
            raise UserError(
                f"--checkpointing_steps takes a number of steps, 'epoch' or 'no', not {self.checkpointing_steps!r}."
            )
        self.overrides()

    def overrides(self) -> dict[str, Any]:
        """`config_overrides` as a dictionary."""
        if not self.config_overrides:
            return {}
        try:
            overrides = json.loads(self.config_overrides)
        except json.JSONDecodeError as error:
            raise UserError(f"--config_overrides is not JSON ({error}): {self.config_overrides!r}.") from error
        if not isinstance(overrides, dict):
            raise UserError(f"--config_overrides must be a JSON object, not {self.config_overrides!r}.")
        return overrides

    def to_dict(self) -> dict[str, Any]:
        """All settings but the access token, fit to be written down."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hub_token"}

    def save(self, path: Path) -> None:
        """Writes a YAML file that `--config_file` reads back: what the run is, not how this start of it was asked."""
        once = ("config_file", "resume_from_checkpoint", "overwrite_output_dir")
        values = {name: value for name, value in self.to_dict().items() if name not in once}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


LIMITS: dict[str, tuple[float, float]] = {
    "image_size": (1, math.inf),
    "drop_path_rate": (0, 0.99),
    "train_val_split": (0, 0.999),
    "shuffle_buffer_size": (1, math.inf),
    "num_workers": (0, math.inf),
    "max_skipped": (0, math.inf),
    "max_skipped_shards": (0, math.inf),
    "crop_min_scale": (0.01, 1),
    "horizontal_flip": (0, 1),
    "affine_degrees": (0, 180),
    "affine_translate": (0, 1),
    "affine_scale": (0, 0.9),
    "rand_augment_magnitude": (0, 10),
    "rand_augment_std": (0, 10),
    "rand_augment_ops": (1, math.inf),
    "random_erasing": (0, 1),
    "mixup_alpha": (0, math.inf),
    "cutmix_alpha": (0, math.inf),
    "mixup_switch_prob": (0, 1),
    "label_smoothing": (0, 0.999),
    "num_train_epochs": (1, math.inf),
    "max_train_steps": (1, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "learning_rate": (0, math.inf),
    "num_warmup_steps": (0, math.inf),
    "num_warmup_epochs": (0, math.inf),
    "warmup_learning_rate": (0, math.inf),
    "min_learning_rate": (0, math.inf),
    "num_cooldown_epochs": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 0.99999999),
    "adam_beta2": (0, 0.99999999),
    "adam_epsilon": (0, math.inf),
    "layer_decay": (0.01, 1),
    "max_grad_norm": (0, math.inf),
    "ema_decay": (0, 0.99999999),
    "distillation_alpha": (0, 1),
    "distillation_temperature": (0.01, 1000),
    "lora": (0, math.inf),
    "lora_alpha": (0, math.inf),
    "lora_dropout": (0, 0.99),
    "save_total_limit": (0, math.inf),
    "logging_steps": (1, math.inf),
    "eval_epochs": (0, math.inf),
    "seed": (0, 2**32 - 1),
}


# What `--keep_best` can go by.
METRICS = ("eval_accuracy", "eval_loss", "eval_top5_accuracy")


def check_keep_best(metric: str | None, known: Sequence[str]) -> None:
    """Refuses, before anything is trained, a metric that no evaluation gives."""
    if metric is not None and metric not in known:
        near = [name for name in known if name.removeprefix("eval_") == metric] or near_names(metric, known)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise UserError(f"--keep_best {metric}: an evaluation gives {', '.join(known)}{hint}")


def parse(argv: Sequence[str] | None = None, prog: str | None = None, others: Sequence[str] = ()) -> TrainingSettings:
    """Settings from the command line: a flag wins over the YAML file, and that over the recipe.

    Args:
        others: flags that the caller has taken out of `argv`; they may be meant by a misspelt one.

    Raises:
        UserError: unknown flags, keys or recipes (with what was probably meant), and values that do not fit.
    """
    import sys

    argv = list(sys.argv[1:] if argv is None else argv)
    first = QuietParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config_file", "--config-file")
    known, _ = first.parse_known_args(argv)
    from_file = read_yaml(known.config_file) if known.config_file else {}
    names = [field.name for field in dataclasses.fields(TrainingSettings)]
    check_names(from_file, names, f"key in {known.config_file}")

    recipe = known.recipe or str(from_file.get("recipe") or "finetune")
    parser = SettingsParser(
        GROUPS,
        prog=prog,
        description="Trains an image classifier on a streamed dataset. Several devices: accelerate launch -m "
        "hf_poolformer train ...",
        epilog="--recipe NAME --help shows the defaults of that recipe.",
    )
    flags = parser.names_in(argv) | {name for name, value in from_file.items() if value is not None}
    defaults = defaults_of(recipe, flags)
    parser.set_defaults(**defaults, recipe=recipe)
    # An explicit null in the file unsets what the recipe set.
    parser.set_defaults(**{name: None for name, value in from_file.items() if value is None and name != "recipe"})
    parts = parser.parse(as_flags(from_file, TrainingSettings) + argv, [*names, *others])
    return TrainingSettings(**{key: value for part in parts for key, value in vars(part).items()})


def defaults_of(recipe: str, given: Any = ()) -> dict[str, Any]:
    """What a recipe sets, less what makes no sense beside the settings that were given."""
    check_names([recipe], list(RECIPES), "recipe")
    defaults = dict(RECIPES[recipe])
    # A checkpoint replaces an architecture and the other way round.
    if "model_name_or_path" in given:
        for name in ("config_name", "config_overrides", "image_size"):
            defaults.pop(name, None)
    if "config_name" in given:
        for name in ("model_name_or_path", "config_overrides"):
            defaults.pop(name, None)
    return defaults
