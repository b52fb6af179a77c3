"""Models and image processors out of a folder or a repository, and one line on why that failed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .errors import UserError, one_line
from .exported import is_exported, no_model
from .files import why_unreadable
from .finite import check_weights
from .origin import Origin
from .tasks import CLASSIFICATION, TASKS, Task, task_of_config


HERE = Origin()


def load_checkpoint(name: str, origin: Origin = HERE, **config: Any) -> tuple[PreTrainedModel, Any, list[str]]:
    """Loads a classifier and its image processor.

    Args:
        name: Hub id or folder.
        config: fields of the configuration to change; weights that then do not fit are initialised.

    Returns:
        model, processor, and the names of the weights that did not come from the checkpoint.

    Raises:
        UserError: there is no such checkpoint, it is not an image classifier, or its weights are not finite.
    """
    config["ignore_mismatched_sizes"] = True
    model, processor, missing = _load(name, origin, AutoModelForImageClassification, "an image classifier", config)
    check_colours(name, model.config, processor)
    return model, processor, missing


def load_encoder(name: str, origin: Origin = HERE, **config: Any) -> tuple[PreTrainedModel, Any, list[str]]:
    """As `load_checkpoint`, of any vision model, without its head."""
    config["ignore_mismatched_sizes"] = True
    model, processor, missing = _load(name, origin, AutoModel, "an image encoder", config)
    check_colours(name, model.config, processor)
    return model, processor, missing


def load_trained(name: str, origin: Origin, task: Task) -> tuple[PreTrainedModel, Any]:
    """Loads a model for a task, and its image processor.

    Raises:
        UserError: there is no such checkpoint, it is for another task, or its weights are not all there or not finite.
    """
    model, processor, missing = _load(name, origin, task.auto_model(), f"a model for {task.name}", {})
    if missing:
        raise UserError(
            f"{name} is not a trained model for {task.name}: it has no weights for {', '.join(missing[:3])}"
        )
    return model, processor


def _load(
    name: str, origin: Origin, auto_class: Any, what: str, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any, list[str]]:
    """Model, processor, and the names of the weights that did not come from the checkpoint."""
    where = origin.arguments()
    try:
        model, info = auto_class.from_pretrained(name, **where, **options, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(name, **where)
    except Exception as error:
        # Whatever a foreign folder provokes: missing files, wrong types, a truncated safetensors file, no network.
        raise UserError(why_not_loaded(name, error, what)) from error
    check_weights(model, name)
    mismatched = [item[0] for item in info["mismatched_keys"]]
    return model, processor, sorted({*info["missing_keys"], *mismatched})


def load_config(name: str, origin: Origin = HERE, what: str = "an image classifier") -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Args:
        what: it is wanted for, in the message.

    Raises:
        UserError: there is no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(name, **origin.arguments())
    except Exception as error:  # whatever a foreign folder provokes
        raise UserError(why_not_loaded(name, error, what)) from error


def load_processor(name: str, origin: Origin = HERE) -> Any:
    """The image processor of a checkpoint.

    Raises:
        UserError: it has none.
    """
    try:
        return AutoImageProcessor.from_pretrained(name, **origin.arguments())
    except Exception as error:  # whatever a foreign folder provokes
        why = why_unreadable(Path(name)) or one_line(error)
        raise UserError(f"{name} has no image processor: {why}") from error


def task_of_checkpoint(name: str, origin: Origin) -> Task:
    """What a model does, by its configuration; one of no known task is taken for a classifier, which says so if not.

    Raises:
        UserError: there is no such model.
    """
    return task_of_config(load_config(name, origin, "a model")) or TASKS[CLASSIFICATION]


def check_colours(name: str, config: Any, processor: Any) -> None:
    """
    Raises:
        UserError: the model takes other channels than the image processor makes of the RGB images that we read.
    """
    channels, taken = getattr(config, "num_channels", 3), getattr(processor, "num_channels", None) or 3
    if channels == taken:
        return
    if taken != 3:
        raise UserError(f"{name} takes images of {channels} channels, but its image processor makes {taken} of them.")
    try:
        made = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[1]
    except ValueError:  # such as a mean for each of four channels
        made = 3
    if made != channels:
        raise UserError(
            f"{name} takes images of {channels} channels, and images are read here in colour, as 3 (RGB), unless "
            f'preprocessor_config.json says otherwise: "num_channels": {channels}.'
        )


def belongs_to_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight depends on the labels: the classifier, not the final norm before it."""
    return name.startswith(("classifier.", "head.", "fc.")) and not name.startswith(f"{model.base_model_prefix}.")


def is_pooler(name: str) -> bool:
    """Whether a weight of an encoder belongs to a layer behind it, which classifiers are trained without."""
    return name.startswith("pooler.")


def looks_like_checkpoint(name: str) -> bool:
    return "/" in name or Path(name).exists()


def why_not_loaded(name: str, error: BaseException, what: str = "an image classifier") -> str:
    """One line on why transformers could not load `what` from a folder or Hub id."""
    folder, text = Path(name), one_line(error)
    unreadable = why_unreadable(folder)
    if unreadable:
        return f"cannot load {what} from {name}: {unreadable}."
    if is_exported(name):
        return no_model(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return f"{name} is not a model: it has no config.json."
    other = re.match(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)Config'>", text)
    if other:
        return f"{name} is a {other[1]}, which cannot be {what}."
    if "couldn't connect to" in text and not folder.is_dir():
        network = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        return f"there is no folder {name}, no earlier download of it is here, and {network}."
    if text.startswith("Repo id must") and not folder.exists():
        return f"there is no folder {name}, and a Hub id looks like user/name."
    return f"cannot load {what} from {name}: {text}"
