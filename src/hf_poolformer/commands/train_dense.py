"""`hf-poolformer train-dense`: train a segmenter or a detector, by the paper's recipes unless told otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import command


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Trains Semantic FPN, RetinaNet or Mask R-CNN; see `training.dense.arguments` for the flags."""
    from ..training.dense.arguments import parse

    logging.basicConfig(format="%(message)s")
    settings = parse(argv, prog)
    from ..foundation.processes import start_cpu_processes

    start_cpu_processes()
    from ..training.dense.loop import train

    train(settings)
    return 0
