"""`hf-poolformer train`: train or fine-tune a classifier, a segmenter or a detector, on one device or many."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import command


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Trains; see `settings` for the flags. A model that is trained but cannot be published gives 3."""
    return run(argv, prog)


def run(argv: Sequence[str] | None, prog: str | None, tasks: Sequence[str] | None = None) -> int:
    """Trains one of these tasks, as `settings.command_line.parse` takes them."""
    from ..settings.command_line import parse

    logging.basicConfig(format="%(message)s")
    settings = parse(argv, prog, tasks=tasks)
    from ..foundation.processes import part, start_cpu_processes

    start_cpu_processes()
    from ..training.loop import train

    train(settings)
    part()
    return 0
