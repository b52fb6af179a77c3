"""Programs of ExecuTorch, for phones: computed by XNNPACK, verified in ExecuTorch's own runtime."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..foundation.errors import UserError
from .format import ExportFormat, Layer


if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from .folder import Manifest
    from .format import Run


# Methods of a program beside "forward": how many operations XNNPACK computes, and the names of the others.
INSIDE, ELSEWHERE = "operations_in_xnnpack", "operations_elsewhere"
# What PyTorch remembers of where a node is from, and ExecuTorch copies at each of its many passes.
ORIGINS = ("stack_trace", "source_fn_stack", "nn_module_stack", "from_node", "torch_fn")
# Of images, per step of calibration: as many as the program takes.
ONE = 1


class ExecuTorch(ExportFormat):
    """
    A .pte that takes one image at a time, as phones do: so all shapes are known, and XNNPACK computes everything.

    With `manifest.dynamic_size` sizes may vary up to `manifest.most_size`, for which memory is set aside.
    """

    name = "executorch"
    runtime = "ExecuTorch (XNNPACK)"
    file = "model.pte"
    precisions = ("float32", "int8")
    missing_because = {  # noqa: RUF012
        "float16": "XNNPACK computes GELU in float32 only",
        "bfloat16": "XNNPACK computes it nowhere but in a few operations",
    }
    libraries = ("executorch", "torchao")
    extra = "mobile"
    hub_library = "executorch"
    quantiser = "PT2E post-training quantisation (torchao, XNNPACKQuantizer)"
    most_images = ONE
    sizes = "limited"
    by_way_of_onnx = False

    def libraries_for(self, precision: str) -> tuple[str, ...]:
        return self.libraries

    def arithmetic(self, precision: str) -> str:
        return f"{super().arithmetic(precision)}; on a phone the same, by other kernels of XNNPACK"

    def description(self, manifest: Manifest) -> str:
        return f"{self.runtime}; {manifest.computed_by}" if manifest.computed_by else self.runtime

    def write(self, module: nn.Module, example: torch.Tensor, path: Path, manifest: Manifest) -> None:
        """As a .pte; for int8 as a program of torch.export, which `quantise` takes."""
        import torch

        from .deployable import dynamic_shapes, fix_positions
        from .xnnpack import for_xnnpack

        example = example[:ONE]
        if not manifest.dynamic_size:
            fix_positions(module, example)
        for_xnnpack(module, example, quantised=manifest.precision == "int8")
        program = torch.export.export(module, (example,), dynamic_shapes=dynamic_shapes(manifest))
        # As in `torch.py`, the exporter would refuse maps of one token.
        limit_sizes(program, manifest.least_size, manifest.most_size)
        if manifest.precision == "int8":
            # By way of memory: on a full disk PyTorch's own writer ends the process.
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            path.write_bytes(buffer.getvalue())
        else:
            self.save_graph(program, path)

    def open(self, path: Path, manifest: Manifest, threads: int, providers: Sequence[str] | None = None) -> Run:
        import torch

        session = Session(path, threads)

        def run(pixel_values: torch.Tensor) -> torch.Tensor:
            return torch.cat([session(image[None].contiguous()) for image in pixel_values])

        return run

    def computed_by(self, path: Path) -> str:
        program = read_program(path)
        inside, elsewhere = (program.load_method(name).execute([])[0] for name in (INSIDE, ELSEWHERE))
        names = elsewhere.split()
        share = f"XNNPACK computes {inside} of {inside + len(names)} operations"
        if not names:
            return share
        return f"{share}, ExecuTorch's portable kernels {', '.join(sorted(set(names)))}"

    def read_graph(self, path: Path) -> Any:
        import torch

        return torch.export.load(io.BytesIO(path.read_bytes()))

    def save_graph(self, graph: Any, path: Path) -> None:
        path.write_bytes(lowered(graph))

    def input_name(self, graph: Any) -> str:
        return graph.graph_signature.user_inputs[0]

    def layers(self, graph: Any) -> list[Layer]:
        from .xnnpack import AVERAGING

        signature = graph.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        found = []
        for node in graph.graph.nodes:
            weight = names.get(getattr(node.args[1], "name", "")) if node.target in products() else None
            if weight is not None and not weight.endswith(AVERAGING):
                found.append(Layer(weight, max(node.args[1].meta["val"].shape[2:], default=1) > 1))
        return found

    def quantise(self, graph: Any, chunks: list[np.ndarray], ignored: list[str], *, attention: bool) -> Any:
        import torch

        with quiet():
            from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
                XNNPACKQuantizer,
                get_symmetric_quantization_config,
            )
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

            chosen = {layer.name for layer in self.layers(graph)} - set(ignored)
            # Products only: sums and what is left of the norms stay in float32, as in the other formats. The filter is
            # asked about a product's weights, too.
            quantizer = XNNPACKQuantizer().set_filter_function(
                lambda node: node.target not in products() or getattr(node.args[1], "target", None) in chosen
            )
            settings = get_symmetric_quantization_config(is_per_channel=True)
            for operation in products():
                quantizer.set_operator_type(operation, settings)
            module = prepare_pt2e(graph.module(check_guards=False), quantizer)
            with torch.no_grad():
                for chunk in chunks:
                    for image in torch.from_numpy(chunk):
                        module(image[None])
            module = convert_pt2e(module)
            done = sum(is_quantised(node) for node in module.graph.nodes)
            if done != len(chosen):
                raise UserError(f"torchao has quantised {done} layers where {len(chosen)} were to be")
            (example,), _ = graph.example_inputs
            (name,) = graph.graph_signature.user_inputs
            shape = next(node for node in graph.graph.nodes if node.name == name).meta["val"].shape
            sides = [axis for axis, side in enumerate(shape) if not isinstance(side, int)]
            quantised = torch.export.export(
                module, (example,), dynamic_shapes=(dict.fromkeys(sides, torch.export.Dim.DYNAMIC),)
            )
        if sides:
            limits = next(iter(graph.range_constraints.values()))
            limit_sizes(quantised, int(limits.lower), int(limits.upper))
        return quantised


def products() -> tuple[Any, ...]:
    """What is quantised."""
    import torch

    return torch.ops.aten.conv2d.default, torch.ops.aten.linear.default


def is_quantised(node: Any) -> bool:
    """Whether this is a product with weights in 8 bits."""
    return node.target in products() and "dequantize" in str(node.args[1].target)


def limit_sizes(program: Any, least: int, most: int | None) -> None:
    """Says which heights and widths, in pixels, a program of torch.export is to be made for."""
    for symbol, sizes in program.range_constraints.items():
        program.range_constraints[symbol] = type(sizes)(least, most)


def lowered(program: Any) -> bytes:
    """A program of torch.export as a .pte, with everything that XNNPACK knows given to it."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeProgramManager, to_edge_transform_and_lower
        from executorch.exir.lowered_backend_module import get_lowered_submodules

        for node in program.graph.nodes:
            for name in ORIGINS:
                node.meta.pop(name, None)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).exported_program()
        parts = [part for _, part, _ in get_lowered_submodules(edge.graph_module)]
        facts = {
            INSIDE: sum(len(operations(part.original_module.graph)) for part in parts),
            ELSEWHERE: " ".join(operations(edge.graph)),
        }
        return EdgeProgramManager(edge, facts).to_executorch().buffer


