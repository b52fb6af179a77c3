"""Writing the folded graph as ONNX, OpenVINO IR or a program of torch.export."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..foundation.errors import UserError, one_line
from ..modeling_poolformer import MLPHead
from ..token_mixers import FixedTokens
from .folder import FILES
from .graph import constant


# What torch.onnx translates to and the installed onnxruntime reads; GroupNormalization is an operation from 21 on.
OPSETS = range(18, 24)
DEFAULT_OPSET = 21
# Which arithmetic a format can hold, and what its CPU runtime can run and so be verified with.
PRECISIONS_OF = {
    "onnx": ("float32", "float16", "int8"),
    "openvino": ("float32", "float16", "bfloat16", "int8"),
    "torch": ("float32", "float16", "bfloat16"),
}
LIBRARIES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of one class of many: classes up to which OpenVINO's head is `Summed`. More would cost time, and rounding a logit to
# bfloat16 leaves their order as it is but for near ties.
MOST_SUMMED = 64


class Deployable(nn.Module):
    """
    A folded model with what surrounds it in the graph: float32 in and out, whatever it computes in.

    A classifier's head, from the last norm on, is float32 in any dtype: behind it there is nothing that would even out
    a rounding, and of 300.1 and 300.2 bfloat16 makes the same number.

    Args:
        model: as `graph.fold` returns it.
        dtype: of weights and arithmetic.
        processor: its rescaling and normalisation become part of the graph, which then takes uint8 (batch, height,
            width, channels), already resized and cropped, and gives probabilities; None for neither.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, processor: Any = None):
        super().__init__()
        self.model = model
        self.dtype = dtype
        if dtype != torch.float32 and hasattr(model, "classifier"):
            model.base_model.to(dtype)
            model.base_model.encoder.block[-1].append(Float32())
        else:
            model.to(dtype)
        self.scale = self.shift = None
        self.activation = None
        if processor is not None:
            scale, shift = pixel_affine(processor, model.config.num_channels)
            self.scale, self.shift = constant(scale), constant(shift)
            self.activation = activation_of(model.config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.scale is not None:
            pixel_values = (pixel_values.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        return scores(self.model(pixel_values.to(self.dtype)).logits.float(), self.activation)


class Float32(nn.Module):
    """In float32 from here on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


class Summed(nn.Module):
    """A linear layer as products and their sum: OpenVINO rounds what matrix products give to bfloat16, not these."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = layer.weight
        # A share in each product: behind the sum, OpenVINO 2026.4 gives all outputs the bias of the first.
        self.share = None if layer.bias is None else constant(layer.bias.double()[:, None] / layer.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        products = x[:, None] * self.weight
        return (products if self.share is None else products + self.share).sum(-1)


def sum_head(model: nn.Module) -> None:
    """The last layer of a folded classifier becomes `Summed`, where rounding its results would be seen."""
    config, head = model.config, getattr(model, "classifier", None)
    if activation_of(config) == "softmax" and config.num_labels > MOST_SUMMED:
        return
    if type(head) is nn.Linear:
        model.classifier = Summed(head)
    elif type(head) is MLPHead and type(head.fc2) is nn.Linear:
        head.fc2 = Summed(head.fc2)


def pixel_affine(processor: Any, num_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rescaling and normalisation of an image processor as `pixels * scale + shift`, both (channels,)."""
    scale, shift = torch.ones(num_channels, dtype=torch.float64), torch.zeros(num_channels, dtype=torch.float64)
    if getattr(processor, "do_rescale", False):
        scale *= processor.rescale_factor
    if getattr(processor, "do_normalize", False):
        mean = torch.tensor(processor.image_mean, dtype=torch.float64)
        std = torch.tensor(processor.image_std, dtype=torch.float64)
        scale, shift = scale / std, shift - mean / std
    return scale, shift


def activation_of(config: Any) -> str | None:
    """What makes scores of logits, as transformers' pipelines choose it."""
    if config.problem_type == "regression" or not config.num_labels:
        return None
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def scores(logits: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Logits (B, classes, ...) as scores."""
    if activation == "softmax":
        return logits.softmax(1)
    return logits.sigmoid() if activation == "sigmoid" else logits


def check_request(
    format: str, precision: str, *, opset: int | None = None, compile: bool = False, calibration: bool = False
) -> None:
    """
    Raises:
        UserError: a combination that there is not, or a library that is missing.
    """
    if format not in FILES:
        raise UserError(f"--format {format}: it must be one of {', '.join(FILES)}")
    if precision not in PRECISIONS_OF[format]:
        others = " and ".join(name for name, known in PRECISIONS_OF.items() if precision in known)
        hint = f"; --format {others} has it" if others else ""
        raise UserError(f"--precision {precision} is not there for --format {format}, {why_not(format)}{hint}")
    if opset is not None and format != "onnx":
        raise UserError(f"--opset belongs to --format onnx, not to {format}")
    if opset is not None and opset not in OPSETS:
        raise UserError(f"--opset {opset} is not supported: {OPSETS.start} to {OPSETS.stop - 1} are")
    if compile and format != "torch":
        raise UserError(f"--compile belongs to --format torch, not to {format}")
    if precision == "int8" and not calibration:
        raise UserError("--precision int8 needs images to calibrate on: --calibration_dataset FOLDER or Hub id")
    need(*LIBRARIES[format], *(["nncf"] if precision == "int8" else []))


def why_not(format: str) -> str:
    return {
        "onnx": "since onnxruntime has no bfloat16 on a CPU",
        "torch": "which only OpenVINO's and onnxruntime's 8-bit kernels are used for",
    }.get(format, "")


def describe_arithmetic(format: str, precision: str) -> str:
    """What the runtimes here compute in, and what else the same file may be computed in."""
    if format == "openvino" and precision in ("float32", "float16"):
        stored = ", with weights stored in float16" if precision == "float16" else ""
        return f"float32{stored}; on a GPU OpenVINO takes float16 unless INFERENCE_PRECISION_HINT is f32"
    if (format, precision) == ("onnx", "float16"):
        return "float32 on weights in float16, as onnxruntime computes on a CPU, and float16, as on a GPU (by PyTorch)"
    if precision == "int8":
        return "int8 products, float32 between them"
    if precision == "bfloat16" and arithmetic_elsewhere(format, precision) is not None:
        return "float32 on weights in float16, since this CPU has no bfloat16, and bfloat16 (by PyTorch)"
    return precision if precision == "float32" else f"{precision}, of the classifier's head float32"


def arithmetic_elsewhere(format: str, precision: str) -> torch.dtype | None:
    """What other machines compute the file in, if the runtime here computes it in float32."""
    if (format, precision) == ("onnx", "float16"):
        return torch.float16
    if (format, precision) == ("openvino", "bfloat16"):
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return torch.bfloat16
    return None


def need(*libraries: str) -> None:
    """
    Raises:
        UserError: one of them is not installed.
    """
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'hf-poolformer[export]'")


def smallest_size(config: Any) -> int:
    """Side in pixels of the smallest image that leaves every stage a token."""
    size = 1
    for kernel, stride, padding in zip(
        *map(reversed, (config.patch_sizes, config.strides, config.padding)), strict=True
    ):
        size = max(1, (size - 1) * stride + kernel - 2 * padding)
    return size


def has_fixed_tokens(model: nn.Module) -> bool:
    """Whether a mixer's matrix ties the model to one size."""
    return any(isinstance(module, FixedTokens) for module in model.modules())


def write_graph(
    module: Deployable,
    folder: Path,
    format: str,
    *,
    precision: str,
    image_size: tuple[int, int],
    dynamic_size: bool,
    opset: int | None = None,
    compile: bool = False,
) -> Path:
    """
    Writes the graph, in float arithmetic.

    Args:
        precision: of OpenVINO, whose float16 and bfloat16 are float32 graphs with weights in half the bytes; elsewhere
            the module's dtype says it.
        image_size: height and width in pixels.
        compile: of "torch": compile for this kind of machine.

    Raises:
        UserError: the exporter cannot translate the model.
    """
    path = folder / FILES[format]
    if dynamic_size:
        # The exporter takes a map of one row for one that has always one: no stage has such a map here.
        total = math.prod(module.model.config.strides)
        image_size = (4 * total, 3 * total)
    example = example_input(module, image_size)
    module.eval()
    try:
        with quiet(), torch.no_grad():
            if format == "torch":
                write_torch(module, example, path, dynamic_size, compile)
            elif format == "onnx":
                write_onnx(module, example, path, dynamic_size, opset or DEFAULT_OPSET)
            else:
                write_openvino(module, example, path, dynamic_size, precision)
    except Exception as error:
        # Exporters raise whatever they like, and a mixer of one's own may do what no graph can hold.
        raise UserError(f"the model cannot be written as {format}: {one_line(error)}") from error
    return path


def example_input(module: Deployable, image_size: tuple[int, int], batch_size: int = 2) -> torch.Tensor:
    channels = module.model.config.num_channels
    if module.scale is not None:
        return torch.zeros(batch_size, *image_size, channels, dtype=torch.uint8)
    return torch.zeros(batch_size, channels, *image_size)


def dynamic_shapes(module: Deployable, dynamic_size: bool) -> dict[str, dict[int, Any]]:
    first = 1 if module.scale is not None else 2
    names = {0: "batch", **({first: "height", first + 1: "width"} if dynamic_size else {})}
    return {"pixel_values": {axis: torch.export.Dim.DYNAMIC for axis in names}}


def output_name(module: Deployable) -> str:
    if not module.model.config.num_labels:
        return "features"
    return "logits" if module.activation is None else "probabilities"


def write_onnx(module: Deployable, example: torch.Tensor, path: Path, dynamic_size: bool, opset: int) -> None:
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=["pixel_values"],
        output_names=[output_name(module)],
        dynamic_shapes=dynamic_shapes(module, dynamic_size),
        verbose=False,
    )
    # Where in whose files an operation was written is nobody's business, and a third of a small model.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    program.save(path)


def write_openvino(module: Deployable, example: torch.Tensor, path: Path, dynamic_size: bool, precision: str) -> None:
    # By way of ONNX, whose GroupNormalization becomes one operation; OpenVINO's own reading of PyTorch's graph splits
    # it up, which was slower than the model as it was.
    scratch = path.with_suffix(".onnx")
    write_onnx(module, example, scratch, dynamic_size, DEFAULT_OPSET)
    onnx_to_openvino(scratch, path, precision)
    for left in path.parent.glob(f"{scratch.name}*"):
        left.unlink()


def onnx_to_openvino(source: Path, path: Path, precision: str) -> None:
    """An ONNX graph in float32 as OpenVINO IR; float16 and bfloat16 halve the weights' bytes."""
    import openvino

    model = openvino.Core().read_model(source)
    if precision in ("float16", "bfloat16"):
        halve(model)
    openvino.save_model(model, path, compress_to_fp16=False)


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


def write_torch(module: Deployable, example: torch.Tensor, path: Path, dynamic_size: bool, compile: bool) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes=dynamic_shapes(module, dynamic_size))
    # The exporter saw maps of more than one token only, and would refuse others. What is too small is refused by
    # `ExportedModel`, and that all else comes out right is for `verify` to see.
    for symbol, sizes in program.range_constraints.items():
        program.range_constraints[symbol] = type(sizes)(1, sizes.upper)
    for node in program.graph.nodes:
        for name in ("stack_trace", "source_fn_stack"):
            node.meta.pop(name, None)
    if compile:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        # By way of memory: on a full disk PyTorch's own writer ends the process.
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        path.write_bytes(buffer.getvalue())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters explain themselves on every call."""
    names = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._inductor", "torch._dynamo")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
