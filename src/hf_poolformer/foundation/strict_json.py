"""JSON that every reader takes: Python's own writes NaN and Infinity, which are none."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps`, in which numbers that are not finite become null.

    Args:
        options: of `json.dumps`.
    """
    return json.dumps(finite_or_none(value), allow_nan=False, **options)


def finite_or_none(value: Any) -> Any:
    """A copy of a JSON value in which what is not finite is None."""
    if isinstance(value, dict):
        # Keys may be numbers, too, which become text.
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
