"""The formats that there are, and whether one can do what is asked of it."""

from __future__ import annotations

from typing import Any

from ..foundation.errors import UserError
from .coreml import CoreML
from .executorch import ExecuTorch
from .format import ExportFormat
from .onnx import Onnx
from .openvino import OpenVINO
from .torch import TorchProgram
from .web import Web


FORMATS: dict[str, ExportFormat] = {
    format.name: format for format in (Onnx(), OpenVINO(), TorchProgram(), ExecuTorch(), CoreML(), Web())
}
"""What `export_model` writes, by name; another format is entered here."""


def formats_with(precision: str) -> str:
    """Their names, in words."""
    return in_words([name for name, format in FORMATS.items() if precision in format.precisions])


def in_words(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def check_request(name: str, precision: str, *, calibrated: bool = False, **options: Any) -> dict[str, Any]:
    """
    Args:
        name: of a format.
        calibrated: there are images to calibrate on.
        options: what formats have in their `options`; None or False is the default.

    Returns:
        the options of this format.

    Raises:
        UserError: a combination that there is not, or a library that is missing.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name}: it must be one of {', '.join(FORMATS)}")
    format = FORMATS[name]
    if precision not in format.precisions:
        because = format.missing_because.get(precision)
        others = formats_with(precision)
        raise UserError(
            f"--format {name} has no --precision {precision}"
            + (f", because {because}" if because else "")
            + f"; --format {others} {'have' if ' ' in others else 'has'} it"
        )
    given = {option: value for option, value in options.items() if value is not None and value is not False}
    for option in given:
        if option not in format.options:
            owners = " and ".join(other.name for other in FORMATS.values() if option in other.options)
            raise UserError(f"--{option} belongs to --format {owners}, not to {name}")
    chosen = {**format.options, **given}
    format.check_options(**chosen)
    if precision == "int8" and not calibrated:
        raise UserError("--precision int8 needs images to calibrate on: --calibration_dataset FOLDER or Hub id")
    format.check_installed(precision)
    return chosen
