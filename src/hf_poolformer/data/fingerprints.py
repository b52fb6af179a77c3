"""What a finished result was made from, in a few bytes: whoever finds the result knows whether it is still true."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from .files import list_files


# Seconds that some file systems round times of change to.
_UNSETTLED = 2


def state_of_files(files: Iterable[str | os.PathLike]) -> str:
    """A hash of names, sizes and times of change.

    Nothing is read, so that millions of files take seconds. A file that is replaced shows by its time even where the
    new one is as large and older; what is written over in place, with its time set back, does not show.
    """
    sha = hashlib.sha256()
    for file in files:
        try:
            facts = os.stat(file)
            text = f"{os.fspath(file)}\0{facts.st_size} {facts.st_mtime_ns}\n"
        except OSError as error:
            text = f"{os.fspath(file)}\0{type(error).__name__}\n"
        sha.update(text.encode("utf-8", "surrogateescape"))
    return sha.hexdigest()[:32]


def settled_state(files: Iterable[str | os.PathLike]) -> str | None:
    """`state_of_files`; None while one of them is so new that it might change again and have the same time."""
    files = [os.path.realpath(file) for file in files]
    with contextlib.suppress(OSError):  # what is gone has a state, too
        if files and max(os.stat(file).st_mtime for file in files) > time.time() - _UNSETTLED:
            return None
    return state_of_files(files)


def state_of_path(path: str | os.PathLike) -> str | None:
    """`state_of_files` of a file, of all in a folder, or of what a pattern matches; None if there is none."""
    found = [Path(path)] if Path(path).exists() else [Path(match) for match in sorted(glob.glob(os.fspath(path)))]
    if not found:
        return None
    files = [file for match in found for file in (list_files(match) if match.is_dir() else [match])]
    return state_of_files(file.resolve() for file in files)


def state_of_dataset(name: str | os.PathLike, revision: str | None = None, token: str | None = None) -> str:
    """The state of local data, else the commit of a repository of the Hub; without a network, what was asked for."""
    state = state_of_path(Path(name).expanduser())
    if state is not None:
        return state
    return f"{os.fspath(name)}@{hub_commit(os.fspath(name), 'dataset', revision, token) or revision or 'main'}"


def hub_commit(name: str, kind: str, revision: str | None, token: str | None) -> str | None:
    """Which commit of a repository is meant, None if the Hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi(token=token).repo_info(name, repo_type=kind, revision=revision).sha
    except Exception:  # no network, no such repository: whoever opens it says so
        return None
