"""`hf-poolformer train`: train or fine-tune an image classifier, on one device or many."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import command


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Trains; see `training.arguments` for the flags. A model that is trained but cannot be published gives 3."""
    from ..training.arguments import parse

    logging.basicConfig(format="%(message)s")
    settings = parse(argv, prog)
    from ..foundation.processes import start_cpu_processes

    start_cpu_processes()
    from ..training.loop import train

    train(settings)
    return 0
