"""Core ML packages, for Apple's devices, which run on macOS and iOS only.

Elsewhere PyTorch computes what the file says, operation by operation (`mil.py`). That shows the file's operations and
weights to be the model's, and nothing about how Apple's devices compute them; reports and cards say so.
"""

from __future__ import annotations

import contextlib
import platform
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..foundation.errors import UserError
from .format import ExportFormat


if TYPE_CHECKING:
    import torch
    from torch import nn

    from .folder import Manifest
    from .format import Run


# What Core ML takes as an image, by its channels.
LAYOUTS = {1: "GRAYSCALE", 3: "RGB"}
# What float16 would overflow, or leave too few digits of: sums over whole maps, and what is made of them.
WIDE = ("clip", "layer_norm", "real_div", "reduce_l2_norm", "reduce_mean", "rsqrt", "sqrt", "square")


class CoreML(ExportFormat):
    """
    An .mlpackage, a folder, that takes one image of one size, as a phone's camera gives them.

    With `manifest.preprocessing` its input is an image in Core ML's own sense, which Vision takes care of.
    """

    name = "coreml"
    runtime = "Core ML"
    file = "model.mlpackage"
    precisions = ("float32", "float16")
    missing_because = {  # noqa: RUF012
        "bfloat16": "Core ML has no bfloat16",
        "int8": "what its products in 8 bits give can be verified on Apple's devices only",
    }
    libraries = ("coremltools",)
    extra = "mobile"
    hub_library = "coreml"
    most_images = 1
    sizes = "one"
    by_way_of_onnx = False

    def arithmetic(self, precision: str) -> str:
        stored = (
            precision if precision == "float32" else f"{precision}, in float32 the norms and the classifier's head"
        )
        if has_core_ml():
            return f"{stored}; by Core ML on this machine's CPU"
        return (
            f"{stored}; computed by PyTorch from the file, operation by operation. Core ML itself, which only macOS "
            "and iOS have, has not run it"
        )

    def write(self, module: nn.Module, example: torch.Tensor, path: Path, manifest: Manifest) -> None:
        import torch

        from .deployable import fix_positions
        from .onnx import metadata

        example, config = example[:1], module.model.config
        fix_positions(module, example)
        with quiet():
            import coremltools

            if manifest.preprocessing:
                layout = LAYOUTS.get(manifest.num_channels)
                if layout is None:
                    raise UserError(
                        f"Core ML knows no images of {manifest.num_channels} channels: leave --preprocessing out"
                    )
                module, example = FromPlanes(module), example.float().permute(0, 3, 1, 2).contiguous()
                given = coremltools.ImageType(
                    name=manifest.input,
                    shape=tuple(example.shape),
                    color_layout=getattr(coremltools.colorlayout, layout),
                )
            else:
                given = coremltools.TensorType(name=manifest.input, shape=tuple(example.shape), dtype=np.float32)
            if manifest.precision == "float16":
                precision = coremltools.transform.FP16ComputePrecision(op_selector=fits_float16)
            else:
                precision = coremltools.precision.FLOAT32
            model = coremltools.convert(
                torch.export.export(module.eval(), (example,)).run_decompositions({}),
                convert_to="mlprogram",
                inputs=[given],
                outputs=[coremltools.TensorType(name=manifest.output, dtype=np.float32)],
                compute_precision=precision,
                minimum_deployment_target=coremltools.target.iOS16,
                skip_model_load=True,
            )
        for name, value in metadata(manifest, config).items():
            model.user_defined_metadata[name] = value
        model.save(str(path))

    def open(self, path: Path, manifest: Manifest, threads: int, providers: Sequence[str] | None = None) -> Run:
        with quiet():
            import coremltools

            if has_core_ml():
                return CoreMLModel(coremltools, path, manifest)
            from .mil import Interpreter

            return Interpreter(path, manifest)


class CoreMLModel:
    """A package in Core ML, on the CPU, where results do not depend on the device's other processors."""

    def __init__(self, coremltools: Any, path: Path, manifest: Manifest):
        self.model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
        self.manifest = manifest
        self.lock = threading.Lock()

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        import torch
        from PIL import Image

        outputs = []
        for image in pixel_values:
            given = Image.fromarray(image.squeeze(-1).numpy()) if self.manifest.preprocessing else image[None].numpy()
            with self.lock:
                output = self.model.predict({self.manifest.input: given})[self.manifest.output]
            outputs.append(torch.from_numpy(output).float())
        return torch.cat(outputs)


def has_core_ml() -> bool:
    return platform.system() == "Darwin"


def fits_float16(operation: Any) -> bool:
    """Whether an operation is computed in float16; a number per image and the classifier's head are not."""
    shapes = [output.shape for output in operation.outputs]
    return operation.op_type not in WIDE and all(
        len(shape) > 2 and any(side != 1 for side in shape if isinstance(side, int)) for shape in shapes
    )


def FromPlanes(module: nn.Module) -> nn.Module:
    """Takes an image as Core ML gives it, 0 to 255 in (1, channels, height, width), where `module` takes uint8."""
    from torch import nn

    class Planes(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.module(pixel_values.permute(0, 2, 3, 1))

    return Planes()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """coremltools says at each import what it was not tested with, and draws bars."""
    import os

    from .deployable import quiet_loggers

    with (
        warnings.catch_warnings(),
        quiet_loggers("coremltools", "coremltools.converters"),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield
