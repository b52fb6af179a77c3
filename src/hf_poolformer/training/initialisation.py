"""The model and the image processor that a run starts with, or that an evaluation loads."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..configuration_poolformer import VARIANTS, MetaFormerConfig, PoolFormerConfig
from ..data.classes import class_key
from ..foundation.errors import UserError, one_line
from ..foundation.loading import (
    belongs_to_head,
    is_pooler,
    load_checkpoint,
    load_config,
    load_encoder,
    load_processor,
    looks_like_checkpoint,
)
from ..foundation.names import first_few
from ..foundation.settings import check_names
from ..foundation.tasks import HEADLESS, TASKS, task_of_config, task_of_problem
from ..image_processing_poolformer import PoolFormerImageProcessor
from ..settings.classification import ClassificationSettings, FeatureDistillationSettings
from ..settings.training import TrainingSettings
from ..token_mixers import FixedTokens
from .channels import adapt_stem, in_channels
from .heads import map_head


logger = logging.getLogger(__name__)


def initial_model(settings: ClassificationSettings, label_names: Sequence[str]) -> tuple[PreTrainedModel, Any, bool]:
    """The model of a run, with a head for these labels; its image processor; and whether the head is trained already.

    A checkpoint of another task, or whose labels are another set, gets a new head, and says so. A checkpoint with the
    same set in another order keeps its order; see `labels_in_model_order`.

    Args:
        label_names: of the classes, or of the numbers.

    Raises:
        UserError: the checkpoint does not fit and `ignore_mismatched_sizes` is off; unknown names or overrides.
    """
    names = list(label_names)
    labels = {**both_ways(names), "problem_type": TASKS[settings.task].problem_type}
    if settings.model_name_or_path:
        model, processor, trained_head = from_checkpoint(settings, names, labels)
    else:
        fields = {**labels, **head_fields(settings)}
        model, processor, trained_head = from_scratch(settings, fields), processor_of_architecture(settings), False
    check_head_dropout(model.config, settings.head_dropout)
    if settings.num_channels:
        model, processor = adapt_stem(model, settings.num_channels), in_channels(processor, settings.num_channels)
    prepare(model, processor, settings)
    return model, processor, trained_head


def initial_encoder(settings: FeatureDistillationSettings) -> tuple[PreTrainedModel, Any]:
    """The model of a run that learns no labels, without a head, and its image processor.

    Raises:
        UserError: the checkpoint does not fit and `ignore_mismatched_sizes` is off; unknown names or overrides.
    """
    if settings.model_name_or_path:
        name, origin = settings.model_name_or_path, settings.origin()
        overrides = overrides_of(settings, load_config(name, origin, "an image encoder"))
        model, processor, fresh = load_encoder(name, origin, **overrides)
        check_shape(name, [weight for weight in fresh if not is_pooler(weight)], settings)
        model.config.num_labels = 0
    else:
        model, processor = from_scratch(settings, both_ways([])), processor_of_architecture(settings)
    prepare(model, processor, settings)
    return model, processor


def prepare(
    model: PreTrainedModel, processor: Any, settings: ClassificationSettings | FeatureDistillationSettings
) -> None:
    """Brings a model and its processor to the size of the images, and to compute as the settings say.

    Raises:
        UserError: the sizes of the images are to change, and the architecture knows one only; or an image processor
            that does not say what it does, as timm's through transformers, so that augmentation cannot do the same.
    """
    if missing := [name for name in ("size", "image_mean", "image_std") if getattr(processor, name, None) is None]:
        raise UserError(
            f"{settings.model_name_or_path or settings.config_name}: its image processor, a "
            f"{type(processor).__name__}, does not say its {missing[0]}, so images for training cannot be made as it "
            "would make them. Such a model can be a --teacher, and be evaluated; to train one of timm's PoolFormers "
            "and MetaFormers, bring it into this package's form: hf-poolformer convert."
        )
    if settings.size_schedule and any(isinstance(layer, FixedTokens) for layer in model.modules()):
        raise UserError(
            "--size_schedule: this architecture mixes a fixed number of tokens, so it knows one size only."
        )
    if settings.image_size:
        set_image_size(processor, settings.image_size)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)


def both_ways(names: Sequence[str]) -> dict[str, Any]:
    """Names of classes as a configuration has them."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def from_scratch(settings: TrainingSettings, labels: dict[str, Any]) -> PreTrainedModel:
    """A model of the architecture `config_name` for the settings' task, with random weights."""
    name, overrides, rate = settings.config_name, settings.overrides(), settings.drop_path_rate
    variant, where = VARIANTS.get(name), settings.origin_of_others().arguments()
    try:
        if variant is not None:
            check_overrides(
                overrides, PoolFormerConfig if variant.model_type == "poolformer" else MetaFormerConfig, name
            )
            if rate is None:
                rate = variant.drop_path_rate or 0.0  # not published for every checkpoint
            chosen = {"num_labels": len(labels["id2label"]), "drop_path_rate": rate}
            chosen |= {"num_channels": settings.num_channels} if getattr(settings, "num_channels", None) else {}
            config = MetaFormerConfig.from_variant(name, **{**labels, **chosen, **overrides})
        elif looks_like_checkpoint(name):
            check_overrides(overrides, AutoConfig.from_pretrained(name, **where), name)
            chosen = {} if rate is None else {"drop_path_rate": rate}
            config = AutoConfig.from_pretrained(name, **where, **{**labels, **chosen, **overrides})
        else:
            raise UserError(f"--config_name {name}: neither a variant ({', '.join(VARIANTS)}) nor a folder or Hub id.")
        return TASKS[settings.task].auto_model().from_config(config)
    except UserError:
        raise
    except Exception as error:  # configurations validate themselves, with many kinds of exception
        raise UserError(f"cannot build {name} with these overrides: {one_line(error)}") from error


