"""`hf-poolformer benchmark`: speed next to every peer."""

from __future__ import annotations

from collections.abc import Sequence

from . import command


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Times; `benchmark.command` has the flags and knows what to say."""
    from ..benchmark.command import main as run

    return run(argv, prog)
