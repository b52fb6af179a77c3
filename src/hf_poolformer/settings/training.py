"""Settings that every training run has, whatever its task; `settings_of` finds those of a task."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ..foundation.errors import UserError
from ..foundation.names import near_names
from ..foundation.settings import check_names, check_values, names_marked, names_of, setting
from ..foundation.tasks import CLASSIFICATION, TASKS
from .data import CheckpointSettings


@dataclass
class RecipeSettings:
    _argument_group_name = "recipe"

    task: str = setting(CLASSIFICATION, "What to train. Each has flags and recipes of its own.", shown=True)
    recipe: str = setting(
        "finetune",
        "Where all defaults come from: finetune, scratch, paper, metaformer-paper, metaformer-384 or demo.",
        shown=True,
    )
    config_file: str | None = setting(
        None, "YAML file with settings under the names of these flags.", path=True, decides=False
    )


@dataclass
class ModelSettings(CheckpointSettings):
    _argument_group_name = "model"

    model_name_or_path: str | None = setting(None, "Checkpoint to start from: a Hub id or a folder.", path=True)
    config_name: str | None = setting(
        None, "Architecture to train from scratch: a variant (poolformer_s12), a Hub id or a folder.", path=True
    )
    config_overrides: str | None = setting(
        None,
        "Changes to the configuration as JSON: '{\"depths\": [1, 1, 2, 1]}'; in YAML, a mapping.",
        shown=True,
        in_file="mapping",
    )
    image_size: int | None = setting(
        None, "Side of the square input in pixels. Unset: the checkpoint's own.", low=1, shown=True
    )
    drop_path_rate: float | None = setting(
        None,
        "Stochastic depth of the last block. Unset: the paper's value for a variant, else the configuration's.",
        low=0,
        high=0.99,
        shown=True,
    )
    ignore_mismatched_sizes: bool = setting(
        False, "Start afresh where the checkpoint's weights do not fit the model (other labels, other widths)."
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")


@dataclass
class OptimisationSettings:
    _argument_group_name = "optimisation"

    num_train_epochs: int = setting(10, "Passes over the training data.", low=1, shown=True)
    max_train_steps: int | None = setting(
        None, "Optimiser steps in all; wins over the number of epochs.", low=1, shown=True
    )
    per_device_train_batch_size: int | Literal["auto"] = setting(
        32,
        "Images per device and micro-batch; auto: as many as the device has memory for, found before the first step. "
        "With auto, a step is of as many images as without: the recipe's, or --total_train_batch_size.",
        low=1,
        shown=True,
    )
    gradient_accumulation_steps: int = setting(1, "Micro-batches per optimiser step.", low=1, shown=True)
    total_train_batch_size: int | None = setting(
        None,
        "Images per optimiser step over all processes, however many these are: micro-batches are made of at most "
        "--per_device_train_batch_size images, and as many as it takes.",
        low=1,
        shown=True,
    )
    learning_rate: float | Literal["auto"] = setting(
        2e-4,
        "Peak learning rate; auto: chosen before the first step by a range test on the run's first batches.",
        low=0,
        shown=True,
    )
    scale_learning_rate: bool = setting(
        False,
        "Take the learning rates as given for 1024 images per step, and scale --learning_rate to the batch.",
        shown=True,
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = setting("cosine", "Course after warm-up.", shown=True)
    num_warmup_steps: int | None = setting(
        None, "Warm-up in optimiser steps; wins over --num_warmup_epochs.", low=0, shown=True
    )
    num_warmup_epochs: float = setting(1.0, "Warm-up in epochs.", low=0, shown=True)
    warmup_learning_rate: float = setting(1e-6, "Learning rate of the first step.", low=0, shown=True)
    min_learning_rate: float = setting(1e-6, "Learning rate at the end.", low=0, shown=True)
    num_cooldown_epochs: int = setting(0, "Epochs at the lowest learning rate, after the others.", low=0, shown=True)
    optimizer: Literal["adamw", "lamb"] = setting(
        "adamw",
        "Which optimiser; lamb for large batches, with learning rates several times those of adamw.",
        shown=True,
    )
    weight_decay: float = setting(0.05, "Weight decay; never on norms, biases and scales.", low=0, shown=True)
    adam_beta1: float = setting(0.9, "First moment's decay.", low=0, high=0.99999999, shown=True)
    adam_beta2: float = setting(0.999, "Second moment's decay.", low=0, high=0.99999999, shown=True)
    adam_epsilon: float = setting(1e-8, "The optimiser's epsilon.", low=0, shown=True)
    layer_decay: float = setting(
        0.8,
        "Factor on the learning rate per block on the way from the head down to the stem; 1: off.",
        low=0.01,
        high=1,
        shown=True,
    )
    max_grad_norm: float = setting(1.0, "Longest gradient; 0: no clipping.", low=0, shown=True)
    ema_decay: float = setting(
        0.0,
        "Decay of a moving average of the weights, which is then evaluated and saved; 0: off.",
        low=0,
        high=0.99999999,
        shown=True,
    )
    ema_warmup: bool = setting(
        True, "Let that decay rise with the number n of steps, (1 + n) / (10 + n) at most.", shown=True
    )


@dataclass
class RunSettings:
    _argument_group_name = "run"

    output_dir: str | None = setting(
        None, "Where the model and everything about the run go.", ["--output"], path=True, decides=False
    )
    overwrite_output_dir: bool = setting(
        False,
        "Write into a folder that holds another run; its checkpoints stay, its results are replaced.",
        decides=False,
    )
    seed: int = setting(42, "Seed of everything that is random.", low=0, high=2**32 - 1, shown=True)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "Unset: accelerate's own setting.", shown=True
    )
    dynamo_backend: str | None = setting(
        None, "torch.compile backend, such as inductor. Unset: accelerate's own setting."
    )
    memory_format: Literal["auto", "channels_last", "contiguous_format"] = setting(
        "auto", "Layout of images and activations; auto: channels_last."
    )
    checkpointing_steps: str = setting(
        "epoch", "Checkpoint every so many steps, or at each 'epoch', or 'no'.", decides=False
    )
    save_total_limit: int = setting(2, "Checkpoints to keep; 0: all.", low=0, decides=False)
    metric_for_best_model: str | None = setting(
        None,
        "Figure that says which evaluation was the best (eval_accuracy, loss, ...); its checkpoint is kept beyond "
        "--save_total_limit. Unset: the task's first figure, if one of the next flags needs it.",
        shown=True,
    )
    load_best_model_at_end: bool = setting(
        False, "Save the model of the best evaluation, and not that of the last step.", shown=True
    )
    early_stopping_patience: int | None = setting(
        None, "End the run after so many evaluations in a row without improvement.", low=1, shown=True
    )
    early_stopping_threshold: float = setting(
        0.0, "What an evaluation must be better by to count as improvement.", low=0, shown=True
    )
    checkpoint_failure: Literal["stop", "continue"] = setting(
        "stop", "What the run does when a checkpoint cannot be written, on a full disk say.", decides=False
    )
    async_checkpointing: bool | None = setting(
        None,
        "Write checkpoints in the background, which takes the memory of one more copy of model and optimiser. "
        "Unset: yes, unless the CPU trains.",
        decides=False,
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "'latest' for the newest complete checkpoint in the output folder, or a checkpoint's folder.",
        path=True,
        decides=False,
    )
    logging_steps: int = setting(10, "Optimiser steps between two points of the training curve.", low=1, decides=False)
    eval_epochs: int = setting(1, "Epochs between two evaluations; 0: only at the end.", low=0, decides=False)
    per_device_eval_batch_size: int = setting(64, "Images per device when evaluating.", low=1, decides=False)
    with_tracking: bool = setting(False, "Send figures to the experiment trackers that are installed.", decides=False)
    report_to: str | None = setting(
        None,
        "Trackers to use, separated by commas: tensorboard, trackio, wandb, ... or all. Implies --with_tracking.",
        in_file="list",
        decides=False,
    )
    project: str | None = setting(
        None,
        "Project of the run in trackers. Unset: hf-poolformer. The run is named as its output folder.",
        decides=False,
    )
    emissions_country: str | None = setting(
        None,
        "Estimate energy and CO2 for the card, with the electricity of this country (ISO code like DEU).",
        decides=False,
    )


@dataclass
class PublishingSettings:
    _argument_group_name = "Hub"

    push_to_hub: bool = setting(False, "Publish the model when it is trained and saved.", decides=False)
    hub_model_id: str | None = setting(
        None, "Repository to publish to. Unset: named after the output folder.", decides=False
    )
    hub_private_repo: bool | None = setting(
        None, "Make the repository private. Unset: your account's default.", decides=False
    )


class TrainingSettings:
    """Everything that `training.loop.train` needs to know; a dataclass for each kind of task adds the fields.

    Raises:
        UserError: a value that is out of range, or two settings that exclude each other.
    """

    # Of a recipe, what makes no sense beside a checkpoint that was given.
    of_architecture = ("config_name", "config_overrides")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("in_file") == "mapping" and isinstance(value, dict):
                setattr(self, field.name, json.dumps(value))
        self.check()

    @classmethod
    def recipes(cls, task: str) -> Mapping[str, Mapping[str, Any]]:
        """
        What each recipe changes.

        Args:
            task: a key of `TASKS`.

        Returns:
            the recipes' names to settings and their values.
        """
        raise NotImplementedError

    @staticmethod
    def from_recipe(recipe: str | None = None, *, task: str = CLASSIFICATION, **settings: Any) -> TrainingSettings:
        """
        The settings of a recipe, with some of them changed.

        Args:
            recipe: its name; None: the first of the task.
            task: a key of `TASKS`.
            settings: by the names of the flags of `train`; `output_dir` at least.

        Raises:
            UserError: no such task, recipe or setting (with what was probably meant), or a value that does not fit.
        """
        kind = settings_of(task)
        check_names(settings, names_of(kind), "setting")
        recipe = recipe or default_recipe(kind)
        made = kind(**{**defaults_of(task, recipe, settings), "task": task, "recipe": recipe, **settings})
        return made.with_recipe_of_model(settings)

    def recipe_of_model(self) -> Mapping[str, Any]:
        """What the recipe changes for the model that is trained, beside what it changes for all.

        Raises:
            UserError: the model's configuration cannot be read.
        """
        return {}

    def with_recipe_of_model(self, given: Iterable[str]) -> TrainingSettings:
        """These settings with what the recipe changes for their model, save what was given."""
        changes = {name: value for name, value in self.recipe_of_model().items() if name not in given}
        return dataclasses.replace(self, **changes) if changes else self

    def check(self) -> None:
        if not isinstance(self, settings_of(self.task)):
            raise UserError(
                f"{type(self).__name__} are not for {self.task}: TrainingSettings.from_recipe finds those."
            )
        check_values(self)
        self.check_best_model()
        if self.output_dir is None:
            raise UserError("say where the run is to be written: --output_dir FOLDER.")
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
        self.overrides()

    @property
    def batch_size_of_recipe(self) -> int:
        """What `per_device_train_batch_size` would be if it were not `auto`."""
        usual = type(self).__dataclass_fields__["per_device_train_batch_size"].default
        return self.recipes(self.task).get(self.recipe, {}).get("per_device_train_batch_size", usual)

    @property
    def best_by(self) -> str | None:
        """Key of the figure that says which evaluation was the best; None if nothing asks for it."""
        known, metric = TASKS[self.task].kept_by, self.metric_for_best_model
        if metric is None:
            return TASKS[self.task].best if self.load_best_model_at_end or self.early_stopping_patience else None
        return metric if metric in known else f"eval_{metric}"

    def check_best_model(self) -> None:
        """Refuses, before anything is trained, a metric that no evaluation gives, and patience without evaluations."""
        known, metric = TASKS[self.task].kept_by, self.metric_for_best_model
        if metric is not None and self.best_by not in known:
            near = near_names(f"eval_{metric.removeprefix('eval_')}", known)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise UserError(f"--metric_for_best_model {metric}: an evaluation gives {', '.join(known)}{hint}")
        if self.early_stopping_patience and not self.eval_epochs:
            raise UserError(
                "--early_stopping_patience counts evaluations, and --eval_epochs 0 leaves one, at the end: give "
                "--eval_epochs 1, for example."
            )
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise UserError("--early_stopping_threshold says nothing without --early_stopping_patience N.")

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

    def course(self) -> dict[str, Any]:
        """The course of the learning rate: its kind, and what `optimisation.make_schedule` has to know of it."""
        return {"kind": self.lr_scheduler_type}

    def to_dict(self) -> dict[str, Any]:
        """All settings but the access token, fit to be written down."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hub_token"}

    def save(self, path: Path) -> None:
        """Writes a YAML file that `--config_file` reads back: what the run is, not how this start of it was asked."""
        once = ("config_file", "resume_from_checkpoint", "overwrite_output_dir")
        values = {name: value for name, value in self.to_dict().items() if name not in once}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def settings_of(task: str) -> type[TrainingSettings]:
    """The dataclass with the settings of a task.

    Args:
        task: a key of `TASKS`.

    Raises:
        UserError: there is no such task.
    """
    check_names([task], list(TASKS), "task")
    return pkgutil.resolve_name(TASKS[task].settings)


def all_settings() -> list[type[TrainingSettings]]:
    """Those of every task."""
    return list(dict.fromkeys(map(settings_of, TASKS)))


def shown_settings(task: str | None) -> list[str]:
    """What the card of a run shows, in order; a list of what is shown, so that nothing gets there by mistake.

    Args:
        task: of the run; None if that is not known.
    """
    return names_marked([settings_of(task)] if task in TASKS else all_settings(), "shown")


def default_recipe(settings: type[TrainingSettings]) -> str:
    return settings.__dataclass_fields__["recipe"].default


def defaults_of(task: str, recipe: str, given: Iterable[str] = ()) -> dict[str, Any]:
    """What a recipe sets, less what makes no sense beside the settings that were given."""
    kind = settings_of(task)
    recipes = kind.recipes(task)
    check_names([recipe], list(recipes), "recipe")
    settings, replaced = recipes[recipe], set()
    # A checkpoint replaces an architecture and the other way round.
    if "model_name_or_path" in given and "config_name" in settings:
        replaced.update(kind.of_architecture)
    if "config_name" in given:
        replaced.update(("model_name_or_path", "config_overrides"))
    return {name: value for name, value in settings.items() if name not in replaced}
