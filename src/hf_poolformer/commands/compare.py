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
    from ..foundation.processes import start_cpu_processes

    start_cpu_processes()
    quieten()
    from accelerate import PartialState

    from ..foundation.report_folder import PAGE
    from ..reports.comparison_page import comparison_lines
    from ..reports.comparison_run import compare

    comparison = compare(settings)
    if PartialState().is_main_process:
        report = settings.folder / PAGE
        lines = [*comparison_lines(comparison), f"Report: {report}"]
        print(to_json({**comparison.data(), "report": str(report)}, indent=2) if settings.json else "\n".join(lines))
    return WORSE if settings.fail_on == "worse" and comparison.better == "A" else 0
