"""The segmenter or detector that a run starts with, and its image processor."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel

from ...data.classes import CONFIG_FIELD, Classes
from ...foundation.errors import UserError
from ...foundation.finite import check_weights
from ...foundation.loading import load_config, load_processor, why_not_loaded
from ...foundation.names import first_few
from ...foundation.tasks import TASKS
from ...settings.dense import DenseSettings
from ..initialisation import both_ways, checkpoint_activations, from_scratch, learnt_labels, overrides_of


logger = logging.getLogger(__name__)


def initial_dense_model(settings: DenseSettings, classes: Classes) -> tuple[PreTrainedModel, Any]:
    """The model of a run, with a head for these classes, and its image processor.

    From a checkpoint of another task comes the backbone, from one of the same task the head as well; what does not fit
    starts afresh, and that is said. The configuration holds which stored values mean which classes.

    Raises:
        UserError: there is no such checkpoint or variant, or the backbone of the checkpoint does not fit.
    """
    names = list(classes.names)
    labels = both_ways(names)
    model = from_checkpoint(settings, names, labels) if settings.model_name_or_path else from_scratch(settings, labels)
    table = classes.for_config()
    if table is not None or getattr(model.config, CONFIG_FIELD, None):
        setattr(model.config, CONFIG_FIELD, table)  # not that of a checkpoint's dataset
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    size = {"shortest_edge": settings.image_size, "longest_edge": settings.longest_edge}
    changes: dict[str, Any] = {"do_reduce_labels": True} if settings.reduce_labels else {}
    if settings.model_name_or_path:  # which was trained with pixels of this mean and standard deviation
        learnt = load_processor(settings.model_name_or_path, settings.origin())
        changes |= {"image_mean": list(learnt.image_mean), "image_std": list(learnt.image_std)}
    return model, TASKS[settings.task].new_processor(size=size, **changes)


def from_checkpoint(settings: DenseSettings, names: list[str], labels: dict[str, Any]) -> PreTrainedModel:
    name, origin, what = settings.model_name_or_path, settings.origin(), "the start of a segmenter or detector"
    before = load_config(name, origin, what)
    changes = {**overrides_of(settings, before), **labels}
    load = TASKS[settings.task].auto_model().from_pretrained
    try:
        model, info = load(
            name, **origin.arguments(), **changes, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:  # whatever a foreign folder provokes
        raise UserError(why_not_loaded(name, error, what)) from error
    check_weights(model, name)
    fresh = sorted({*info["missing_keys"], *(item[0] for item in info["mismatched_keys"])})
    # The norms of the feature maps are the backbone's, but no classifier has them.
    body = f"{model.base_model_prefix}."
    lost = [key for key in fresh if key.startswith(body) and not key.startswith(f"{body}hidden_states_norms.")]
    if lost and not settings.ignore_mismatched_sizes:
        raise UserError(
            f"the checkpoint {name} has another backbone than the model asked for: {lost[0]} and {len(lost) - 1} more "
            "weights do not fit. Change --config_overrides, or give --ignore_mismatched_sizes to start those afresh."
        )
    heads = sorted({key.split(".")[0] for key in fresh if not key.startswith(body)})
    if heads:
        logger.warning("%s starts afresh: %s has no weights that fit.", ", ".join(heads), name)
    elif learnt_labels(before) != names:
        # Equally many classes that mean something else: as good a start as any, but not the same classes.
        logger.warning("The checkpoint's classes were others; the head now learns %s.", first_few(names, 3))
    return model
