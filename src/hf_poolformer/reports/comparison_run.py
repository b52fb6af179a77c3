"""`compare`: two models evaluated on the same images, or evaluations of them read, and the report on both."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from ..evaluation.rows import ROWS
from ..foundation import folders
from ..foundation.errors import UserError
from ..foundation.files import write_json
from .comparison import Comparison
from .comparison_page import comparison_page, wanted_images
from .comparison_settings import ComparisonSettings
from .page import write_page


REPORT, DATA = "report.html", "report.json"


def compare(settings: ComparisonSettings) -> Comparison:
    """Compares two models, and writes the report into `settings.folder`, which appears when it is complete.

    Raises:
        UserError: one of them is no model or no evaluation, they know other labels or were shown other images, there
            are no images, the folder holds something else.
    """
    with folders.new_folder(settings.folder, settings.overwrite, check_folder, "comparison") as folder:
        comparison = pictures = None
        write(folder, comparison, pictures)
    return comparison


def write(folder: Path, comparison: Comparison, pictures) -> None:
    pq.write_table(comparison.images(), folder / ROWS)
    write_json(folder / DATA, comparison.data())
    write_page(folder / REPORT, comparison_page(comparison, pictures))


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises a UserError where something is that must not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder} exists: give another --output, or --overwrite replaces the report in it.")
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {REPORT, DATA, ROWS}:
        raise UserError(f"{folder} holds something else than a report, so it is not replaced: give another --output.")
