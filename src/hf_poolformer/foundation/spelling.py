"""How to call a command of ours again. Standard library only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def command_words(command: str, launcher: Sequence[str] = ("python",), alone: bool = True) -> list[str]:
    """The words of a shell line that call `command` the way this program was called: as a script of the repository,
    as `hf-poolformer`, or else as a module.

    Args:
        launcher: what runs a script or a module.
        alone: in one process, for which `hf-poolformer` needs no launcher.
    """
    program = Path(sys.argv[0] or "-")  # empty in an interactive Python
    script = program.with_name(f"{command.replace('-', '_')}.py")
    if script.is_file():
        return [*launcher, str(script)]
    if alone and program.stem == "hf-poolformer":
        return ["hf-poolformer", command]
    return [*launcher, "-m", "hf_poolformer", command]
