"""Heads that keep what they know: the rows of a checkpoint's labels that are labels of the data, too."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.classes import class_key
from ..foundation.loading import belongs_to_head, load_checkpoint
from ..settings.classification import ClassificationSettings


logger = logging.getLogger(__name__)


def map_head(model: PreTrainedModel, settings: ClassificationSettings, overrides: dict[str, Any]) -> bool:
    """Gives the labels of a model the rows that their names have in the head of the checkpoint it came from.

    The layers before the last come from the checkpoint as they are. A label that the checkpoint does not know begins
    as the mean of all its rows, as the one class of ImageNet-1K that ImageNet-21K lacks did for the paper's authors.

    Args:
        model: with a new head, as `renew_head` leaves it; its configuration names the labels.
        overrides: with which it was loaded.

    Returns:
        whether any name agrees, and the heads end with linear layers; if not, the head is as it was.
    """
    theirs, _, _ = load_checkpoint(settings.model_name_or_path, settings.origin(), **overrides)
    if "regression" in (model.config.problem_type, theirs.config.problem_type):
        return False  # rows of numbers, whatever these are called
    learnt, names = ([one.config.id2label[i] for i in range(one.config.num_labels)] for one in (theirs, model))
    rows = rows_by_name(learnt, names)
    known = [(index, row) for index, row in enumerate(rows) if row is not None]
    ours, others = last_layer(model), last_layer(theirs)
    if not known or ours is None or others is None:
        return False
    last = {id(parameter) for parameter in ours.parameters()}
    source = dict(theirs.named_parameters())
    places, taken = (torch.tensor(numbers) for numbers in zip(*known, strict=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if belongs_to_head(name, model) and id(parameter) not in last:
                parameter.copy_(source[name])
        for name, parameter in ours.named_parameters():
            weights = getattr(others, name)
            parameter.copy_(weights.mean(0, keepdim=True).expand_as(parameter))
            parameter[places] = weights[taken]
    logger.warning(
        "Head: %d of %d labels keep their rows of the checkpoint's %d%s.",
        len(known),
        len(names),
        len(learnt),
        "" if len(known) == len(names) else "; the others begin as the mean of all rows",
    )
    return True


def rows_by_name(learnt: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each of `names` its place among `learnt`; None for one that is not there, or there more than once.

    transformers' names for labels without a name, `LABEL_0`, name nothing.
    """
    keys = [class_key(name) for name in learnt]
    counts = Counter(keys)
    places = {
        key: place
        for place, key in enumerate(keys)
        if counts[key] == 1 and key is not None and key != f"LABEL_{place}"
    }
    return [places.get(class_key(name)) for name in names]


def last_layer(model: PreTrainedModel) -> nn.Linear | None:
    """What gives the logits, if it is a linear layer of a head that is recognised."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and belongs_to_head(f"{name}.weight", model)
    ]
    return layers[-1] if layers else None
