"""Eight bits after training: NNCF on the folded graph, calibrated on images, with the layers that hurt left alone.

Weights are symmetric per output channel, activations asymmetric (GELU's are), convolutions and matrix products become
integer products. What is left of the norms, and the mixer, stay in floating point. Where too many answers change, the
layers that tend to suffer most are left in floating point, too, one group more at each attempt, and the attempt that
agrees best is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..foundation.errors import UserError, one_line
from .formats import halve


# Agreement with the model, on the calibration images, at which no more layers are left out.
ENOUGH = 0.99
# Images of a calibration step.
CHUNK = 4


@dataclass
class Quality:
    """Of an attempt on the calibration images: agreement and error as `verification` has them, and if they pass."""

    agreement: float
    error: float
    passed: bool


@dataclass
class Attempt:
    """One quantisation: what stayed in floating point, in how many layers, and what came of it."""

    left_out: str
    layers: int
    quality: Quality

    @property
    def rank(self) -> tuple[bool, float, float]:
        return self.quality.passed, self.quality.agreement, -self.quality.error


def quantise(
    path: Path,
    inputs: np.ndarray,
    evaluate: Callable[[Path], Quality],
    *,
    attention: bool,
    keep_last: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """
    Replaces a graph in float32, `.onnx` or OpenVINO's `.xml`, by its quantised form.

    Args:
        inputs: images to calibrate on, as the graph takes them, (N, ...).
        evaluate: compares a graph that lies in a file with the model.
        attention: whether there is any, which NNCF treats in a way of its own.
        keep_last: leave the last layer in floating point in any case.

    Returns:
        what the manifest says about it.

    Raises:
        UserError: NNCF cannot quantise this graph.
    """
    tools = OpenVINOFiles if path.suffix == ".xml" else OnnxFiles
    with quiet(), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        import nncf

        attempts: list[Attempt] = []
        layers = tools.layers(tools.read(path))
        for left_out, ignored in groups(layers, keep_last).items():
            progress(f"quantising, in floating point: {left_out}")
            model = tools.read(path)
            name = tools.input_name(model)
            chunks = [inputs[start : start + CHUNK] for start in range(0, len(inputs), CHUNK)]
            try:
                quantised = nncf.quantize(
                    model,
                    nncf.Dataset(chunks, lambda chunk, name=name: {name: chunk}),
                    preset=nncf.QuantizationPreset.MIXED,
                    model_type=nncf.ModelType.TRANSFORMER if attention else None,
                    target_device=nncf.TargetDevice.CPU,
                    subset_size=len(chunks),
                    ignored_scope=nncf.IgnoredScope(names=ignored) if ignored else None,
                )
            except Exception as error:
                raise UserError(f"the model cannot be quantised: {one_line(error)}") from error
            folder = Path(scratch, str(len(attempts)))
            folder.mkdir()
            tools.write(quantised, folder / path.name)
            attempts.append(Attempt(left_out, len(ignored), evaluate(folder / path.name)))
            if attempts[-1].quality.passed and attempts[-1].quality.agreement >= ENOUGH:
                break
        best = max(range(len(attempts)), key=lambda index: attempts[index].rank)
        for file in Path(scratch, str(best)).iterdir():
            file.replace(path.parent / file.name)
    return {
        "method": "NNCF post-training quantisation",
        "images": len(inputs),
        "quantised_layers": len(layers) - attempts[best].layers,
        "left_in_floating_point": attempts[best].left_out,
        "attempts": [asdict(attempt) for attempt in attempts],
    }


@dataclass
class Layer:
    """A convolution or matrix product with weights; `spatial` if it looks at more than one position."""

    name: str
    spatial: bool


def groups(layers: list[Layer], keep_last: bool = False) -> dict[str, list[str]]:
    """What may be left in floating point, from nothing or the last layer on, and the names of those layers."""
    ends = [layers[0].name, layers[-1].name]
    between = [layer.name for layer in layers if layer.spatial]
    return {
        **({"the last layer": ends[1:]} if keep_last else {"nothing": []}),
        "the first and the last layer": list(dict.fromkeys(ends)),
        "those and all convolutions wider than 1x1": list(dict.fromkeys([*ends, *between])),
    }


class OpenVINOFiles:
    """Reading, writing and looking into OpenVINO's graphs."""

    @staticmethod
    def read(path: Path) -> Any:
        import openvino

        return openvino.Core().read_model(path)

    @staticmethod
    def write(model: Any, path: Path) -> None:
        import openvino

        halve(model)
        openvino.save_model(model, path, compress_to_fp16=False)

    @staticmethod
    def input_name(model: Any) -> str:
        return model.input(0).get_any_name()

    @staticmethod
    def layers(model: Any) -> list[Layer]:
        found = []
        for operation in model.get_ordered_ops():
            kind = operation.get_type_name()
            if kind in ("Convolution", "GroupConvolution", "MatMul"):
                shape = list(operation.input_value(1).get_partial_shape().get_min_shape())
                spatial = kind != "MatMul" and max(shape[-2:]) > 1
                found.append(Layer(operation.get_friendly_name(), spatial))
        return found


class OnnxFiles:
    """The same of ONNX."""

    @staticmethod
    def read(path: Path) -> Any:
        import onnx

        return onnx.load(path)

    @staticmethod
    def write(model: Any, path: Path) -> None:
        import onnx

        store_integers(model)
        onnx.save(model, path)

    @staticmethod
    def input_name(model: Any) -> str:
        return model.graph.input[0].name

    @staticmethod
    def layers(model: Any) -> list[Layer]:
        shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
        return [
            Layer(node.name, node.op_type == "Conv" and max(shapes.get(node.input[1], [1])[2:], default=1) > 1)
            for node in model.graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul")
        ]


def store_integers(model: Any) -> None:
    """Weights that an ONNX graph keeps as float32 and quantises when it is loaded become int8 in the file."""
    from onnx import numpy_helper

    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for node in list(graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] not in initializers:
            continue
        weight, scale, zero = (numpy_helper.to_array(initializers[name]) for name in node.input)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        if scale.ndim:
            shape = [1] * weight.ndim
            shape[axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        info = np.iinfo(zero.dtype)
        integers = np.clip(np.rint(weight / scale) + zero, info.min, info.max).astype(zero.dtype)
        graph.initializer.append(numpy_helper.from_array(integers, node.output[0]))
        graph.node.remove(node)
        uses[node.input[0]] -= 1
        if not uses[node.input[0]]:
            graph.initializer.remove(initializers.pop(node.input[0]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """NNCF shows bars and remarks of its own, and reports its use to its makers unless told not to when imported."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    levels = {name: logging.getLogger(name).level for name in ("nncf", "torch.utils.cpp_extension")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
