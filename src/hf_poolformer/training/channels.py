"""Models and image processors for another number of channels than they were trained with, and statistics of data."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_poolformer import VARIANTS
from ..data.channels import measure_channels
from ..data.columns import ImageDataset
from ..data.transforms import channels_of
from ..foundation.errors import UserError, one_line
from ..foundation.loading import load_config, looks_like_checkpoint
from ..foundation.processes import found_by_main
from ..image_processing_poolformer import EvaluationTransform, PoolFormerImageProcessor
from ..settings.classification import ClassificationSettings


logger = logging.getLogger(__name__)


def channels_of_run(settings: ClassificationSettings) -> int:
    """Channels of the images that a run trains on."""
    return settings.num_channels or channels_of_origin(settings)


def channels_of_origin(settings: ClassificationSettings) -> int:
    """Channels of the checkpoint or architecture that a run starts from."""
    if settings.model_name_or_path:
        config = load_config(settings.model_name_or_path, settings.origin())
    elif settings.config_name in VARIANTS or not looks_like_checkpoint(settings.config_name):
        return 3
    else:
        config = load_config(settings.config_name, settings.origin_of_others())
    return getattr(config, "num_channels", 3)


def check_rgb(processor: Any, flag: str) -> None:
    """
    Raises:
        UserError: the images are not RGB, which a flag needs.
    """
    if (number := channels_of(processor)) != 3:
        raise UserError(f"{flag} is for RGB, and these images have {number} channels: leave it out.")


def adapt_weight(weight: torch.Tensor, number: int) -> torch.Tensor:
    """A convolution's weight (out, channels, height, width) for `number` input channels, as timm adapts it.

    For one channel the sum over all: a grey image then answers as the same image in colour did. For more, the channels
    in their order, again and again, times channels / number: what comes out keeps its size.
    """
    if number == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    channels = weight.shape[1]
    repeated = weight.float().repeat(1, math.ceil(number / channels), 1, 1)[:, :number]
    return (repeated * (channels / number)).to(weight.dtype)


def adapt_stem(model: PreTrainedModel, number: int) -> PreTrainedModel:
    """A model for images of `number` channels with the weights of another; those of its first convolution are adapted.

    That is found without knowing the architecture: the one weight whose shape depends on the number of channels.

    Raises:
        UserError: the architecture has no such number, or more weights depend on it, or others than a convolution's.
    """
    before, kind = getattr(model.config, "num_channels", None), type(model).__name__
    if before is None:
        raise UserError(f"--num_channels: the configuration of a {kind} has no num_channels that could be changed.")
    if before == number:
        return model
    config = copy.deepcopy(model.config)
    config.num_channels = number
    try:
        adapted = type(model)(config)
    except Exception as error:  # whatever a foreign architecture raises
        raise UserError(f"--num_channels: no {kind} takes {number} channels: {one_line(error)}") from error
    weights = model.state_dict()
    shapes = {name: values.shape for name, values in adapted.state_dict().items()}
    other = [name for name, shape in shapes.items() if name not in weights or shape != weights[name].shape]
    if len(other) != 1 or weights.keys() != shapes.keys():
        raise UserError(
            f"--num_channels: which weights of a {kind} see the image cannot be told: "
            f"{', '.join(other[:3]) if other else 'none'} depend on the number of channels."
        )
    (name,) = other
    old, new = weights[name].shape, shapes[name]
    if len(old) != 4 or (old[1], new[1]) != (before, number) or (old[0], *old[2:]) != (new[0], *new[2:]):
        raise UserError(
            f"--num_channels: {name} of a {kind} has shape {tuple(old)}, which is no convolution over {before} "
            "channels that could be adapted."
        )
    weights[name] = adapt_weight(weights[name], number)
    adapted.load_state_dict(weights)
    return adapted.to(model.dtype).train(model.training)


def in_channels(processor: Any, number: int) -> Any:
    """An image processor like this one for images of `number` channels.

    Mean and standard deviation are the average of its own for each channel. Processors of other models know no other
    numbers of channels: what they say of sizes is done by a `PoolFormerImageProcessor` then.

    Raises:
        UserError: it says nothing of sizes that could be taken over.
    """
    if channels_of(processor) == number:
        return processor
    statistics = {
        name: [sum(values) / len(values)] * number
        for name in ("image_mean", "image_std")
        if (values := getattr(processor, name, None)) and not isinstance(values, float)
    }
    if isinstance(processor, EvaluationTransform):
        processor = copy.deepcopy(processor)
        processor.num_channels = None if number == 3 else number
        for name, values in statistics.items():
            setattr(processor, name, values)
        return processor
    names = ("size", "crop_size", "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "crop_pct")
    said = {name: value for name in names if (value := getattr(processor, name, None)) is not None}
    said["do_center_crop"] = bool(getattr(processor, "do_center_crop", None)) or "crop_pct" in said
    if said["do_center_crop"] and "crop_size" not in said and (side := dict(said["size"]).get("shortest_edge")):
        said["crop_size"] = {"height": side, "width": side}
    try:
        made = PoolFormerImageProcessor(num_channels=number, **{"crop_pct": 1.0, **said, **statistics})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--num_channels: no image processor for {number} channels can be made of a {type(processor).__name__}: "
            f"{one_line(error)}"
        ) from error
    logger.warning(
        "A %s knows no images of %d channels: the model gets a PoolFormerImageProcessor of the same size.",
        type(processor).__name__,
        number,
    )
    return made


def choose_statistics(
    processor: Any, settings: ClassificationSettings, dataset: ImageDataset, choices: dict[str, Any]
) -> None:
    """Gives the processor mean and standard deviation of the data, where the settings ask for that.

    Args:
        dataset: the training images.
        choices: of the run (`TaskTraining.choices`), which keep what was measured.

    Raises:
        UserError: no image can be read.
    """
    number, wanted = channels_of(processor), settings.image_statistics
    if wanted == "auto":
        wanted = "checkpoint" if number in (3, channels_of_origin(settings)) else "data"
    if wanted == "data":
        if "image_statistics" not in choices:
            choices["image_statistics"] = found_by_main(lambda: measure_channels(dataset, number))
        processor.image_mean, processor.image_std = map(list, choices["image_statistics"])
