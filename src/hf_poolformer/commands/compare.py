"""`hf-poolformer compare`: which of two models is better on the same images, on which, and whether by chance."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..foundation.strict_json import to_json
from . import command, quieten


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Compares; see `reports.comparison_settings` for the flags. Exit status 4 where B is what `--fail_on` says."""
    from ..reports.comparison_settings import WORSE, parse_comparison

    logging.basicConfig(format="%(message)s")
    settings = parse_comparison(argv, prog)
    quieten()
    from ..reports.comparison_page import comparison_lines
    from ..reports.comparison_run import REPORT, compare

    comparison = compare(settings)
    if settings.json:
        print(to_json({**comparison.data(), "report": str(settings.folder / REPORT)}, indent=2))
    else:
        print("\n".join([*comparison_lines(comparison), f"Report: {settings.folder / REPORT}"]))
    return WORSE if settings.fail_on == "worse" and comparison.better == "A" else 0
