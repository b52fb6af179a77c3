"""Programs of torch.export, as they are or compiled to machine code."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..foundation.errors import UserError
from .format import ExportFormat


if TYPE_CHECKING:
    import torch
    from torch import nn

    from .folder import Manifest
    from .format import Run


DEVICES = ("cpu", "cuda")


class TorchProgram(ExportFormat):
    """
    A .pt2; with the option `compile` a package of AOTInductor, for machines like the one that wrote it.

    The option `device` says what computes it, there and here: a program holds its device.
    """

    name = "torch"
    runtime = "PyTorch (torch.export)"
    file = "model.pt2"
    precisions = ("float32", "float16", "bfloat16")
    options = {"compile": False, "device": "cpu"}  # noqa: RUF012
    holds_code = True  # PyTorch unpickles these files, and runs the compiled ones

    def check_options(self, compile: bool, device: str) -> None:
        if device not in DEVICES:
            raise UserError(f"--device {device} is not supported: {' and '.join(DEVICES)} are")
        check_device(device, "--device cuda")

    def description(self, manifest: Manifest) -> str:
        where = ", on an NVIDIA GPU" if manifest.device == "cuda" else ""
        return f"{self.runtime}{', compiled' if manifest.compiled else ''}{where}"

    def dtype(self, precision: str) -> str:
        return precision

    def write(self, module: nn.Module, example: torch.Tensor, path: Path, manifest: Manifest) -> None:
        import torch

        from .deployable import dynamic_shapes

        module, example = module.to(manifest.device), example.to(manifest.device)
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

        check_device(manifest.device, "this export")
        if manifest.compiled:
            program = torch._inductor.aoti_load_package(str(path))
        else:
            # Its guards say what the exporter assumed of maps of one token; that they are right was verified.
            program = torch.export.load(path).module(check_guards=False)

        exact = manifest.device == "cuda" and manifest.precision == "float32"
        lock = threading.Lock() if exact else contextlib.nullcontext()

        def run(pixel_values: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode(), lock, float32_convolutions() if exact else contextlib.nullcontext():
                return program(pixel_values.to(manifest.device)).cpu()

        return run


def check_device(device: str, who: str) -> None:
    """
    Raises:
        UserError: there is no such device here.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{who} needs an NVIDIA GPU, and PyTorch sees none here")


@contextlib.contextmanager
def float32_convolutions() -> Iterator[None]:
    """On a GPU, where PyTorch's convolutions of float32 keep 10 bits of it unless told otherwise."""
    import torch

    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield
