"""What a converted folder tells of where it came from: `conversion.json`, from which the card is written."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..foundation.strict_json import to_json


NAME = "conversion.json"


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
        (folder / NAME).write_text(to_json(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ConversionNote | None:
        """That of a folder; None where there is none, or none that can be read."""
        try:
            content = json.loads((folder / NAME).read_text(encoding="utf-8"))
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None
