"""What both demos do alike: start scripts of ours, and end as a command should."""

import signal
import subprocess
import sys
from collections.abc import Callable


def run(command: list[str]) -> None:
    """Run a script of ours with its output shown; leave with its status if it fails.

    Whoever stops the demo stops the script, too, which may have a checkpoint to write.
    """
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status:
        sys.exit(status if status > 0 else 128 - status)


def start(main: Callable[[], int]) -> None:
    """Run a demo and leave; after SIGTERM and Ctrl-C with the exit status that a shell expects."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
