"""The folder of an exported model: what is in it, how it appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..training.errors import UserError


MANIFEST = "export.json"
REPORT = "verification.json"
FORMATS = ("onnx", "openvino", "torch")
PRECISIONS = ("float32", "float16", "bfloat16", "int8")
# The file a format's runtime opens. OpenVINO's weights lie beside, in a .bin of the same name.
FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}


@dataclass
class Manifest:
    """
    What `export.json` says.

    Attributes:
        format, precision: of FORMATS and PRECISIONS.
        task: "image-classification" or "semantic-segmentation".
        file: of FILES; `files` are all that belong to the graph, with their SHA-256.
        compiled: of "torch": a package of machine code for this kind of machine, made by AOTInductor.
        preprocessing: whether the graph takes uint8 (batch, height, width, 3) and gives probabilities. Without, it
            takes float32 (batch, 3, height, width) as the image processor makes them, and gives logits.
        input, output: their names in the graph.
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
            UserError: this is no exported model, or a part of one.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise UserError(f"{folder} is no exported model: it has no {MANIFEST}")
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if manifest.format not in FORMATS or manifest.file != FILES[manifest.format]:
            raise UserError(f"{path} is of another version of this package: it names the format {manifest.format!r}")
        if not isinstance(manifest.files, dict) or manifest.file not in manifest.files:
            raise UserError(f"{path} is damaged: it does not list the files of the graph; export the model again")
        for name in manifest.files:
            if not (path.parent / name).is_file():
                raise UserError(f"{folder} is incomplete: {name} is missing; export the model again")
        return manifest

    def check_files(self, folder: Path) -> None:
        """Runtimes take many a flipped bit for a weight.

        Raises:
            UserError: a file of the graph is not what was exported.
        """
        for name, sha256 in self.files.items():
            if digest(folder / name) != sha256:
                raise UserError(f"{folder} cannot be loaded: {name} is damaged, or changed; export the model again")


def is_exported(name: str | os.PathLike) -> bool:
    """Whether this is a folder that `export_model` wrote."""
    return (Path(name) / MANIFEST).is_file()


@contextlib.contextmanager
def new_folder(output: str | os.PathLike, overwrite: bool) -> Iterator[Path]:
    """
    A folder beside `output` to write into, which takes its place in the end; of what fails, nothing is left.

    Raises:
        UserError: `output` exists, and is not to be replaced or holds something else than an exported model.
    """
    output = Path(output)
    check_output(output, overwrite)
    missing = [parent for parent in (output.parent, *output.parent.parents) if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    done = False
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())
        if output.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
            output.rename(old / "old")
            try:
                scratch.rename(output)
            except BaseException:
                (old / "old").rename(output)
                old.rmdir()
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            scratch.rename(output)
        done = True
    finally:
        if not done:
            shutil.rmtree(scratch, ignore_errors=True)
            for parent in missing:
                with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                    parent.rmdir()


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    sha = hashlib.sha256()
    while block := file.read(1 << 20):
        sha.update(block)
    return sha.hexdigest()


def folder_size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
