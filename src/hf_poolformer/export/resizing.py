"""The way of an image processor from an image of any size to what a model takes, as operations of an ONNX graph.

ONNX's Resize with antialias works on 8 bits as Pillow does: columns of the filter in whole numbers, and 8 bits again
after each of the two passes. What is left of a difference is one level in a pixel of some thousands. Every number that
depends on the image's size is computed in the graph, in whole numbers, as `image_processing_poolformer` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL.Image import Resampling

from ..foundation.errors import UserError
from ..image_processing_poolformer import EvaluationTransform


if TYPE_CHECKING:
    import onnx


# How many times larger than its window a resized image may become in the usual order: 70 MB at 224 pixels.
MAX_WASTE = 512
# The graph's input, and the tensor where the processor's part ends and the model's begins.
IMAGE, PIXELS = "image", "pixel_values"
# Pillow's filters as ONNX's Resize has them; its nearest takes other pixels than Pillow's. Without `exclude_outside`
# onnxruntime is off by up to ten levels, in linear resizing all over the image.
MODES = {
    Resampling.BILINEAR: {"mode": "linear", "antialias": 1, "exclude_outside": 1},
    Resampling.BICUBIC: {"mode": "cubic", "antialias": 1, "exclude_outside": 1, "cubic_coeff_a": -0.5},
}
# Grey of red, green and blue, in parts of 65536, as Pillow computes it (ITU-R 601).
LUMA = (19595, 38470, 7471)


def check_processor(name: str, processor: Any, num_channels: int) -> None:
    """
    Raises:
        UserError: its steps have no counterpart in the graph; `name` is the model's.
    """
    problem = None
    if not isinstance(processor, EvaluationTransform):
        problem = f"is a {type(processor).__name__}, not a PoolFormerImageProcessor"
    elif num_channels not in (1, 3):
        problem = f"makes images of {num_channels} channels, and a browser has colours only"
    elif getattr(processor, "do_pad", None):
        problem = "pads images (do_pad)"
    elif processor.do_resize and Resampling(processor.resample) not in MODES:
        filters = ", ".join(filter.name.lower() for filter in MODES)
        problem = f"resizes with {Resampling(processor.resample).name.lower()}, and the graph can {filters}"
    elif processor.do_resize and processor.size.longest_edge:
        problem = "limits the longest edge"
    if problem is not None:
        raise UserError(f"the page of --format web cannot prepare images for {name}: its image processor {problem}")


def gives_one_size(processor: Any) -> bool:
    """Whether images of all sizes leave the processor in the same one."""
    if processor.do_center_crop:
        return True
    size = processor.size
    square = size.height == size.width and processor.crop_pct is not None  # which is a shortest edge
    return bool(processor.do_resize and size.height and size.width and not square)


class Nodes:
    """Nodes of a graph in the making; a size is a tensor of a single int64."""

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str | int, **attributes: Any) -> str:
        from onnx import helper

        output = attributes.pop("output", f"resizing/{kind}_{len(self.nodes)}")
        names = [self.constant([value]) if isinstance(value, int) else value for value in inputs]
        self.nodes.append(helper.make_node(kind, names, [output], name=output, **attributes))
        return output

    def constant(self, values: Sequence[int], dtype: type = np.int64) -> str:
        from onnx import numpy_helper

        name = f"resizing/{np.dtype(dtype).name}_{'_'.join(str(value).replace('-', 'minus_') for value in values)}"
        if all(tensor.name != name for tensor in self.initializers):
            self.initializers.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def crop(self, x: str, axis: int, start: str, end: str) -> str:
        return self.add("Slice", x, start, end, axis)

    def resize(self, x: str, height: str, width: str, filter: Resampling) -> str:
        sizes = self.add("Concat", 1, self.channels, height, width, axis=0)
        return self.add("Resize", x, "", "", sizes, coordinate_transformation_mode="half_pixel", **MODES[filter])


def append_front(model: onnx.ModelProto, processor: Any, num_channels: int) -> None:
    """
    Puts the processor's steps, up to pixels of 8 bits, in front of a graph that takes those.

    Args:
        model: takes `PIXELS`, uint8 (batch, height, width, channels); in the end `IMAGE`, uint8 (height, width, 3), an
            upright image in the colours of sRGB, its alpha composited on white. Of grey models, too.
    """
    from onnx import TensorProto, helper

    made = Nodes(num_channels)
    image = IMAGE
    if num_channels == 1:
        weighted = made.add("Mul", made.add("Cast", image, to=TensorProto.INT32), made.constant(LUMA, np.int32))
        luma = made.add("ReduceSum", weighted, 2, keepdims=1)
        luma = made.add(
            "Div", made.add("Add", luma, made.constant([1 << 15], np.int32)), made.constant([65536], np.int32)
        )
        image = made.add("Cast", luma, to=TensorProto.UINT8)
    planes = made.add("Unsqueeze", made.add("Transpose", image, perm=[2, 0, 1]), 0)
    planes = put_window(made, planes, processor)
    made.add("Transpose", planes, perm=[0, 2, 3, 1], output=PIXELS)

    graph = model.graph
    position = next(index for index, value in enumerate(graph.input) if value.name == PIXELS)
    del graph.input[position]
    graph.input.insert(position, helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["height", "width", 3]))
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*made.nodes, *others])
    graph.initializer.extend(made.initializers)


def put_window(made: Nodes, planes: str, processor: Any) -> str:
    """What the processor shows of (1, channels, height, width) when it has resized and cropped it."""
    shape = made.add("Shape", IMAGE)
    height, width = (made.add("Slice", shape, index, index + 1, 0) for index in (0, 1))
    resized = resized_size(made, height, width, processor) if processor.do_resize else (height, width)
    if processor.do_center_crop:
        crops = (processor.crop_size.height, processor.crop_size.width)
        (top, rows, pads_y), (left, columns, pads_x) = (
            centre_window(made, length, crop) for length, crop in zip(resized, crops, strict=True)
        )
    else:
        (top, rows, pads_y), (left, columns, pads_x) = ((made.constant([0]), length, None) for length in resized)
    bottom, right = made.add("Add", top, rows), made.add("Add", left, columns)
    if processor.do_resize:
        filter = Resampling(processor.resample)
        # Pillow resizes rows first, then columns. A strip 1 wide and 20000 high would become a billion pixels, most of
        # them outside of the window: it is resized and cropped from top to bottom first.
        area, seen = made.add("Mul", *resized), made.add("Mul", rows, columns)
        waste = made.add("Greater", area, made.add("Mul", seen, MAX_WASTE))
        first = made.add("And", waste, made.add("Greater", height, width))
        planes = made.resize(planes, made.add("Where", first, resized[0], height), width, filter)
        start, end = made.add("Where", first, top, 0), made.add("Where", first, bottom, height)
        planes = made.crop(planes, 2, start, end)
        planes = made.resize(planes, made.add("Sub", end, start), resized[1], filter)
        planes = made.crop(planes, 3, left, right)
        planes = made.resize(planes, made.add("Where", first, rows, resized[0]), columns, filter)
        top, bottom = made.add("Where", first, 0, top), made.add("Where", first, rows, bottom)
        planes = made.crop(planes, 2, top, bottom)
    else:
        planes = made.crop(made.crop(planes, 2, top, bottom), 3, left, right)
    if pads_y is None:
        return planes
    pads = made.add("Concat", 0, 0, pads_y[0], pads_x[0], 0, 0, pads_y[1], pads_x[1], axis=0)
    return made.add("Pad", planes, pads, made.constant([0], np.uint8), mode="constant")


def resized_size(made: Nodes, height: str, width: str, processor: Any) -> tuple[str, str]:
    """As `image_processing_poolformer.resized_size`."""
    size, crop_pct = processor.size, processor.crop_pct

    def enlarge(edge: int) -> int:
        return edge if crop_pct is None else math.floor(edge / crop_pct)

    if size.height and size.width and (crop_pct is None or size.height != size.width):
        return made.constant([enlarge(size.height)]), made.constant([enlarge(size.width)])
    short = made.constant([enlarge(size.shortest_edge or size.height)])
    larger, smaller = made.add("Max", height, width), made.add("Min", height, width)
    long = made.add("Div", made.add("Mul", short, larger), smaller)
    is_wide = made.add("LessOrEqual", height, width)
    return made.add("Where", is_wide, short, long), made.add("Where", is_wide, long, short)


def centre_window(made: Nodes, length: str, crop: int) -> tuple[str, str, tuple[str, str]]:
    """(start, length, zeros before and after) along one axis; a half is rounded to the even number."""
    over = made.add("Max", made.add("Sub", length, crop), 0)
    half = made.add("Div", over, 2)
    odd = made.add("Sub", half, made.add("Mul", made.add("Div", half, 2), 2))
    start = made.add("Div", made.add("Add", over, odd), 2)
    window = made.add("Min", length, crop)
    lacking = made.add("Sub", crop, window)
    before = made.add("Div", lacking, 2)
    return start, window, (before, made.add("Sub", lacking, before))


def without_front(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model's part of the graph: takes `PIXELS`, a batch."""
    from onnx import TensorProto, helper

    inner = type(model)()
    inner.CopyFrom(model)
    graph = inner.graph
    end = next(index for index, node in enumerate(graph.node) if PIXELS in node.output)
    del graph.node[: end + 1]
    position = next(index for index, value in enumerate(graph.input) if value.name == IMAGE)
    del graph.input[position]
    shape = ["batch", "rows", "columns", None]
    graph.input.insert(position, helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, shape))
    return inner


def only_front(model: onnx.ModelProto) -> onnx.ModelProto:
    """The processor's part of the graph: gives `PIXELS`."""
    from onnx import TensorProto, helper

    front = type(model)()
    front.CopyFrom(model)
    graph = front.graph
    end = next(index for index, node in enumerate(graph.node) if PIXELS in node.output)
    del graph.node[end + 1 :]
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:], graph.output[:], graph.value_info[:]
    graph.initializer.extend(kept)
    graph.output.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, [1, None, None, None]))
    return front