def operations(graph: Any) -> list[str]:
    """Names of what a lowered graph computes itself."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    return [target._op.__name__.partition(".")[0] for target in targets if hasattr(target, "_op")]


def read_program(path: Path) -> Any:
    with quiet():
        from executorch.runtime import Runtime

        return Runtime.get().load_program(path)


class Session:
    """
    A program, ready to be called by any number of threads, one after the other.

    The runtime has one pool of threads per process, of which every loaded program keeps the address: before it is made
    anew, for another number of threads, all programs are let go, and are loaded again when they are called.
    """

    loaded: ClassVar[weakref.WeakSet[Session]] = weakref.WeakSet()
    lock: ClassVar[threading.Lock] = threading.Lock()
    threads_of_pool: ClassVar[int | None] = None

    def __init__(self, path: Path, threads: int):
        self.path, self.threads = path, threads
        self.method: Any = None
        with self.lock:
            self.load()

    def load(self) -> None:
        with quiet():
            from executorch.extension.pybindings import portable_lib

        # The first question makes the pool. What the runtime says about it goes past Python.
        if Session.threads_of_pool is None:
            with without_stderr():
                Session.threads_of_pool = portable_lib._threadpool_get_thread_count()
        if Session.threads_of_pool != self.threads:
            for other in self.loaded:
                other.method = None
            with without_stderr():
                portable_lib._unsafe_reset_threadpool(self.threads)
            Session.threads_of_pool = self.threads
        if self.method is None:
            self.method = read_program(self.path).load_method("forward")
            self.loaded.add(self)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.load()
            return self.method.execute([pixel_values])[0]  # a copy


@contextlib.contextmanager
def without_stderr() -> Iterator[None]:
    """For what libraries in C++ write there."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ExecuTorch and torchao explain themselves when imported, and at work."""
    from .deployable import quiet_loggers

    with warnings.catch_warnings(), quiet_loggers("torch", "torchao", "executorch", "root"):
        warnings.simplefilter("ignore")
        yield
