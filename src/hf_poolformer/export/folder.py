"""The folder of an exported model: what is in it, how it appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..foundation.errors import UserError, one_line
from ..foundation.exported import MANIFEST, is_exported
from ..foundation.files import digest, write_json
from ..foundation.folders import Taken, give_back, take
from ..foundation.tasks import exportable_tasks
from .format import PRECISIONS
from .formats import FORMATS


logger = logging.getLogger(__name__)

REPORT = "verification.json"
# What the graph's answers are read with; of another one they would be another model's.
SETTINGS = ("config.json", "preprocessor_config.json")
# Prefixes of what is made, and what it replaces, in the workplace of an export.
NEW, OLD = "new-", "old-"


@dataclass
class Manifest:
    """
    What `export.json` says.

    Attributes:
        format, precision: of `formats.FORMATS`, and of those that it has.
        task: one of `exportable_tasks`.
        file: the one that the format's runtime opens; `files` are all that belong to the graph, and SETTINGS, with
            their SHA-256.
        compiled: of "torch": a package of machine code for this kind of machine, made by AOTInductor.
        preprocessing: whether the graph takes uint8 (batch, height, width, 3) and gives probabilities. Without, it
            takes float32 (batch, 3, height, width) as the image processor makes them, and gives logits.
        input, output: their names in the graph; a model without classes gives "features".
        image_size: height and width the model was made for, in pixels.
        dynamic_size: whether other sizes do, too. The number of images is always free.
        least_size: of those, the smallest height and width in pixels.
        opset: of "onnx".
        source: the model's name and, from the Hub, its revision and commit; `sha256` is of its weights.
        versions: of the libraries that wrote it.
        quantisation: of "int8": how it was done.
    """

    format: str
    precision: str
    task: str
    file: str
    preprocessing: bool
    input: str
    output: str
    image_size: list[int]
    dynamic_size: bool
    least_size: int = 1
    num_channels: int = 3
    compiled: bool = False
    opset: int | None = None
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    quantisation: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Manifest:
        """
        Raises:
            UserError: this is no exported model, a part of one, or of a version that this one does not know.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} is no exported model: it has no {MANIFEST}")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}; export the model again") from error
        if not isinstance(facts, dict):
            raise UserError(f"{path} is damaged: it holds no settings; export the model again")
        known = {entry.name: entry for entry in fields(cls)}
        unknown = sorted(facts.keys() - known.keys())
        if unknown:
            from .. import __version__  # here, since it brings PyTorch, which no --help waits for

            raise UserError(
                f"{path} has {unknown[0]!r}, which this version of hf-poolformer ({__version__}) does not know"
                f"{_writer(facts)}: update hf-poolformer, or export the model again"
            )
        lacking = [name for name, entry in known.items() if name not in facts and _is_required(entry)]
        if lacking:
            raise UserError(f"{path} is damaged: it does not say the {lacking[0]}; export the model again")
        manifest = cls(**facts)
        manifest.check(path)
        for name in manifest.files.keys() | set(SETTINGS):
            if not (path.parent / name).is_file():
                raise UserError(f"{folder} is incomplete: {name} is missing; export the model again")
        return manifest

    def check(self, path: Path) -> None:
        """
        Raises:
            UserError: the manifest, which lies at `path`, says what none of this version's does.
        """
        choices = {"format": tuple(FORMATS), "precision": PRECISIONS, "task": exportable_tasks()}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{path} is of another version of this package: it names the {name} {getattr(self, name)!r}; "
                    "update hf-poolformer, or export the model again"
                )
        texts = isinstance(self.input, str) and isinstance(self.output, str)
        numbers = isinstance(self.image_size, list) and len(self.image_size) == 2
        numbers = numbers and all(_is_count(number) for number in (*self.image_size, self.num_channels))
        if not (texts and numbers):
            raise UserError(f"{path} is damaged: names or sizes in it are none; export the model again")
        names = self.files if isinstance(self.files, dict) else ()
        file = FORMATS[self.format].file
        if self.file != file or file not in names or any(Path(name).name != name for name in names):
            raise UserError(f"{path} is damaged: it does not list the files of the graph; export the model again")

    def check_files(self, folder: Path) -> None:
        """Runtimes take many a flipped bit for a weight, and another configuration is another model's.

        Raises:
            UserError: a file is not what was exported.
        """
        for name, sha256 in self.files.items():
            if digest(folder / name) == sha256:
                continue
            if name in SETTINGS:
                raise UserError(
                    f"{folder} cannot be loaded: {name} is not the one that was exported and verified. Put that back; "
                    f"to change it, change the model's own {name} and export the model again"
                )
            raise UserError(f"{folder} cannot be loaded: {name} is damaged, or changed; export the model again")


