"""The folder of an exported model: what is in it, and what it may replace."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..foundation import folders
from ..foundation.errors import UserError, one_line
from ..foundation.exported import MANIFEST, is_exported
from ..foundation.files import digest, write_json
from ..foundation.tasks import exportable_tasks
from .format import PRECISIONS
from .formats import FORMATS


REPORT = "verification.json"
# What the graph's answers are read with; of another one they would be another model's.
SETTINGS = ("config.json", "preprocessor_config.json")


@dataclass
class Manifest:
    """
    What `export.json` says.

    Attributes:
        format, precision: of `formats.FORMATS`, and of those that it has.
        task: one of `exportable_tasks`.
        problem_type, label_thresholds: of a classifier, as in its configuration: what its answers mean, and the
            probability of each label from which an image has it (None for 0.5).
        file: the one that the format's runtime opens; `files` are all that belong to the graph, and SETTINGS, with
            their SHA-256.
        compiled: of "torch": a package of machine code for this kind of machine, made by AOTInductor.
        device: of "torch": "cpu" or "cuda", which computes it.
        preprocessing: whether the graph takes uint8 (batch, height, width, 3) and gives probabilities. Without, it
            takes float32 (batch, 3, height, width) as the image processor makes them, and gives logits.
        resizes: with preprocessing: the graph takes images as they were stored, resizes them, and answers in their
            pixels. A segmenter then gives the class of each pixel. A detector takes one image at a time, ever.
        input, output: their names in the graph; a regression gives "values" in either case, a model without classes
            "features", a detector "boxes".
        further_inputs, further_outputs: names of what a detector takes and gives besides.
        image_size: height and width the model was made for, in pixels.
        dynamic_size: whether other sizes do, too.
        least_size, most_size: of those, the smallest and the largest height and width in pixels; None for no largest.
        most_images: that the graph takes at once, where there is a limit; `load` calls it as often as is needed.
        computed_by: of "executorch": how much of the graph XNNPACK computes, and who the rest.
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
    further_inputs: list[str] = field(default_factory=list)
    further_outputs: list[str] = field(default_factory=list)
    resizes: bool = False
    least_size: int = 1
    most_size: int | None = None
    most_images: int | None = None
    computed_by: str | None = None
    num_channels: int = 3
    problem_type: str | None = None
    label_thresholds: list[float] | None = None
    compiled: bool = False
    device: str = "cpu"
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
        further = (self.further_inputs, self.further_outputs)
        lists = all(isinstance(names, list) for names in further)
        texts = lists and all(isinstance(name, str) for name in (self.input, self.output, *further[0], *further[1]))
        numbers = isinstance(self.image_size, list) and len(self.image_size) == 2
        numbers = numbers and all(_is_count(number) for number in (*self.image_size, self.num_channels))
        if not (texts and numbers):
            raise UserError(f"{path} is damaged: names or sizes in it are none; export the model again")
        names = self.files if isinstance(self.files, dict) else ()
        file = FORMATS[self.format].file
        # A graph that is a folder is listed by its files.
        known = {name.partition("/")[0] for name in names}
        if self.file != file or file not in known or any(_leads_outside(name) for name in names):
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


def _leads_outside(name: str) -> bool:
    """Whether a file's name, as `files_of` gives it, is none of this folder's."""
    return "\\" in name or any(part in ("", ".", "..") or ":" in part for part in name.split("/"))


def files_of(folder: Path, graph: Path) -> dict[str, str]:
    """The files that belong to a graph, and SETTINGS, by their names relative to the folder, with their SHA-256."""
    found = [path for pattern in (f"{graph.stem}.*", f"{graph.name}/**/*") for path in folder.glob(pattern)]
    files = [*(path for path in found if path.is_file()), *(folder / name for name in SETTINGS)]
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(set(files))}


def _is_required(entry: Field) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _writer(facts: dict[str, Any]) -> str:
    versions = facts.get("versions")
    version = versions.get("hf-poolformer") if isinstance(versions, dict) else None
    return f" and {version} wrote" if version else ""


def new_folder(output: str | os.PathLike, overwrite: bool) -> contextlib.AbstractContextManager[Path]:
    """`folders.new_folder` for an export."""
    return folders.new_folder(Path(output), overwrite, check_output, "export")


def check_output(output: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: `output` exists, and is not to be replaced or holds something else than an exported model.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{output} exists; --overwrite replaces it")
    if not is_exported(output):
        raise UserError(f"{output} is not an exported model, so it is not replaced; choose another place")


def folder_size(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
