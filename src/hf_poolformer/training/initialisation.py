"""The model and the image processor that a run starts with, or that an evaluation loads."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ..configuration_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig
from ..data.classes import class_key
from ..foundation.errors import UserError, one_line
from ..foundation.loading import belongs_to_head, load_checkpoint, looks_like_checkpoint, why_not_loaded
from ..foundation.origin import Origin
from ..foundation.settings import check_names
from ..image_processing_poolformer import PoolFormerImageProcessor
from .arguments import TrainingSettings


logger = logging.getLogger(__name__)


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
        raise UserError(f"cannot build {settings.config_name} with these overrides: {one_line(error)}") from error


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
    model, processor, fresh = load_checkpoint(settings.model_name_or_path, Origin(**source), **overrides, **labels)
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


def shown(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def check_overrides(overrides: Mapping[str, Any], config: Any, name: str) -> None:
    """
    Args:
        config: a configuration of the class that is changed, or the class itself where it is a dataclass.
        name: of the model, for the message.

    Raises:
        UserError: such a configuration has no field of that name, or what it says comes from the data.
    """
    from ..configuration_poolformer import Fixed  # brings torch, which --help does not wait for

    kind = config if isinstance(config, type) else type(config)
    known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    known |= set() if isinstance(config, type) else set(vars(config))
    constants = {field: value for field, value in vars(kind).items() if isinstance(value, Fixed)}
    known |= {*constants, *getattr(kind, "attribute_map", {}), "out_features", "out_indices", "torch_dtype"}
    for field in ("id2label", "label2id", "num_labels", "problem_type"):
        if field in overrides:
            raise UserError(f"--config_overrides cannot set {field}: the classes are those of the data.")
    check_names(overrides, sorted(field for field in known if field[0] != "_"), "key in --config_overrides")
    for field, value in overrides.items():
        fixed = constants.get(field)
        if fixed is not None and value not in (fixed.value, json.loads(json.dumps(getattr(kind, field)))):
            raise UserError(
                f"--config_overrides cannot set {field}: it is a constant of {kind.model_type}, the architecture of "
                f"{name}. With --config_name metaformer_id_s12 every part can be chosen."
            )
