"""What the processes of an evaluation find apart, brought together once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from ..foundation.errors import UserError


def gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process has to say; nothing if any was asked to stop.

    Args:
        mine: with `fault`, the message of a UserError or None, and `stopped`.

    Raises:
        UserError: that of a process that has failed, in all of them: none is left waiting for another.
    """
    parts = gather_object([mine])
    for part in parts:
        if part["fault"]:
            raise UserError(part["fault"])
    return [] if any(part["stopped"] for part in parts) else parts


def count_images(parts: Sequence[dict[str, Any]], loader: Iterable[Any]) -> tuple[int, int]:
    """Images that were evaluated and that were skipped, by the `count` and `skipped` of each process.

    Raises:
        UserError: there are none, or too many were skipped.
    """
    count, skipped = (sum(part[name] for part in parts) for name in ("count", "skipped"))
    if not count:
        raise UserError("there is no image to evaluate on: the split is empty, or every image in it is broken.")
    if hasattr(loader, "judge"):  # a list of batches has none
        loader.judge(count + skipped, skipped)
    return count, skipped


def named_results(results: dict[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """Results fit for JSON: lists, the figures of single classes, under the classes' names; None for what is not a
    number; without the confusion matrix."""
    plain = {}
    for name, value in results.items():
        if isinstance(value, list):
            value = {label: known(number) for label, number in zip(label_names, value, strict=True)}
        plain[name] = known(value) if isinstance(value, float) else value
    plain.pop("confusion_matrix", None)
    return plain


def known(value: float) -> float | None:
    return None if np.isnan(value) else value
