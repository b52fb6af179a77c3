"""How the folder of an exported model is told from one of weights."""

from __future__ import annotations

import json
import os
from pathlib import Path


MANIFEST = "export.json"


def is_exported(name: str | os.PathLike) -> bool:
    """
    Whether this is a folder that `export_model` wrote.

    Args:
        name: a path; a Hub id is none.
    """
    return (Path(name) / MANIFEST).is_file()


def no_model(name: str | os.PathLike) -> str:
    """One line for whoever gave the export `name` where a model with weights is needed."""
    try:
        made_of = json.loads((Path(name) / MANIFEST).read_text(encoding="utf-8"))["source"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        made_of = ""
    named = f", {made_of}" if made_of else ""
    return f"{name} is an export, a graph without the model's weights: give the model it was made of{named}"
