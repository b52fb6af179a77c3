"""Files that are whole or not there, and what may fail without ending a run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError, one_line
from .names import printable
from .strict_json import to_json


logger = logging.getLogger(__name__)


def put_in_place(partial: Path, target: Path) -> None:
    """Renames a finished file when it has reached the disk, and makes the disk remember the name."""
    sync(partial)
    os.replace(partial, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """fsync of a file or folder; folders cannot be opened on Windows, whose renames need none."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def let_others_read(path: Path) -> None:
    """Gives a file, or the weights of the model in a folder, the permissions of any other new file.

    safetensors 0.8 leaves what it writes to the owner alone: nobody else could load a model, such as a server in a
    container.
    """
    for file in path.glob("model*.safetensors") if path.is_dir() else (path,):
        with contextlib.suppress(OSError):  # a disk that knows no permissions
            file.chmod(0o666 & ~umask())


def why_unreadable(folder: Path) -> str | None:
    """Which file of a model in a folder this user may not read, in words."""
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors", ".bin", ".py") and path.is_file():
                path.open("rb").close()
    except PermissionError as error:
        return f"no permission to read {error.filename}"
    except OSError:  # for others to tell
        pass
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def make_folder(path: Path) -> None:
    """
    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path}: {error.strerror}.") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"the folder {path} cannot be written to.")


def write_json(path: Path, values: dict[str, Any]) -> None:
    replace_text(path, to_json(values, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        put_in_place(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


def size_text(size: int) -> str:
    """Bytes for people: 241 kB, 3.7 MB."""
    return f"{size / 1e3:.0f} kB" if size < 10**6 else f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """A fault in what only adorns a run is told, and ends nothing.

    Args:
        what: is being written; for the message.
    """
    try:
        yield
    except Exception as error:  # whatever fonts, names and libraries come up with
        logger.warning("%s failed, and the run goes on without: %s", what, printable(one_line(error)))
