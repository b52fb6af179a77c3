"""What the file of a Core ML model says, computed by PyTorch: for machines without Core ML.

Operations are those of MIL (coremltools' documentation of its model intermediate language), in the opset of iOS 16,
as far as folded models have them. Weights and shapes are read from the package that was written; each result has the
type that the file gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from ..foundation.errors import UserError


if TYPE_CHECKING:
    from .folder import Manifest


class Interpreter:
    """
    The function of a package.

    Raises:
        UserError: it has an operation that is not known here.
        Exception: whatever coremltools says to a damaged file.
    """

    def __init__(self, path: Path, manifest: Manifest):
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.models import MLModel

        model = MLModel(str(path), skip_model_load=True)
        description = model.get_spec()
        program = load(description, description.specificationVersion, model.weights_dir)
        self.function = program.functions["main"]
        self.manifest = manifest
        unknown = {operation.op_type for operation in self.function.operations} - OPERATIONS.keys() - {"const"}
        if unknown:
            raise UserError(
                f"the package has operations that only Core ML computes here, on macOS: {', '.join(sorted(unknown))}"
            )
        self.constants: dict[str, Any] = {}
        for operation in self.function.operations:
            for given in operation.inputs.values():
                for variable in given if isinstance(given, list | tuple) else (given,):
                    if variable.val is not None:
                        self.constants[variable.name] = constant(variable.val)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.manifest.preprocessing:
            pixel_values = pixel_values.permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            return torch.cat([self.run(image[None]) for image in pixel_values])

    def run(self, image: torch.Tensor) -> torch.Tensor:
        """One image, as the package takes it."""
        values: dict[str, Any] = {self.manifest.input: image}

        def value(given: Any) -> Any:
            if isinstance(given, list | tuple):
                return [value(one) for one in given]
            return values[given.name] if given.name in values else self.constants[given.name]

        for operation in self.function.operations:
            if operation.op_type == "const":
                continue
            results = OPERATIONS[operation.op_type](**{name: value(given) for name, given in operation.inputs.items()})
            results = results if isinstance(results, tuple | list) else (results,)
            for output, result in zip(operation.outputs, results, strict=True):
                if tuple(result.shape) != tuple(output.shape):
                    raise ValueError(
                        f"{operation.op_type} gives {tuple(result.shape)} where the file says {tuple(output.shape)}"
                    )
                values[output.name] = result
        return values[self.manifest.output].float()


def constant(value: Any) -> Any:
    """Tensors of floating point as PyTorch's; what describes an operation as plain values."""
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return torch.from_numpy(array.copy()) if array.ndim else array.item()
    return array.tolist()


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    strides: list[int],
    pad_type: str,
    pad: list[int],
    dilations: list[int],
    groups: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return F.conv2d(padded(x, pad_type, pad), weight, bias, strides, 0, dilations, groups)


def batch_norm(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    epsilon: float,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def padded(x: torch.Tensor, pad_type: str, pad: list[int]) -> torch.Tensor:
    if pad_type == "valid":
        return x
    if pad_type != "custom":
        raise ValueError(f"unknown pad_type {pad_type}")
    top, bottom, left, right = pad
    return F.pad(x, (left, right, top, bottom))


def avg_pool(
    x: torch.Tensor,
    kernel_sizes: list[int],
    strides: list[int],
    pad_type: str,
    pad: list[int],
    exclude_padding_from_average: bool,
    ceil_mode: bool,
) -> torch.Tensor:
    if ceil_mode:
        raise ValueError("ceil_mode of avg_pool is not known here")
    total = F.avg_pool2d(padded(x, pad_type, pad), kernel_sizes, strides, divisor_override=1)
    count = torch.ones_like(x[:1, :1])
    if exclude_padding_from_average:
        count = F.avg_pool2d(padded(count, pad_type, pad), kernel_sizes, strides, divisor_override=1)
    else:
        count = torch.tensor(float(np.prod(kernel_sizes)), dtype=x.dtype)
    return total / count


def gelu(x: torch.Tensor, mode: str) -> torch.Tensor:
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise ValueError(f"unknown gelu {mode}")
    return F.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def layer_norm(
    x: torch.Tensor,
    axes: list[int],
    epsilon: float,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    if sorted(axis % x.ndim for axis in axes) != list(range(x.ndim - len(axes), x.ndim)):
        raise ValueError(f"layer_norm over axes {axes} is not known here")
    return F.layer_norm(x, x.shape[x.ndim - len(axes) :], gamma, beta, epsilon)


def matmul(x: torch.Tensor, y: torch.Tensor, transpose_x: bool = False, transpose_y: bool = False) -> torch.Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def split(
    x: torch.Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[torch.Tensor, ...]:
    return x.split(split_sizes if split_sizes is not None else x.shape[axis] // num_splits, axis)


def upsample_nearest(x: torch.Tensor, scale_factor_height: float, scale_factor_width: float) -> torch.Tensor:
    return F.interpolate(x, size=scaled(x, scale_factor_height, scale_factor_width), mode="nearest")


def upsample_bilinear(
    x: torch.Tensor,
    scale_factor_height: float,
    scale_factor_width: float,
    align_corners: bool,
    half_pixel_centers: bool | None = None,
) -> torch.Tensor:
    if align_corners or half_pixel_centers is False:
        raise ValueError("upsample_bilinear with aligned corners is not known here")
    size = scaled(x, scale_factor_height, scale_factor_width)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def scaled(x: torch.Tensor, height: float, width: float) -> tuple[int, int]:
    return round(x.shape[2] * height), round(x.shape[3] * width)


CASTS = {"fp32": torch.float32, "fp16": torch.float16}


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "cast": lambda x, dtype: x.to(CASTS[dtype]),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "concat": lambda values, axis, interleave=False: torch.cat(values, axis),
    "conv": conv,
    "expand_dims": lambda x, axes: x.reshape(expanded(x.shape, axes)),
    "gelu": gelu,
    "identity": lambda x: x,
    "layer_norm": layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": matmul,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "reduce_l2_norm": lambda x, axes, keep_dims: torch.linalg.vector_norm(x, dim=axes, keepdim=keep_dims),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keepdim=keep_dims),
    "relu": lambda x: x.relu(),
    "reshape": lambda x, shape: x.reshape(shape),
    "rsqrt": lambda x, epsilon: (x + epsilon).rsqrt(),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: F.silu(x),
    "softmax": lambda x, axis: x.softmax(axis),
    "split": split,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x.square(),
    "squeeze": lambda x, axes: x.squeeze(tuple(axes)),
    "sub": lambda x, y: x - y,
    "transpose": lambda x, perm: x.permute(perm),
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest,
}


def expanded(shape: torch.Size, axes: list[int]) -> list[int]:
    sides = list(shape)
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        sides.insert(axis, 1)
    return sides
