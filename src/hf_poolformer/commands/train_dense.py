"""`hf-poolformer train-dense`: train a segmenter or a detector, by the paper's recipes unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from . import command
from .train import run


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """As `train`, of a task that has to be named; see `settings.dense` for the flags."""
    from ..foundation.tasks import dense_tasks

    return run(argv, prog, dense_tasks())