def _is_required(entry: Field) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _writer(facts: dict[str, Any]) -> str:
    versions = facts.get("versions")
    version = versions.get("hf-poolformer") if isinstance(versions, dict) else None
    return f" and {version} wrote" if version else ""


@contextlib.contextmanager
def new_folder(output: str | os.PathLike, overwrite: bool) -> Iterator[Path]:
    """
    A folder beside `output` to write into, which takes its place in the end; of what fails, nothing is left.

    Of two at once for one place, the second is refused. What one that was killed left is cleared away by the next.

    Raises:
        UserError: `output` exists, and is not to be replaced or holds something else than an exported model; another
            export to it is at work.
    """
    output = Path(os.path.realpath(output))  # one lock for one place, whatever link leads there
    check_output(output, overwrite)
    missing = [parent for parent in (output.parent, *output.parent.parents) if not parent.exists()]
    try:
        with workplace(output) as place:
            check_output(output, overwrite)
            scratch = Path(tempfile.mkdtemp(prefix=NEW, dir=place))
            try:
                yield scratch
                scratch.chmod(0o777 & ~_umask())
                put_in_place(scratch, output, place, overwrite)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # the export is in it, or somebody else's
                parent.rmdir()


def put_in_place(scratch: Path, output: Path, place: Path, overwrite: bool) -> None:
    """By renaming; what lies at `output` comes back if that fails."""
    try:
        scratch.rename(output)  # onto nothing or an empty folder, never onto what somebody has put there meanwhile
        return
    except OSError:
        check_output(output, overwrite)
        if not output.exists():
            raise
    old = Path(tempfile.mkdtemp(prefix=OLD, dir=place))
    output.rename(old / output.name)
    try:
        scratch.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """
    The hidden folder `.NAME.export` beside `output`, in which one process at a time makes an export.

    A lock of the operating system says whose it is, so that nobody's is left by whom was killed. Where there are no
    such locks (a file system without them, Windows), the renames alone decide who comes first.

    Raises:
        UserError: it is another's.
    """
    place = output.with_name(f".{output.name}.export")
    try:
        file, locked = take(place / "lock")
    except Taken as owner:
        raise UserError(
            f"another export to {output} is at work ({owner}): wait for it, or choose another place"
        ) from None
    try:
        if locked:
            clear(place, output)
        yield place
    finally:
        give_back(place / "lock", file)
        with contextlib.suppress(OSError):  # what could not be put back stays
            place.rmdir()


def clear(place: Path, output: Path) -> None:
    """Removes what a killed export left; what it was just replacing goes back."""
    left = sorted(path for path in place.iterdir() if path.name.startswith((NEW, OLD)))
    for path in left:
        for old in path.iterdir() if path.name.startswith(OLD) else ():
            if not output.exists():
                old.rename(output)
                logger.warning("An export was killed while it replaced %s, which is back.", output)
            elif not is_exported(output):
                raise UserError(f"{old} was at {output}, where something else is now: move one of them away")
        shutil.rmtree(path, ignore_errors=True)
    if left:
        logger.warning("Removed what an export to %s left when it was killed.", output)


def check_output(output: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: `output` exists, and is not to be replaced or holds something else than an exported model.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} exists; --overwrite replaces it")
    if not is_exported(output):
        raise UserError(f"{output} is not an exported model, so it is not replaced; choose another place")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def folder_size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
