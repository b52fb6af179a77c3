"""The model and the image processor that a run starts with, or that an evaluation loads."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ..configuration_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig
from ..data.classes import class_key
from ..export.folder import is_exported, no_model
from ..foundation.errors import UserError
from ..foundation.finite import check_weights
from ..image_processing_poolformer import PoolFormerImageProcessor
from .arguments import TrainingSettings, check_overrides


logger = logging.getLogger(__name__)


def load_checkpoint(
    name: str,
    *,
    revision: str = "main",
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    **config: Any,
) -> tuple[PreTrainedModel, Any, list[str]]:
    """Loads a classifier and its image processor.

    Args:
        name: Hub id or folder.
        config: fields of the configuration to change; weights that then do not fit are initialised.

    Returns:
        model, processor, and the names of the weights that did not come from the checkpoint.

    Raises:
        UserError: there is no such checkpoint, it is not an image classifier, or its weights are not finite.
    """
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            name, **where, **config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(name, **where)
    except Exception as error:
        # Whatever a foreign folder provokes: missing files, wrong types, a truncated safetensors file, no network.
        raise UserError(why_not_loaded(name, error)) from error
    check_weights(model, name)
    check_colours(name, model.config, processor)
    mismatched = [item[0] for item in info["mismatched_keys"]]
    return model, processor, sorted({*info["missing_keys"], *mismatched})


def check_colours(name: str, config: Any, processor: Any) -> None:
    """
    Raises:
        UserError: the model takes other channels than the image processor makes of the RGB images that we read.
    """
    channels = getattr(config, "num_channels", 3)
    if channels == 3:
        return
    try:
        made = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[1]
    except ValueError:  # such as a mean for each of four channels
        made = 3
    if made != channels:
        raise UserError(f"{name} takes images of {channels} channels, and images are read here in colour, as 3 (RGB).")


def initial_model(settings: TrainingSettings, label_names: Sequence[str]) -> tuple[PreTrainedModel, Any]:
    """The model of a run, with a head for these labels, and its image processor.

    A checkpoint whose labels are another set gets a new head, and says so. A checkpoint with the same set in another
    order keeps its order; see `label_order`.

    Raises:
        UserError: the checkpoint does not fit and `ignore_mismatched_sizes` is off; unknown names or overrides.
    """
    names = list(label_names)
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
    if settings.model_name_or_path:
        model, processor = from_checkpoint(settings, names, labels)
    else:
        model, processor = from_scratch(settings, labels)
    if settings.image_size:
        set_image_size(processor, settings.image_size)
    if settings.gradient_checkpointing:
        # The newer name of the same switch; transformers 5.17 knows the older one only.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model, processor


def from_scratch(settings: TrainingSettings, labels: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    overrides = settings.overrides()
    where = {"token": settings.hub_token, "cache_dir": settings.cache_dir}
    variant = VARIANTS.get(settings.config_name)
    rate = settings.drop_path_rate
    try:
        if variant is not None:
            kind = PoolFormerConfig if variant.model_type == "poolformer" else MetaFormerConfig
            check_overrides(overrides, kind, settings.config_name)
            if rate is None:
                rate = variant.drop_path_rate or 0.0  # not published for every checkpoint
            config = MetaFormerConfig.from_variant(
                settings.config_name,
                **{**labels, "num_labels": len(labels["id2label"]), "drop_path_rate": rate, **overrides},
            )
            processor = new_processor(variant.image_size, variant.crop_pct)
            if settings.image_size and settings.image_size != variant.image_size:
                processor.crop_pct = 1.0  # small images have no margin to crop away
        else:
            if not looks_like_checkpoint(settings.config_name):
                known = ", ".join(VARIANTS)
                raise UserError(
                    f"--config_name {settings.config_name}: neither a variant ({known}) nor a folder or Hub id."
                )
            chosen = {} if rate is None else {"drop_path_rate": rate}
            where["trust_remote_code"] = settings.trust_remote_code
            check_overrides(overrides, AutoConfig.from_pretrained(settings.config_name, **where), settings.config_name)
            config = AutoConfig.from_pretrained(settings.config_name, **where, **labels, **chosen, **overrides)
            processor = AutoImageProcessor.from_pretrained(settings.config_name, **where)
        return AutoModelForImageClassification.from_config(config), processor
    except UserError:
        raise
    except Exception as error:  # configurations validate themselves, with many kinds of exception
        raise UserError(f"cannot build {settings.config_name} with these overrides: {first_line(error)}") from error


def from_checkpoint(settings: TrainingSettings, names: list[str], labels: dict[str, Any]) -> tuple[Any, Any]:
    overrides = settings.overrides()
    source = {
        "revision": settings.model_revision,
        "token": settings.hub_token,
        "cache_dir": settings.cache_dir,
        "trust_remote_code": settings.trust_remote_code,
    }
    try:
        before = AutoConfig.from_pretrained(settings.model_name_or_path, **source)
    except Exception as error:
        raise UserError(why_not_loaded(settings.model_name_or_path, error)) from error
    check_overrides(overrides, before, settings.model_name_or_path)
    if settings.drop_path_rate is not None:
        overrides["drop_path_rate"] = settings.drop_path_rate
    learnt = [before.id2label[index] for index in range(len(before.id2label))]
    model, processor, fresh = load_checkpoint(settings.model_name_or_path, **source, **overrides, **labels)
    head = {name for name, _ in model.named_parameters() if belongs_to_head(name, model)}
    body = [name for name in fresh if name not in head]
    if body and not settings.ignore_mismatched_sizes:
        raise UserError(
            f"the checkpoint {settings.model_name_or_path} has another shape than the model asked for: {body[0]} and "
            f"{len(body) - 1} more weights do not fit. Change --config_overrides, or give --ignore_mismatched_sizes "
            "to start those afresh."
        )
    if learnt != names:
        # Equally many labels that mean something else would otherwise be taken over without a word.
        renew_head(model)
        logger.warning(
            "New head: the checkpoint knows %d labels (%s), the dataset has %d (%s).",
            len(learnt),
            shown(learnt),
            len(names),
            shown(names),
        )
    return model, processor


def label_order(settings: TrainingSettings, dataset_names: Sequence[str]) -> list[str]:
    """The labels in the order of the model to be: the checkpoint's, if it has the same set, else the dataset's."""
    names = list(dataset_names)
    if settings.model_name_or_path:
        try:
            config = AutoConfig.from_pretrained(
                settings.model_name_or_path,
                revision=settings.model_revision,
                token=settings.hub_token,
                cache_dir=settings.cache_dir,
                trust_remote_code=settings.trust_remote_code,
            )
        except Exception as error:
            raise UserError(why_not_loaded(settings.model_name_or_path, error)) from error
        learnt = [config.id2label[index] for index in range(len(config.id2label))]
        if sorted(map(str, map(class_key, learnt))) == sorted(map(str, map(class_key, names))):
            return learnt
    return names


def belongs_to_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight depends on the labels: the classifier, not the final norm before it."""
    return name.startswith(("classifier.", "head.", "fc.")) and not name.startswith(f"{model.base_model_prefix}.")


def renew_head(model: PreTrainedModel) -> None:
    fresh = dict(type(model)(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        if belongs_to_head(name, model):
            parameter.data.copy_(fresh[name].data)


def new_processor(image_size: int, crop_pct: float) -> Any:
    return PoolFormerImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        crop_pct=crop_pct,
    )


def set_image_size(processor: Any, side: int) -> None:
    """Makes a processor produce squares of `side` pixels, in whatever terms it states its size."""
    square = {"height": side, "width": side}
    size = dict(processor.size) if processor.size else {}
    processor.size = {"shortest_edge": side} if size.get("shortest_edge") else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square


def looks_like_checkpoint(name: str) -> bool:
    return "/" in name or Path(name).exists()


def why_not_loaded(name: str, error: BaseException, what: str = "an image classifier") -> str:
    """One line on why transformers could not load `what` from a folder or Hub id."""
    folder, text = Path(name), first_line(error)
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


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."


def shown(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
