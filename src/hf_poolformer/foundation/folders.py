"""Folders that belong to one process at a time, and files that are whole or not there. Standard library only."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".in-use.lock"

# Descriptors of the locks of this process. A child that it forks, a data worker say, gives its copies back at once:
# it may outlive its parent, and would keep the folder from whoever starts anew.
_descriptors: set[int] = set()


class Taken(Exception):
    """Another process has the lock; the message says which."""


def take(lock: Path) -> tuple[int, bool]:
    """Makes a file, and its folder, the mark of this process.

    Returns:
        a descriptor, to be given to `give_back`, and whether there is a lock of the operating system on it, which
        lasts until then or until the process ends, however it ends. Some file systems, and Windows, have none.

    Raises:
        Taken: another process has it.
        OSError: the file cannot be made.
    """
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # whoever had it has just cleared the folder away
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 300).decode("utf-8", "replace").strip()
            os.close(file)
            raise Taken(owner or "another process") from None
        except (AttributeError, OSError):  # no locks here
            return file, False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(lock)):
                _descriptors.add(file)
                with contextlib.suppress(OSError):  # a full disk: the lock holds, it only does not say whose it is
                    os.ftruncate(file, 0)
                    os.write(file, describe_process().encode())
                return file, True
        os.close(file)  # its former owner has removed it: once more


def give_back(lock: Path, file: int) -> None:
    """Removes the file and ends the lock."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(file), os.stat(lock)):  # and not another process's, made meanwhile
            lock.unlink()
    _descriptors.discard(file)
    os.close(file)


def describe_process() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()}, at work since {since}"


@contextlib.contextmanager
def hold(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Keeps a folder, made if need be, for this process until the block ends.

    Args:
        name: of the hidden file that is locked; who takes another one shares the folder.

    Raises:
        UserError: it is another's, which the message names; or it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        yield  # whoever wants to write there knows best what to say
        return
    fresh = not folder.exists()
    try:
        file, locked = take(folder / name)
    except Taken as owner:
        raise UserError(
            f"{folder} is in use by {owner}. Two at once would overwrite each other: wait, or give another folder."
        ) from None
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}, or write to it: {error.strerror}.") from error
    if not locked:
        logger.warning("Nothing keeps a second run out of %s: there are no file locks there.", folder)
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == process:  # and not a child on its way out
            give_back(folder / name, file)
            if fresh:
                with contextlib.suppress(OSError):  # something is in it
                    folder.rmdir()


def _let_go() -> None:
    for file in _descriptors:
        with contextlib.suppress(OSError):
            os.close(file)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
