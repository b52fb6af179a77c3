"""`hf-poolformer publish`: a model's or a dataset's folder to the Hub, in one commit, verified."""

from __future__ import annotations

from collections.abc import Sequence

from . import command


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Publishes; `hub.publishing` has the flags and knows what to say."""
    from ..hub import publishing

    return publishing.main(argv, prog)
