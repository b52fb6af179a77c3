"""What is written into a graph: the folded model, and what surrounds it there."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..foundation.errors import UserError, one_line
from ..foundation.scores import REGRESSION, activated, activation_of
from ..modeling_poolformer import MetaFormerEmbeddings, MLPHead
from ..token_mixers import FixedTokens
from .folder import Manifest
from .formats import FORMATS
from .graph import constant


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
            width, channels), already resized and cropped, and gives probabilities (of a regression the values, as
            ever); None for neither.
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
            self.scale, self.shift = (constant(value[:, None, None]) for value in (scale, shift))
            self.activation = activation_of(model.config)

    @property
    def output_name(self) -> str:
        config = self.model.config
        if not config.num_labels:
            return "features"
        if config.problem_type == REGRESSION:
            return "values"
        return "logits" if self.activation is None else "probabilities"

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.scale is not None:
            # Bytes are put in order, not floats: where a transposition lies between the scaling and a convolution in 8
            # bits, onnxruntime 1.32 refuses the graph that it makes of it.
            pixel_values = pixel_values.permute(0, 3, 1, 2).float() * self.scale + self.shift
        return activated(self.model(pixel_values.to(self.dtype)).logits.float(), self.activation)


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


class AddPositions(nn.Module):
    """Position embeddings (1, C, H, W) of one size."""

    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.positions = constant(positions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions


def fix_positions(module: Deployable, example: torch.Tensor) -> None:
    """Position embeddings become constants, for a graph that takes images of the size of `example` alone."""
    for part, (_, output) in shapes_at(module, example, MetaFormerEmbeddings).items():
        if part.position_embeddings is not None:
            positions = part.resize_positions(output[2:])
            part.position_embeddings = None
            part.post_norm = nn.Sequential(part.post_norm, AddPositions(positions))


def shapes_at(
    module: nn.Module, example: torch.Tensor, *kinds: type[nn.Module]
) -> dict[nn.Module, tuple[torch.Size, torch.Size]]:
    """Of the parts of these kinds, what shape goes in and what comes out when `example` goes through `module`."""
    found: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}

    def look(part: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[part] = (inputs[0].shape, output.shape)

    handles = [part.register_forward_hook(look) for part in module.modules() if isinstance(part, kinds)]
    try:
        with torch.no_grad():
            module(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


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


def smallest_size(config: Any) -> int:
    """Side in pixels of the smallest image that leaves every stage a token."""
    size = 1
    for kernel, stride, padding in zip(
        *map(reversed, (config.patch_sizes, config.strides, config.padding)), strict=True
    ):
        size = max(1, (size - 1) * stride + kernel - 2 * padding)
    return size


def largest_size(config: Any, image_size: list[int]) -> int:
    """
    Side in pixels of the largest image that a graph is made for, where its memory is set aside beforehand: twice the
    model's, and not below what `write_graph` shows the exporter.
    """
    return max(2 * max(image_size), 4 * math.prod(config.strides))


def has_fixed_tokens(model: nn.Module) -> bool:
    """Whether a mixer's matrix ties the model to one size."""
    return any(isinstance(module, FixedTokens) for module in model.modules())


def write_graph(module: Deployable, folder: Path, manifest: Manifest) -> Path:
    """
    Writes the graph, in floating point, in the manifest's format.

    Raises:
        UserError: the exporter cannot translate the model.
    """
    format = FORMATS[manifest.format]
    path = folder / format.file
    size = manifest.image_size
    if manifest.dynamic_size:
        # The exporter takes a map of one row for one that has always one: no stage has such a map here.
        total = math.prod(module.model.config.strides)
        if manifest.further_outputs:  # whose pyramid has two levels more
            total *= 4
        size = (4 * total, 3 * total)
    number = 1 if manifest.further_outputs else 2
    if manifest.preprocessing:
        example = torch.zeros(number, *size, manifest.num_channels, dtype=torch.uint8)
    else:
        example = torch.zeros(number, manifest.num_channels, *size)
    if manifest.further_inputs:
        example = (example, torch.ones(1, *size, dtype=torch.int64))
    module.eval()
    try:
        with quiet(), torch.no_grad():
            format.write(module, example, path, manifest)
    except Exception as error:
        # Exporters raise whatever they like, and a mixer of one's own may do what no graph can hold.
        raise UserError(f"the model cannot be written as {format.name}: {one_line(error)}") from error
    return path


def dynamic_shapes(manifest: Manifest) -> dict[str, dict[int, Any]]:
    """The axes of the input that may vary, as torch.export takes them: of the images, and of their sides."""
    first = 1 if manifest.preprocessing else 2
    format = FORMATS[manifest.format]
    number = () if manifest.further_outputs or format.most_images else (0,)
    sides = (first, first + 1) if manifest.dynamic_size else ()
    shapes = {"pixel_values": dict.fromkeys(number + sides, torch.export.Dim.DYNAMIC)}
    for name in manifest.further_inputs:
        shapes[name] = {axis - 1: torch.export.Dim.DYNAMIC for axis in sides}
    return shapes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters explain themselves on every call."""
    names = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._inductor", "torch._dynamo")
    with warnings.catch_warnings(), quiet_loggers(*names):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Lets nothing but errors of these libraries through."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