def head_fields(settings: ClassificationSettings) -> dict[str, Any]:
    """The fields of a configuration from which a classifier's head is made."""
    variant, rate = VARIANTS.get(settings.config_name), settings.head_dropout
    if rate is None and variant is not None:
        rate = variant.head_dropout or None
    return {} if rate is None else {"head_dropout": rate}


def check_head_dropout(config: PreTrainedConfig, rate: float | None) -> None:
    """
    Raises:
        UserError: an architecture without such a dropout was to have it.
    """
    if rate and not (isinstance(config, MetaFormerConfig) and config.head_dropout):
        raise UserError(
            f"--head_dropout {rate}: a {config.model_type} has no dropout before its classifier's last layer; those "
            "of model type metaformer have it."
        )


def processor_of_architecture(settings: ClassificationSettings | FeatureDistillationSettings) -> Any:
    """The image processor of a model of images that is trained from scratch."""
    name, variant = settings.config_name, VARIANTS.get(settings.config_name)
    if variant is None:
        return load_processor(name, settings.origin_of_others())
    # Small images have no margin to crop away.
    crop_pct = variant.crop_pct if settings.image_size in (None, variant.image_size) else 1.0
    return PoolFormerImageProcessor(
        size={"shortest_edge": variant.image_size},
        crop_size={"height": variant.image_size, "width": variant.image_size},
        crop_pct=crop_pct,
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Has activations recomputed in the backward pass; transformers 5.17 knows the older name of the switch only."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def from_checkpoint(
    settings: ClassificationSettings, names: list[str], labels: dict[str, Any]
) -> tuple[PreTrainedModel, Any, bool]:
    name, origin = settings.model_name_or_path, settings.origin()
    before = load_config(name, origin)
    overrides = overrides_of(settings, before) | head_fields(settings)
    model, processor, fresh = load_checkpoint(name, origin, **overrides, **labels)
    model.float()  # stored in half precision it would be trained in that: small steps would round to nothing
    headless = task_of_config(before, headless=True) in HEADLESS
    # An encoder has no final norm either, which is a classifier's.
    body = [weight for weight in fresh if not belongs_to_head(weight, model)]
    check_shape(name, [weight for weight in body if not (headless and is_final_norm(weight, model))], settings)
    if getattr(model.config, "label_thresholds", None) is not None:
        model.config.label_thresholds = None  # of the model as it was
    if headless:
        logger.warning("New head: the checkpoint is an encoder, without one.")
        return model, processor, False
    trained_for, learnt = task_of_problem(before.problem_type), learnt_labels(before)
    same_task = trained_for.problem_type == labels["problem_type"]
    if same_task and learnt == names:
        return model, processor, not any(belongs_to_head(weight, model) for weight in fresh)
    # Equally many labels that mean something else would otherwise be taken over without a word.
    renew_head(model)
    if same_task:
        if settings.head_mapping == "names" and map_head(model, settings, overrides):
            return model, processor, False
        logger.warning(
            "New head: the checkpoint knows %d labels (%s), the dataset has %d (%s).",
            len(learnt),
            first_few(learnt, 3),
            len(names),
            first_few(names, 3),
        )
    else:
        logger.warning("New head: the checkpoint is for %s, this run for %s.", trained_for.name, settings.task)
    return model, processor, False


