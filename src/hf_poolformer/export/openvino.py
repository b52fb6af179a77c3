"""OpenVINO IR, run by OpenVINO on the CPU."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .format import ExportFormat, Layer


if TYPE_CHECKING:
    import torch
    from torch import nn

    from .folder import Manifest
    from .format import Run


# Images that one stream takes at a time, and how many shapes stay compiled.
CHUNK = 2
COMPILED = 8
# What is computed in, by what the file holds.
HINTS = {"float32": "f32", "float16": "f32", "bfloat16": "bf16", "int8": "f32"}


class OpenVINO(ExportFormat):
    """
    An .xml, and the weights in a .bin beside it.

    float16 and bfloat16 are float32 graphs with weights in half the bytes: what is computed in, the runtime decides.
    """

    name = "openvino"
    runtime = "OpenVINO"
    file = "model.xml"
    precisions = ("float32", "float16", "bfloat16", "int8")
    libraries = ("onnx", "onnxscript", "openvino")
    hub_library = "openvino"
    detector_precisions = ("float32", "float16")

    def arithmetic(self, precision: str) -> str:
        if precision in ("float32", "float16"):
            stored = ", with weights stored in float16" if precision == "float16" else ""
            return f"float32{stored}; on a GPU OpenVINO takes float16 unless INFERENCE_PRECISION_HINT is f32"
        if self.arithmetic_elsewhere(precision) is not None:
            return "float32 on weights in float16, since this CPU has no bfloat16, and bfloat16 (by PyTorch)"
        return super().arithmetic(precision)

    def arithmetic_elsewhere(self, precision: str) -> str | None:
        if precision == "bfloat16":
            import openvino

            if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                return "bfloat16"
        return None

    def adapt(self, model: nn.Module, precision: str) -> None:
        if precision == "bfloat16":
            from .deployable import sum_head

            sum_head(model)

    def write(self, module: nn.Module, example: Any, path: Path, manifest: Manifest) -> None:
        # By way of ONNX, whose GroupNormalization becomes one operation; OpenVINO's own reading of PyTorch's graph
        # splits it up, which was slower than the model as it was.
        from .onnx import Onnx

        scratch = path.with_suffix(".onnx")
        Onnx().write(module, example, scratch, manifest)
        self.write_from_onnx(scratch, path, manifest.precision)
        for left in path.parent.glob(f"{scratch.name}*"):
            left.unlink()

    def write_from_onnx(self, source: Path, path: Path, precision: str) -> None:
        import openvino

        model = openvino.Core().read_model(source)
        if precision in ("float16", "bfloat16"):
            halve(model)
        openvino.save_model(model, path, compress_to_fp16=False)

    def open(self, path: Path, manifest: Manifest, threads: int, providers: Sequence[str] | None = None) -> Run:
        import torch

        if manifest.further_outputs:
            return open_detector(path, manifest, threads)
        session = Session(path, manifest.precision, threads)
        return lambda pixel_values: torch.from_numpy(session(pixel_values.numpy()))

    def open_whole(self, path: Path, manifest: Manifest, threads: int) -> Run:
        import torch

        session = Session(path, manifest.precision, threads)
        return lambda pixel_values: torch.from_numpy(session.infer(pixel_values.numpy()))

    def read_graph(self, path: Path) -> Any:
        import openvino

        return openvino.Core().read_model(path)

    def save_graph(self, graph: Any, path: Path) -> None:
        import openvino

        halve(graph)
        openvino.save_model(graph, path, compress_to_fp16=False)

    def input_name(self, graph: Any) -> str:
        return graph.input(0).get_any_name()

    def layers(self, graph: Any) -> list[Layer]:
        found = []
        for operation in graph.get_ordered_ops():
            kind = operation.get_type_name()
            if kind in ("Convolution", "GroupConvolution", "MatMul"):
                shape = list(operation.input_value(1).get_partial_shape().get_min_shape())
                spatial = kind != "MatMul" and max(shape[-2:]) > 1
                found.append(Layer(operation.get_friendly_name(), spatial))
        return found


class Session:
    """
    A graph on the CPU: a batch is cut into small pieces that as many streams as there are threads work on.

    A piece's activations stay in the cache of the core that computes it, and no core waits for another. The graph is
    compiled for the shape of a piece, so that any number of images takes two shapes at most.

    Args:
        path: an .xml, or an .onnx.
    """

    def __init__(self, path: Path, precision: str, threads: int):
        import openvino

        self.precision, self.threads = precision, threads
        self.core = openvino.Core()
        self.model = self.core.read_model(path)
        self.attends = any(
            op.get_type_name() == "Softmax" and op.get_output_partial_shape(0).rank.get_length() == 4
            for op in self.model.get_ops()
        )
        self.compiled: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self.lock = threading.Lock()  # servers call from several threads

    def __call__(self, array: np.ndarray) -> np.ndarray:
        streams = min(self.threads, len(array) // CHUNK)
        if streams < 2:
            return self.infer(array)
        pieces = [array[start : start + CHUNK] for start in range(0, len(array), CHUNK)]
        rest = pieces.pop() if len(array) % CHUNK else None
        results: list[np.ndarray | None] = [None] * len(pieces)

        def keep(request: Any, index: int) -> None:
            results[index] = request.get_output_tensor(0).data.copy()

        with self.lock:
            queue = self.compiled_for(pieces[0].shape, streams)
            queue.set_callback(keep)
            for index, piece in enumerate(pieces):
                queue.start_async([piece], userdata=index, share_inputs=True)
            queue.wait_all()
        if rest is not None:
            results.append(self.infer(rest))
        return np.concatenate(results)

    def infer(self, array: np.ndarray) -> np.ndarray:
        """In one piece, by all threads."""
        with self.lock:
            request = self.compiled_for(array.shape, 1)
            return request.infer([array], share_inputs=True)[0].copy()

    def compiled_for(self, shape: tuple[int, ...], streams: int) -> Any:
        """A request, of several streams a queue, for this shape; the shapes used longest ago are forgotten."""
        import openvino

        key = (*shape, streams)
        if key not in self.compiled:
            model = self.model.clone()
            # With nothing but fixed sizes, OpenVINO 2026.4 takes heads for tokens where there are as many of both (in
            # caformer_s18 at 128 x 128 pixels): answers are off by a hundredth.
            model.reshape([-1, *shape[1:]] if self.attends else list(shape))
            settings = {
                "INFERENCE_NUM_THREADS": self.threads,
                "NUM_STREAMS": streams,
                "PERFORMANCE_HINT": "THROUGHPUT" if streams > 1 else "LATENCY",
                "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            }
            compiled = self.core.compile_model(model, "CPU", settings)
            several = streams > 1
            self.compiled[key] = (
                openvino.AsyncInferQueue(compiled, streams) if several else compiled.create_infer_request()
            )
            if len(self.compiled) > COMPILED:
                self.compiled.popitem(last=False)
        self.compiled.move_to_end(key)
        return self.compiled[key]


def open_detector(path: Path, manifest: Manifest, threads: int) -> Run:
    """A graph of several inputs and outputs, compiled once for images of any size: photographs have many."""
    import openvino
    import torch

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[manifest.precision],
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request, lock = compiled.create_infer_request(), threading.Lock()
    inputs = [manifest.input, *manifest.further_inputs]
    outputs = [manifest.output, *manifest.further_outputs]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feeds = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        with lock:
            found = request.infer(feeds, share_inputs=True)
            return tuple(torch.from_numpy(found[name].copy()) for name in outputs)

    return run


def halve(model: Any) -> None:
    """
    The matrices of an OpenVINO graph in float16.

    Vectors are few bytes and stay as they are: an offset of 300 in float16 is off by 0.1. So does what float16 cannot
    hold, because it is too large or too small (weights with a layer scale of 1e-6 in them).
    """
    import openvino
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != openvino.Type.f32:
            continue
        weight = node.data
        if weight.size == max(weight.shape, default=1):
            continue
        with np.errstate(over="ignore"):
            half = weight.astype(np.float16)
            lost = np.square(half - weight, dtype=np.float64).sum()
        if not lost <= 1e-6 * np.square(weight, dtype=np.float64).sum():
            continue
        wide = opset13.convert(opset13.constant(half), "f32")
        wide.set_friendly_name(node.get_friendly_name())
        for use in node.output(0).get_target_inputs():
            use.replace_source_output(wide.output(0))
