"""ONNX files, run by onnxruntime."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..foundation.errors import UserError
from ..foundation.strict_json import to_json
from .format import ExportFormat, Layer


if TYPE_CHECKING:
    import torch
    from torch import nn

    from .folder import Manifest
    from .format import Run


# What torch.onnx translates to and the installed onnxruntime reads; GroupNormalization is an operation from 21 on.
OPSETS = range(18, 24)
DEFAULT_OPSET = 21


class Onnx(ExportFormat):
    name = "onnx"
    runtime = "ONNX Runtime"
    file = "model.onnx"
    precisions = ("float32", "float16", "int8")
    missing_because = {"bfloat16": "onnxruntime has no bfloat16 on a CPU"}  # noqa: RUF012
    libraries = ("onnx", "onnxscript", "onnxruntime")
    options = {"opset": DEFAULT_OPSET}  # noqa: RUF012
    hub_library = "onnx"
    has_providers = True
    detector_precisions = ("float32", "float16")

    def check_options(self, opset: int) -> None:
        if opset not in OPSETS:
            raise UserError(f"--opset {opset} is not supported: {OPSETS.start} to {OPSETS.stop - 1} are")

    def description(self, manifest: Manifest) -> str:
        return f"{self.runtime}, opset {manifest.opset}"

    def arithmetic(self, precision: str) -> str:
        if precision == "float16":
            here = "float32 on weights in float16, as onnxruntime computes on a CPU"
            return f"{here}, and float16, as on a GPU (by PyTorch)"
        return super().arithmetic(precision)

    def arithmetic_elsewhere(self, precision: str) -> str | None:
        return "float16" if precision == "float16" else None

    def dtype(self, precision: str) -> str:
        return "float16" if precision == "float16" else "float32"

    def write(self, module: nn.Module, example: Any, path: Path, manifest: Manifest) -> None:
        import torch

        from .deployable import dynamic_shapes

        program = torch.onnx.export(
            module,
            example if isinstance(example, tuple) else (example,),
            dynamo=True,
            opset_version=manifest.opset or DEFAULT_OPSET,
            input_names=[manifest.input, *manifest.further_inputs],
            output_names=[manifest.output, *manifest.further_outputs],
            dynamic_shapes=dynamic_shapes(manifest),
            verbose=False,
        )
        # Where in whose files an operation was written is nobody's business, and a third of a small model.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
        program.model.metadata_props.update(metadata(manifest, module.model.config))
        program.save(path)

    def write_from_onnx(self, source: Path, path: Path, precision: str) -> None:
        shutil.copy(source, path)

    def open(self, path: Path, manifest: Manifest, threads: int, providers: Sequence[str] | None = None) -> Run:
        import torch

        session = self.session(path, threads, providers)
        inputs = [manifest.input, *manifest.further_inputs]
        outputs = [manifest.output, *manifest.further_outputs]

        def run(*tensors: torch.Tensor) -> Any:
            feeds = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
            found = tuple(map(torch.from_numpy, session.run(outputs, feeds)))
            return found if manifest.further_outputs else found[0]

        return run

    def session(self, graph: Path | bytes, threads: int, providers: Sequence[str] | None = None) -> Any:
        """An `InferenceSession` of a file, or of its content."""
        import onnxruntime

        wanted = list(providers or ["CPUExecutionProvider"])
        missing = [name for name in wanted if name not in onnxruntime.get_available_providers()]
        if missing:
            raise UserError(
                f"this onnxruntime has no {missing[0]}, only {', '.join(onnxruntime.get_available_providers())}; "
                "onnxruntime-gpu brings those of NVIDIA"
            )
        session = onnxruntime.InferenceSession(graph, session_options(threads), providers=wanted)
        idle = [name for name in wanted if name not in session.get_providers()]
        if idle:  # onnxruntime goes on with others, and says so in a log at most
            raise UserError(
                f"onnxruntime cannot start {idle[0]}, only {', '.join(session.get_providers())}: the libraries of "
                "NVIDIA that it needs are missing, or of another version"
            )
        return session

    def read_graph(self, path: Path) -> Any:
        import onnx

        return onnx.load(path)

    def save_graph(self, graph: Any, path: Path) -> None:
        import onnx

        store_integers(graph)
        onnx.save(graph, path)

    def input_name(self, graph: Any) -> str:
        return graph.graph.input[0].name

    def layers(self, graph: Any) -> list[Layer]:
        shapes = {tensor.name: tensor.dims for tensor in graph.graph.initializer}
        return [
            Layer(node.name, node.op_type == "Conv" and max(shapes.get(node.input[1], [1])[2:], default=1) > 1)
            for node in graph.graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul")
        ]


def session_options(threads: int) -> Any:
    """Of onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin between two calls take the cores away from whoever decodes the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def metadata(manifest: Manifest, config: Any) -> dict[str, str]:
    """What the file says of its answers to whoever has it without the folder; lists are JSON."""
    facts = {
        "task": manifest.task,
        "problem_type": manifest.problem_type,
        "labels": [str(config.id2label[index]) for index in range(config.num_labels)],
        "label_thresholds": manifest.label_thresholds,
    }
    return {
        name: value if isinstance(value, str) else to_json(value) for name, value in facts.items() if value is not None
    }


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