def check_shape(name: str, fresh: Sequence[str], settings: TrainingSettings) -> None:
    """
    Args:
        fresh: weights that did not come from the checkpoint, and should have.

    Raises:
        UserError: there are any, and `ignore_mismatched_sizes` is off.
    """
    if fresh and not settings.ignore_mismatched_sizes:
        raise UserError(
            f"the checkpoint {name} has another shape than the model asked for: {fresh[0]} and "
            f"{len(fresh) - 1} more weights do not fit. Change --config_overrides, or give --ignore_mismatched_sizes "
            "to start those afresh."
        )


def is_final_norm(weight: str, model: PreTrainedModel) -> bool:
    """Whether a weight lies between an encoder and the head that labels need."""
    return not weight.startswith(f"{model.base_model_prefix}.")


def labels_in_model_order(settings: TrainingSettings, dataset_names: Sequence[str]) -> list[str]:
    """The labels in the order of the model to be: the checkpoint's, if it has the same set, else the dataset's."""
    names = list(dataset_names)
    if settings.model_name_or_path:
        learnt = learnt_labels(load_config(settings.model_name_or_path, settings.origin()))
        if sorted(map(str, map(class_key, learnt))) == sorted(map(str, map(class_key, names))):
            return learnt
    return names


def learnt_labels(config: PreTrainedConfig) -> list[str]:
    """The names of a checkpoint's classes, in its order."""
    return [config.id2label[index] for index in range(len(config.id2label))]


def overrides_of(settings: TrainingSettings, config: PreTrainedConfig) -> dict[str, Any]:
    """What the settings change in the configuration of their checkpoint.

    Raises:
        UserError: as `check_overrides`.
    """
    overrides = settings.overrides()
    check_overrides(overrides, config, settings.model_name_or_path)
    rate = settings.drop_path_rate
    return overrides if rate is None else {**overrides, "drop_path_rate": rate}


def renew_head(model: PreTrainedModel) -> None:
    fresh = dict(type(model)(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        if belongs_to_head(name, model):
            parameter.data.copy_(fresh[name].data)


def set_image_size(processor: Any, side: int) -> None:
    """Makes a processor produce squares of `side` pixels, in whatever terms it states its size."""
    square = {"height": side, "width": side}
    size = dict(processor.size) if processor.size else {}
    processor.size = {"shortest_edge": side} if size.get("shortest_edge") else square
    if getattr(processor, "crop_size", None):
        processor.crop_size = square


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
    if "num_channels" in overrides:
        raise UserError("--config_overrides cannot set num_channels, of which images, too, must know: --num_channels.")
    for field in ("id2label", "label2id", "num_labels", "problem_type", "label_thresholds"):
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
