"""What a converted folder tells of where it came from: `conversion.json`, from which the card is written."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..foundation.files import digest
from ..foundation.strict_json import to_json


NAME = "conversion.json"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ConversionNote:
    """
    Attributes:
        source: what was read: a file name or a Hub id.
        format: of what it was read.
        sha256: of the weights file; None if there were several.
        variant: the row of `VARIANTS` that it has the architecture of, if that is one only.
        notes: what was assumed and left out, a line each.
    """

    source: str
    format: str
    sha256: str | None
    variant: str | None
    notes: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Beside the model that was written there, of which alone it tells."""
        content = {**asdict(self), "files": _files(folder)}
        (folder / NAME).write_text(to_json(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ConversionNote | None:
        """That of a folder; None where there is none, none that can be read, or one of another model than the folder
        holds by now: trained on, or with other labels."""
        content = _read(folder)
        if content is None or content["files"] != _files(folder):
            return None
        return cls(**{field.name: content[field.name] for field in fields(cls)})


def changed_since_conversion(folder: Path) -> list[str]:
    """Names of the files that make the model in a converted folder and are others by now; none in other folders."""
    content = _read(folder)
    return [] if content is None else [n for n, sha256 in _files(folder).items() if content["files"].get(n) != sha256]


def _read(folder: Path) -> dict[str, Any] | None:
    """What the note says, with `files`; None where there is none, or whoever passed the folder on put other things
    there."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        content["notes"] = tuple(content["notes"]) if isinstance(content["notes"], list) else None
        return content if _is_sound(content) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _files(folder: Path) -> dict[str, str]:
    """Digests of what makes a model."""
    return {path.name: digest(path) for path in sorted([folder / "config.json", *folder.glob("*.safetensors")])}


def _is_sound(values: dict[str, Any]) -> bool:
    """Whether they are of the types that were written."""
    sha256, variant, notes = values["sha256"], values["variant"], values["notes"]
    return (
        isinstance(values["source"], str)
        and isinstance(values["format"], str)
        and (sha256 is None or (isinstance(sha256, str) and SHA256.fullmatch(sha256) is not None))
        and (variant is None or isinstance(variant, str))
        and isinstance(values["files"], dict)
        and isinstance(notes, tuple)
        and all(isinstance(note, str) for note in notes)
    )
