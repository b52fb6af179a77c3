"""Compile every kernel for compute capability 9.0 with every tile it may choose; needs no GPU. Prints a JSON list.

    python tests/kernels/compile_for_hopper.py                   what the test looks at
    python tests/kernels/compile_for_hopper.py 64 128 320 512    training and inference in bfloat16 with so many
                                                                 channels, a line per kernel and tile

Runs forward and backward of all operations on CPU tensors, with launches replaced by compilation, so that each kernel
is compiled for the arguments it would get. Results are garbage, and nobody looks at them.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hf_poolformer import fused_operations
from hf_poolformer.kernels import (
    inference,
    launch,
    mlp_backward,
    mlp_forward,
    patch_embedding,
    pool_mixer,
    separable_conv,
    token_norm,
)


CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
reports: dict[str, dict] = {}


def compile_instead(kernel, *args, grid, warmup, **kwargs):
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        # As a launch specialises: None and 1 are constants, multiples of 16 are known to be.
        if name in constant or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    key = f"{kernel.__name__} {signature} {constants} {options}"
    if key in reports:
        return
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    reports[key] = {
        "kernel": kernel.__name__,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in compiled.asm["ptx"],
        "operands": [kind for kind in signature.values() if kind in POINTERS.values()],
        "launch": f"{options} { {name: str(value) for name, value in constants.items()} }",
        "line": f"{kernel.__name__:26} {shape(options | constants)}",
    }


def shape(values: dict) -> str:
    """Of a launch what differs between stages and tiles; whether z is kept, too."""
    names = ("N", "K", "C", "R", "OUT", "TILE_H", "TILE_W", "ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages")
    found = [f"{name}={values[name]}" for name in names if name in values]
    inference = "preactivation" in values and values["preactivation"] is None
    return " ".join(found + ["inference"] * inference)


def launch_all(key, candidates, launch):
    results = [launch(candidate) for candidate in candidates]
    return results[0]


def run(dim: int, size: int, dtype: torch.dtype, autocast: torch.dtype | None, v2: bool, norm: str = "group"):
    def parameter(*shape):
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    x, mask = torch.ones(2, dim, size, size, dtype=dtype, requires_grad=True), torch.ones(2)
    scale = {"res_scale" if v2 else "layer_scale": parameter(dim)}
    rest = {"norm_bias": dim, "bias1": 4 * dim, "bias2": dim}
    if v2:
        rest = {"act_scale": 1, "act_bias": 1}
    rest = {name: parameter(length) for name, length in rest.items()}
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y, statistics = fused_operations.pool_mixer(
            x, pool_size=3, eps=1e-5, weight=parameter(dim), mask=mask, with_statistics=True, backend="triton", **scale
        )
        y, _ = fused_operations.channel_mlp(
            y,
            parameter(4 * dim, dim),
            parameter(dim, 4 * dim),
            activation="star_relu" if v2 else "gelu",
            eps=1e-5,
            norm=norm,
            norm_weight=parameter(dim),
            mask=mask,
            statistics=statistics if norm == "group" else None,
            with_statistics=True,
            backend="triton",
            **scale,
            **rest,
        )
    if y.requires_grad:
        y.sum().backward()


def infer(dim: int, dtype: torch.dtype, product_dtype: torch.dtype, v2: bool):
    """A mixer and an MLP that hand on what they know of statistics."""

    def parameter(*shape):
        return torch.ones(shape, dtype=dtype)

    x = torch.ones(2, dim, 14, 14, dtype=dtype).contiguous(memory_format=torch.channels_last)
    mlp = {
        "norm": "channel" if v2 else "group",
        "activation": "star_relu" if v2 else "gelu",
        "eps": 1e-6,
        "norm_weight": parameter(dim),
        "weight1": parameter(4 * dim, dim),
        "weight2": parameter(dim, 4 * dim),
        "layer_scale": None if v2 else parameter(dim),
        "res_scale": parameter(dim) if v2 else None,
    }
    names = {"norm_bias": dim, "bias1": 4 * dim, "bias2": dim, "act_scale": 1, "act_bias": 1}
    mlp |= {name: parameter(size) if v2 == name.startswith("act") else None for name, size in names.items()}
    mixer = {"pool_size": 3, "eps": 1e-5, "weight": parameter(dim), "layer_scale": parameter(dim), "res_scale": None}
    if v2:
        mixer = {
            "eps": 1e-6,
            "norm_weight": parameter(dim),
            "weight1": parameter(2 * dim, dim),
            "act_scale": parameter(1),
            "act_bias": parameter(1),
            "depthwise_weight": parameter(2 * dim, 1, 7, 7),
            "weight2": parameter(dim, 2 * dim),
            "layer_scale": None,
            "res_scale": parameter(dim),
        }
    branches = [("separable_conv" if v2 else "pool_mixer", mixer), ("channel_mlp", mlp)]
    inference.run([x, None], branches, product_dtype)


def run_separable(dim: int, size: int, dtype: torch.dtype, product_dtype: torch.dtype):
    def parameter(*shape):
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    x = torch.ones(2, dim, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weights = parameter(dim), parameter(2 * dim, dim), parameter(1), parameter(1), parameter(2 * dim, 1, 7, 7)
    rest = parameter(dim, 2 * dim), None, parameter(dim), torch.ones(2), 1e-6, product_dtype, True
    y, _ = separable_conv.separable_conv(x.requires_grad_(), *weights, *rest)
    y.sum().backward()


def run_around_module(dim: int, dtype: torch.dtype, branch_dtype: torch.dtype, everything: bool):
    """The norm, and the addition of the branch; `everything` with bias, layer scale and mask."""

    def parameter(there=True):
        return torch.ones(dim, dtype=dtype, requires_grad=True) if there else None

    x = torch.ones(2, dim, 14, 14, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    mask, result_dtype = torch.ones(2) if everything else None, torch.promote_types(dtype, branch_dtype)
    weight, bias, layer_scale, res_scale = (parameter(there) for there in (True, everything, everything, True))
    normed, shortcut = token_norm.norm_and_shortcut(x, weight, bias, res_scale, 1e-6, branch_dtype)
    y, _ = token_norm.merge(shortcut, normed, layer_scale, res_scale, mask, result_dtype, True)
    y.sum().backward()


def mix(dim: int, size: int, dtype: torch.dtype):
    """The mixer alone: its tiles depend on the width of the image."""
    x, weight = torch.ones(2, dim, size, size, dtype=dtype, requires_grad=True), torch.ones(dim, dtype=dtype)
    scales = {"weight": weight.requires_grad_(), "layer_scale": torch.ones(dim, dtype=dtype)}
    y, _ = fused_operations.pool_mixer(x, pool_size=3, eps=1e-5, **scales, with_statistics=True, backend="triton")
    y.sum().backward()


def embed(dim: int, channels: int, dtype: torch.dtype):
    """The stem for images of so many channels, and a bias of the embeddings that follow."""
    x = torch.ones(2, channels, 224, 224, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(dim, channels, 7, 7, dtype=dtype), torch.ones(dim, dtype=dtype)
    y, _ = fused_operations.patch_embedding(x, weight, bias, stride=[4, 4], padding=[2, 2], with_statistics=True)
    patch_embedding.add_bias(y, bias, with_statistics=True)


def main():
    JITFunction.run = compile_instead
    launch.Kernel.__getitem__ = lambda kernel, grid: kernel._jit[grid]
    for module in (mlp_backward, mlp_forward, patch_embedding, pool_mixer):
        module.tuned = launch_all
    channels = [int(argument) for argument in sys.argv[1:]]
    for dim in channels:
        run(dim, 14, torch.bfloat16, None, v2=False)
        embed(dim, 3, torch.bfloat16)
        with torch.no_grad():
            run(dim, 14, torch.bfloat16, None, v2=False)
        run_around_module(dim, torch.bfloat16, torch.bfloat16, everything=False)
    if channels:
        for report in reports.values():
            usage = f"registers {report['registers']}, stack {report['stack']}, shared {report['shared']}"
            print(f"{report['line']}: {usage}{', wgmma' if report['wgmma'] else ''}")
        return
    run(128, 14, torch.bfloat16, None, v2=False)
    run(96, 14, torch.bfloat16, None, v2=True)
    run(320, 14, torch.bfloat16, None, v2=True, norm="channel")
    run(64, 14, torch.float32, torch.bfloat16, v2=False)
    run(64, 14, torch.float32, None, v2=False)
    run(20, 7, torch.float16, None, v2=False)
    with torch.no_grad():
        run(64, 14, torch.bfloat16, None, v2=False)
        run(320, 14, torch.bfloat16, None, v2=False)
        for dim, v2 in ((64, True), (128, True), (320, True), (320, False)):
            infer(dim, torch.bfloat16, torch.bfloat16, v2)
        infer(64, torch.float32, torch.float32, v2=True)
        infer(320, torch.float32, torch.bfloat16, v2=True)
    # Strips of 8, 7 and 6 tokens; normalised rows in the product and before it.
    run_separable(64, 56, torch.bfloat16, torch.bfloat16)
    run_separable(128, 28, torch.float32, torch.bfloat16)
    run_separable(320, 12, torch.float16, torch.float16)
    run_separable(20, 8, torch.float32, torch.float32)
    run_around_module(64, torch.bfloat16, torch.bfloat16, everything=False)
    run_around_module(512, torch.bfloat16, torch.bfloat16, everything=True)
    run_around_module(320, torch.float32, torch.bfloat16, everything=True)
    run_around_module(20, torch.float16, torch.float16, everything=True)
    for dim, size in ((64, 56), (128, 28), (512, 7)):
        mix(dim, size, torch.bfloat16)
    mix(64, 56, torch.float32)
    for dim in (64, 96):
        embed(dim, 3, torch.bfloat16)
    embed(64, 4, torch.float16)
    print(json.dumps(list(reports.values())))


if __name__ == "__main__":
    main()
