"""transformers' own exporters, of our model and of the built-in one, beside the exports of this package.

They get what this package's exports get: as many threads, and arithmetic that is asked for by name, since OpenVINO
takes bfloat16 where a CPU has it, whatever an export of transformers has written down. OpenVINO's graph is compiled
for the shape of the batch, which is the faster way, and ExecuTorch's program is made for it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_poolformer.export.onnx import session_options
from hf_poolformer.export.openvino import HINTS
from hf_poolformer.foundation.errors import one_line

from ..export.deployable import quiet
from ..export.folder import folder_size
from .case import Case
from .rows import Unavailable, Weights, transformers_model


class Exporter(NamedTuple):
    """
    A format of transformers' exporters.

    Attributes:
        config: the name of its configuration's class in `transformers.exporters`.
        library: what runs it, by the name it is imported by.
        options: of its configuration.
    """

    config: str
    library: str
    options: dict[str, Any]


EXPORTERS = {
    "onnx": Exporter("OnnxConfig", "onnxruntime", {}),
    # With operations that only onnxruntime has.
    "onnx fused": Exporter("OnnxConfig", "onnxruntime", {"ort_fusions": "cpu"}),
    "openvino": Exporter("OpenVINOConfig", "openvino", {}),
    "executorch": Exporter("ExecutorchConfig", "executorch", {}),
}
# Format, precision, and whose model.
ROWS = (
    ("onnx", "float32", "built-in"),
    ("onnx", "float32", "ours"),
    ("onnx fused", "float32", "ours"),
    ("openvino", "float32", "built-in"),
    ("openvino", "float32", "ours"),
    ("openvino", "bfloat16", "ours"),
    ("openvino", "int8", "ours"),
    ("executorch", "float32", "built-in"),
    ("executorch", "float32", "ours"),
)


class Row(NamedTuple):
    """One of ROWS for a number of images: `prepare()` gives what is to be timed, and bytes of the saved folder."""

    name: str
    precision: str
    prepare: Callable[[], tuple[Callable[[], torch.Tensor], int]]


class Exporters:
    """
    The exports of one model, written when they are first asked for.

    Args:
        case: variant and size.
        calibration: images (N, 3, H, W) for int8, which is their quantiser's as it stands, NNCF's.
        folder: an empty one.
    """

    def __init__(self, case: Case, weights: Weights, calibration: torch.Tensor, folder: Path):
        self.case, self.weights, self.calibration, self.folder = case, weights, calibration, folder
        self.written: dict[Path, Any] = {}

    def rows(self, pixel_values: torch.Tensor) -> list[Row]:
        """Rows for these images, (B, 3, H, W), in float32."""
        found = []
        for format, precision, model in ROWS:
            if model == "built-in" and not self.case.is_poolformer:
                continue
            name = f"transformers {format} {precision}, {model}"

            def prepare(format=format, precision=precision, model=model):
                return self.prepare(format, precision, model, pixel_values)

            found.append(Row(name, precision, prepare))
        return found

    def prepare(
        self, format: str, precision: str, model: str, pixel_values: torch.Tensor
    ) -> tuple[Callable[[], torch.Tensor], int]:
        """
        Raises:
            Unavailable: a library is missing, this transformers has no exporters, or they fail.
        """
        library = EXPORTERS[format].library
        if importlib.util.find_spec("transformers.exporters") is None:
            raise Unavailable("this version of transformers has no exporters")
        if importlib.util.find_spec(library) is None:
            raise Unavailable(f"{library} is not installed")
        # With a batch that may vary, ExecuTorch takes no more than 15 images.
        number = len(pixel_values) if format == "executorch" else None
        kind = "int8" if precision == "int8" else "float"
        place = self.folder / f"transformers-{format.replace(' ', '-')}-{model}-{kind}-{number or 'any'}"
        try:
            with quiet(), contextlib.redirect_stdout(io.StringIO()):
                # A copy: each row has a runtime of its own.
                exported = copy.copy(self.export(format, model, number, place, int8=precision == "int8"))
                settle(exported, library, precision, pixel_values)
                exported(pixel_values=pixel_values)
        except Exception as error:
            # Whatever an exporter or a runtime says: a row of a peer is no reason to end the run.
            raise Unavailable(one_line(error)) from error
        return lambda: exported(pixel_values=pixel_values).logits, folder_size(place)

    def export(self, format: str, model: str, number: int | None, place: Path, int8: bool = False) -> Any:
        """
        transformers' `ExportedModel` of our model or the built-in one, also saved.

        Args:
            number: of images; None for any.
        """
        if place not in self.written:
            from transformers import exporters

            about, side = EXPORTERS[format], self.case.image_size
            options = dict(about.options)
            if int8:
                samples = [{"pixel_values": image} for image in self.calibration.split(1)]
                options["quantizer"] = exporters.NNCFOpenVINOQuantizer(calibration_dataset=samples)
            sizes = None if number else {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
            config = getattr(exporters, about.config)(dynamic_shapes=sizes, **options)
            module = transformers_model(model, self.case, self.weights).eval()
            exporter = exporters.AutoHfExporter.from_config(config)
            exported = exporter.export(module, {"pixel_values": torch.zeros(number or 2, 3, side, side)}, config)
            exported.save_pretrained(place)
            self.written[place] = exported
        return self.written[place]


def settle(exported: Any, library: str, precision: str, pixel_values: torch.Tensor) -> None:
    """Opens an export in its runtime: for these images, in this arithmetic, and with PyTorch's number of threads."""
    threads = torch.get_num_threads()
    if library == "onnxruntime":
        exported.to("cpu", session_options=session_options(threads))
    elif library == "openvino":
        exported.program.reshape(list(pixel_values.shape))
        hints = {"INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": threads}
        exported.to("cpu", config=hints)
    else:
        exported.to("cpu")
