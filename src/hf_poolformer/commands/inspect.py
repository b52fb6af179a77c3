"""`hf-poolformer inspect`: what is in a dataset, before anything is trained on it.

    hf-poolformer inspect photos
    hf-poolformer inspect photos --fail_on leaks,duplicates,broken

Stopped or killed, the same command goes on where it was.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from ..foundation.strict_json import to_json
from . import Terminated, command, quieten


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Inspects; see `reports.inspection_settings` for the flags. Exit status 4 where --fail_on finds something."""
    from ..reports.inspection_settings import FAULTY, parse_inspection

    logging.basicConfig(format="%(message)s")
    settings = parse_inspection(argv, prog)
    terminated: list[int] = []

    def terminate(number: int, frame: object) -> None:
        # Noted, not raised: an exception in the middle of a fork may leave a lock behind. A second one ends it all.
        terminated.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        from ..reports.inspection import scan_dataset, write_inspection

        quieten()
        seen = scan_dataset(settings, should_stop=lambda: terminated)
        signal.signal(signal.SIGTERM, before)  # there are no workers any more
        inspection = write_inspection(settings, seen)
    except KeyboardInterrupt as stop:
        print(f"stopped: {settings.folder} is not complete; the same command goes on", file=sys.stderr)
        by_signal = terminated or isinstance(stop, Terminated)
        return 128 + (signal.SIGTERM if by_signal else signal.SIGINT)
    print(to_json(inspection.data, indent=2) if settings.json else "\n".join(inspection.summary))
    faults = {fault: inspection.found[fault] for fault in settings.faults if inspection.found[fault]}
    if faults:
        told = ", ".join(f"{count} {fault}" for fault, count in faults.items())
        print(f"--fail_on: {told}; see {inspection.report}", file=sys.stderr)
    return FAULTY if faults else 0
