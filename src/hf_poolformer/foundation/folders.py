"""Folders that belong to one process at a time, and that are whole or not there. Standard library only."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UserError
from .files import umask


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK = ".in-use.lock"
# Prefixes of what is made, and of what it replaces, in the workplace of a new folder.
NEW, OLD = "new-", "old-"

# (folder, overwrite) -> None; raises a UserError where something is that must not be replaced.
Check = Callable[[Path, bool], None]

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


@contextlib.contextmanager
def new_folder(output: Path, overwrite: bool, check: Check, kind: str) -> Iterator[Path]:
    """A folder beside `output` to write into, which takes its place in the end; of what fails, nothing is left.

    It is made in the hidden folder `.NAME.KIND`, whose lock says whose it is: of two at once for one place, the second
    is refused, and what one that was killed left is cleared away by the next, nobody else's. Where there are no locks
    (a file system without them, Windows), the renames alone decide who comes first.

    Args:
        kind: of folder, a word for messages.

    Raises:
        UserError: what `check` says; another one to `output` is at work.
    """
    output = Path(os.path.realpath(output))  # one lock for one place, whatever link leads there
    place = output.with_name(f".{output.name}.{kind}")
    missing = [parent for parent in (output.parent, *output.parent.parents) if not parent.exists()]
    try:
        try:
            file, locked = take(place / "lock")
        except Taken as owner:
            check(output, overwrite)
            raise UserError(
                f"another {kind} to {output} is at work ({owner}): wait for it, or choose another place"
            ) from None
        try:
            if locked:
                _clear(place, output, check, kind)
            check(output, overwrite)
            scratch = Path(tempfile.mkdtemp(prefix=NEW, dir=place))
            try:
                yield scratch
                scratch.chmod(0o777 & ~umask())
                _move(scratch, output, overwrite, check)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        finally:
            give_back(place / "lock", file)
            with contextlib.suppress(OSError):  # what could not be put back stays
                place.rmdir()
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # the new folder is in it, or somebody else's
                parent.rmdir()


def _move(scratch: Path, output: Path, overwrite: bool, check: Check) -> None:
    """Renames; what lies at `output` comes back if that fails."""
    try:
        scratch.rename(output)  # onto nothing or an empty folder, never onto what somebody has put there meanwhile
        return
    except OSError:
        check(output, overwrite)
        if not output.exists():
            raise
    old = Path(tempfile.mkdtemp(prefix=OLD, dir=scratch.parent))
    output.rename(old / output.name)
    try:
        scratch.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear(place: Path, output: Path, check: Check, kind: str) -> None:
    """Removes what one that was killed left; what it was just replacing goes back."""
    left = sorted(path for path in place.iterdir() if path.name.startswith((NEW, OLD)))
    for path in left:
        for old in path.iterdir() if path.name.startswith(OLD) else ():
            try:
                old.rename(output)  # onto nothing or an empty folder
            except OSError:
                if not output.exists():
                    raise
                try:
                    check(output, True)
                except UserError:
                    raise UserError(
                        f"{old} was at {output}, where something else is now: move one of them away"
                    ) from None
            else:
                logger.warning("%s is back: it was being replaced when a process was killed.", output)
        shutil.rmtree(path, ignore_errors=True)
    if left:
        logger.warning("Removed what an unfinished %s to %s left when it was killed.", kind, output)


def _let_go() -> None:
    for file in _descriptors:
        with contextlib.suppress(OSError):
            os.close(file)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
