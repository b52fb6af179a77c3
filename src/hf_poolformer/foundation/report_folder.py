"""Folders that hold a report: its page, its figures and its rows, all of the same one. Standard library only."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError
from .files import put_in_place
from .folders import hold


PAGE, FIGURES, ROWS = "report.html", "report.json", "images.parquet"
LABEL_ERRORS, AMBIGUOUS = "label_errors.parquet", "ambiguous.parquet"  # of evaluations that have them
FILES = (ROWS, LABEL_ERRORS, AMBIGUOUS, FIGURES, PAGE)


@contextlib.contextmanager
def report_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder to write a report into, whose files move to `folder` in the end: all, or of what fails none.

    What else lies in `folder` stays. The page comes last: a folder without one, left by whoever was killed while the
    files moved, holds no report.

    Raises:
        UserError: a report is there and not to be overwritten; somebody else writes one; it cannot be written.
    """
    _check(folder, overwrite)
    with hold(folder):
        _check(folder, overwrite)
        for left in folder.glob(".report-*.partial"):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=".report-", suffix=".partial", dir=folder))
        try:
            yield scratch
            try:
                _move(scratch, folder)
            except OSError as error:
                raise UserError(f"the report cannot be written to {folder}: {error.strerror}.") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _check(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder, which a report needs.")
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"{folder} holds {there[-1]} already: give another folder, or --overwrite to replace it.")


def _move(scratch: Path, folder: Path) -> None:
    (folder / PAGE).unlink(missing_ok=True)  # it would belong to other rows
    for name in FILES:
        if (scratch / name).exists():
            put_in_place(scratch / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
