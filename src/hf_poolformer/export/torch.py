"""Programs of torch.export, as they are or compiled to machine code."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .format import ExportFormat


if TYPE_CHECKING:
    import torch
    from torch import nn

    from .folder import Manifest
    from .format import Run


class TorchProgram(ExportFormat):
    """A .pt2; with the option `compile` a package of AOTInductor, for machines like the one that wrote it."""

    name = "torch"
    runtime = "PyTorch (torch.export)"
    file = "model.pt2"
    precisions = ("float32", "float16", "bfloat16")
    options = {"compile": False}  # noqa: RUF012
    holds_code = True  # PyTorch unpickles these files, and runs the compiled ones

    def dtype(self, precision: str) -> str:
        return precision

    def write(self, module: nn.Module, example: torch.Tensor, path: Path, manifest: Manifest) -> None:
        import torch

        from .deployable import dynamic_shapes

        program = torch.export.export(module, (example,), dynamic_shapes=dynamic_shapes(manifest))
        # The exporter saw maps of more than one token only, and would refuse others. What is too small is refused by
        # `ExportedModel`, and that all else comes out right is for `verify` to see.
        for symbol, sizes in program.range_constraints.items():
            program.range_constraints[symbol] = type(sizes)(1, sizes.upper)
        for node in program.graph.nodes:
            for name in ("stack_trace", "source_fn_stack"):
                node.meta.pop(name, None)
        if manifest.compiled:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        else:
            # By way of memory: on a full disk PyTorch's own writer ends the process.
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            path.write_bytes(buffer.getvalue())

    def open(self, path: Path, manifest: Manifest, threads: int, providers: Sequence[str] | None = None) -> Run:
        import torch

        if manifest.compiled:
            program = torch._inductor.aoti_load_package(str(path))
        else:
            # Its guards say what the exporter assumed of maps of one token; that they are right was verified.
            program = torch.export.load(path).module(check_guards=False)

        def run(pixel_values: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return program(pixel_values)

        return run
