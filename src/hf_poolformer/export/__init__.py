"""Deployment: a trained model as ONNX, OpenVINO, a program of torch.export, or for phones; folded and verified.

export_model("outputs/pets", "outputs/pets-int8", precision="int8", calibration_dataset="photos")
model = load("outputs/pets-int8")
pipeline("image-classification", model=model, image_processor=model.image_processor)
"""

from typing import TYPE_CHECKING, Any

from ..foundation.exported import is_exported
from .format import PRECISIONS, ExportFormat
from .formats import FORMATS


if TYPE_CHECKING:
    from .run import Summary, export_model
    from .runtime import ExportedModel, load

__all__ = ["FORMATS", "PRECISIONS", "ExportFormat", "ExportedModel", "Summary", "export_model", "is_exported", "load"]

HOMES = {"ExportedModel": "runtime", "load": "runtime", "Summary": "run", "export_model": "run"}


def __getattr__(name: str) -> Any:
    # Only when asked for: whoever wants to know whether a folder is an export needs no exporter.
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{HOMES[name]}", __name__), name)
