"""Runs the IR that Triton makes of a kernel, with PyTorch on the CPU: a plugin of pytest, for machines without a GPU.

    TRITON_INTERPRET=0 PYTHONPATH=src:tests/kernels python -m pytest -p triton_ir tests/kernels/test_pool_mixer.py

Triton's interpreter runs a kernel's Python, which the compiler reads in ways of its own: it drops, for example, a
variable of a loop that it takes for constant. Here its frontend compiles, and each launch runs what came out. Memory
is looked at as well: an address outside of the tensors that a kernel was given is an error.
"""

import ctypes
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import driver

from hf_poolformer import backends, kernels
from hf_poolformer.kernels import launch


# The tiles of the interpreter, so that small tensors have several; all else as on a GPU.
launch.INTERPRETED = True
for name in backends.TRITON_MODULES:
    importlib.import_module(f"{kernels.__name__}.{name}")
for module in list(vars(kernels).values()):
    if hasattr(module, "INTERPRETED"):
        module.INTERPRETED = False
# Whole tensors, whose bounds are known, and not addresses; `recorded_training.py` sets it back.
launch_addresses = launch.Kernel.__getitem__
launch.Kernel.__getitem__ = lambda kernel, grid: kernel._jit[grid]
from without_gpu import Hopper  # noqa: E402


DTYPES = {
    "i1": torch.bool,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
}
COMPARISONS = {
    **{"eq": torch.eq, "ne": torch.ne, "slt": torch.lt, "sle": torch.le, "sgt": torch.gt, "sge": torch.ge},
    **{"oeq": torch.eq, "une": torch.ne, "olt": torch.lt, "ole": torch.le, "ogt": torch.gt, "oge": torch.ge},
}
# What maps tensors to a tensor, entry by entry.
ELEMENTWISE: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(("arith.addi", "arith.addf"), torch.add),
    **dict.fromkeys(("arith.subi", "arith.subf"), torch.sub),
    **dict.fromkeys(("arith.muli", "arith.mulf"), torch.mul),
    "arith.divf": torch.div,
    "arith.divsi": functools.partial(torch.div, rounding_mode="trunc"),
    "arith.remsi": torch.fmod,
    "arith.andi": torch.bitwise_and,
    "arith.ori": torch.bitwise_or,
    "arith.xori": torch.bitwise_xor,
    "arith.negf": torch.neg,
    **dict.fromkeys(("arith.maxsi", "arith.maximumf"), torch.maximum),
    **dict.fromkeys(("arith.minsi", "arith.minimumf"), torch.minimum),
    "arith.maxnumf": torch.fmax,
    "arith.minnumf": torch.fmin,
    "arith.select": torch.where,
    "math.absf": torch.abs,
    "math.erf": torch.erf,
    "math.exp": torch.exp,
    "math.exp2": torch.exp2,
    "math.log": torch.log,
    "math.rsqrt": torch.rsqrt,
    "math.sqrt": torch.sqrt,
    "math.fma": lambda a, b, c: a * b + c,
    "tt.dot": lambda a, b, c: a.float() @ b.float() + c,
}
CASTS = {"arith.extsi", "arith.extui", "arith.trunci", "arith.extf", "arith.truncf", "tt.fp_to_fp"}
CASTS |= {"arith.sitofp", "arith.uitofp", "arith.fptosi"}
VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")


class Operation(NamedTuple):
    name: str
    results: list[str]
    operands: list[str]
    text: str  # all after the name, for attributes
    shape: tuple[int, ...]  # of the result, or of what is loaded or stored
    dtype: torch.dtype | None
    regions: list["Region"]


class Region(NamedTuple):
    arguments: list[str]
    operations: list[Operation]


def read_region(lines: Iterator[str], arguments: list[str]) -> tuple[Region, str]:
    """The operations up to the brace that closes them, and its line."""
    operations: list[Operation] = []
    for line in lines:
        if line.startswith("}"):
            return Region(arguments, operations), line
        if line.startswith("^"):
            arguments = VALUE.findall(line)
        elif line:
            operations.append(read_operation(line, lines))
    raise ValueError("the text ends within a region")


def read_operation(line: str, lines: Iterator[str]) -> Operation:
    found = re.fullmatch(r'(?:(%[\w.$-]+)(?::(\d+))? = )?"?([\w.]+)"?(.*)', line)
    assert found, line
    result, count, name, text = found.groups()
    results = [] if result is None else [f"{result}#{i}" for i in range(int(count))] if count else [result]
    regions: list[Region] = []
    operands = VALUE.findall(text)
    if text.endswith("{"):
        arguments = operands[:1] + operands[4::2] if name == "scf.for" else operands if name == "tt.func" else []
        closing = "{"
        while closing.endswith("{"):  # } else {
            region, closing = read_region(lines, arguments)
            regions.append(region)
    kind = re.split(r" -> | to ", text.rpartition(" : ")[2])[-1]
    shape, dtype = read_type(kind)
    return Operation(name, results, operands, text, shape, dtype, regions)


def read_type(kind: str) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Shape and dtype, of pointers that of what they point to."""
    found = re.match(r"(?:tensor<((?:\d+x)*))?(?:!tt\.ptr<)?(\w+)", kind)
    sizes, element = found.groups() if found else ("", "")
    return tuple(map(int, (sizes or "").split("x")[:-1])), DTYPES.get(element)


def read_constant(operation: Operation) -> torch.Tensor:
    if operation.text.strip() in ("true", "false"):
        return torch.tensor(operation.text.strip() == "true")
    text = re.search(r"(?:dense<)?([^\s<>]+)>? : ", operation.text)[1]
    if text in ("true", "false"):
        value: Any = text == "true"
    elif text.startswith("0x"):
        bits = {torch.float32: torch.int32}.get(operation.dtype, torch.int16)
        number = int(text, 16)
        number -= (number >= 2 ** (8 * bits.itemsize - 1)) << (8 * bits.itemsize)
        value = torch.tensor(number, dtype=bits).view(operation.dtype).item()
    else:
        value = float(text) if operation.dtype.is_floating_point else int(text)
    return torch.full(operation.shape, value, dtype=operation.dtype)


class Memory:
    """The tensors of a launch, by address."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.flat = []
        for tensor in tensors:
            length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self.flat.append(tensor.detach().as_strided((length if tensor.numel() else 0,), (1,)))

    def find(self, addresses: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor, as a vector, that has these addresses, at least one, and the places there."""
        first, last = addresses.min().item(), addresses.max().item()
        for flat in self.flat:
            start = flat.data_ptr()
            if start <= first and last < start + flat.numel() * flat.itemsize and flat.dtype == dtype:
                return flat, (addresses - start) // flat.itemsize
        if not self.flat:
            return self.at_addresses(addresses, dtype)
        raise IndexError(f"no tensor of {dtype} has the addresses from {first} to {last}")

    @staticmethod
    def at_addresses(addresses: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`find` for launches that got addresses: whatever is there."""
        first, last = addresses.min().item(), addresses.max().item()
        buffer = (ctypes.c_char * (last + dtype.itemsize - first)).from_address(first)
        return torch.frombuffer(buffer, dtype=dtype), (addresses - first) // dtype.itemsize

    def load(self, operation: Operation, pointers: torch.Tensor, mask=None, other=None) -> torch.Tensor:
        values = torch.zeros(operation.shape, dtype=operation.dtype) if other is None else other.clone()
        mask = torch.ones(operation.shape, dtype=torch.bool) if mask is None else mask
        if mask.any():
            flat, places = self.find(pointers[mask], operation.dtype)
            values[mask] = flat[places]
        return values

    def store(self, operation: Operation, pointers: torch.Tensor, values: torch.Tensor, mask=None) -> None:
        mask = torch.ones(operation.shape, dtype=torch.bool) if mask is None else mask
        if mask.any():
            flat, places = self.find(pointers[mask], operation.dtype)
            flat[places] = values[mask]


class Program:
    """One program of a launch."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], memory: Memory):
        self.place, self.grid, self.memory = place, grid, memory
        self.values: dict[str, torch.Tensor] = {}

    def run(self, region: Region, *arguments: torch.Tensor) -> list[torch.Tensor]:
        """What the region yields."""
        self.values.update(zip(region.arguments, arguments, strict=True))
        for operation in region.operations:
            if operation.name in ("scf.yield", "tt.return", "tt.reduce.return"):
                return [self.values[name] for name in operation.operands]
            results = self.compute(operation)
            results = results if isinstance(results, list) else [results]
            self.values.update(zip(operation.results, results, strict=False))
        return []

    def compute(self, operation: Operation) -> Any:
        name = operation.name
        if name == "arith.constant":
            return read_constant(operation)
        if name == "scf.for":
            return self.loop(operation)
        operands = [self.values[operand] for operand in operation.operands]
        if name in ELEMENTWISE:
            return ELEMENTWISE[name](*operands)
        if name in CASTS:
            if operands[0].dtype == torch.bool and name in ("arith.extsi", "arith.sitofp"):
                return -operands[0].to(operation.dtype)
            return operands[0].to(operation.dtype)
        if name in ("arith.cmpi", "arith.cmpf"):
            return COMPARISONS[operation.text.split()[0].strip(",")](*operands)
        if name == "scf.if":
            taken = [
                region for region, here in zip(operation.regions, (operands[0], ~operands[0]), strict=False) if here
            ]
            return self.run(taken[0]) if taken else []
        if name == "tt.reduce":
            axis = int(re.search(r"axis = (\d+)", operation.text)[1])
            parts = operands[0].unbind(axis)
            return functools.reduce(lambda a, b: self.run(operation.regions[0], a, b)[0], parts)
        if name == "tt.load":
            return self.memory.load(operation, *operands)
        if name == "tt.store":
            return self.memory.store(operation, *operands)
        if name == "tt.addptr":
            pointed = read_type(operation.text.rpartition(" : ")[2])[1]
            return operands[0] + operands[1].long() * pointed.itemsize
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            numbers = self.place if name == "tt.get_program_id" else self.grid
            return torch.tensor(numbers["xyz".index(operation.text.split()[0])], dtype=torch.int32)
        if name == "tt.make_range":
            start, end = (int(re.search(rf"{side} = (\d+)", operation.text)[1]) for side in ("start", "end"))
            return torch.arange(start, end, dtype=torch.int32)
        if name in ("tt.splat", "tt.broadcast"):
            return operands[0].expand(operation.shape)
        if name in ("tt.expand_dims", "tt.reshape"):
            return operands[0].reshape(operation.shape)
        if name == "tt.elementwise_inline_asm" and "tanh.approx.f32" in operation.text:
            return torch.tanh(operands[0])
        raise NotImplementedError(f"{name}{operation.text}")

    def loop(self, operation: Operation) -> list[torch.Tensor]:
        bounds = [self.values[name] for name in operation.operands[1:4]]
        carried = [self.values[name] for name in operation.operands[5::2]]
        for i in range(*(bound.item() for bound in bounds)):
            carried = self.run(operation.regions[0], torch.tensor(i, dtype=bounds[0].dtype), *carried)
        return carried


def read_kernel(text: str) -> Region:
    lines = iter([line.strip() for line in text.splitlines()])
    for line in lines:
        if line.startswith("tt.func"):
            return read_operation(line, lines).regions[0]
    raise ValueError("there is no function")


class Processor(Hopper):
    """A driver whose binaries are IR."""

    class utils(Hopper.utils):
        @staticmethod
        def load_binary(name: str, kernel: bytes, *arguments) -> tuple[Any, ...]:
            return 1, read_kernel(kernel.decode()), 128, 0, 1024

    def launcher_cls(self, source, metadata):
        kept = [place for place, kind in enumerate(source.signature.values()) if kind != "constexpr"]

        def run(x, y, z, stream, kernel, packed_metadata, launch_metadata, enter, leave, *arguments):
            arguments = [arguments[place] for place in kept]
            kinds = [kind for kind in source.signature.values() if kind != "constexpr"]
            memory = Memory([argument for argument in arguments if isinstance(argument, torch.Tensor)])
            values = [as_value(argument, kind) for argument, kind in zip(arguments, kinds, strict=True)]
            with _disable_current_modes():  # which watch PyTorch, not what runs on a GPU
                for place in ((i, j, k) for k in range(z) for j in range(y) for i in range(x)):
                    Program(place, (x, y, z), memory).run(kernel, *values)

        return run


def as_value(argument: Any, kind: str) -> torch.Tensor:
    if isinstance(argument, torch.Tensor):
        return torch.tensor(argument.data_ptr())
    if kind.startswith("*"):
        return torch.tensor(argument)
    return torch.tensor(argument, dtype=torch.float32 if kind == "fp32" else DTYPES[kind])


def stop_at_ir(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton's hook for changing the stages of a compilation; without arguments, what to add to the cache's keys."""
    if stages is None:
        return "triton_ir", "triton_ir"
    for stage in list(stages)[1:]:
        del stages[stage]
    stages["cubin"] = finish


def finish(module: Any, metadata: dict[str, Any]) -> bytes:
    metadata["name"], metadata["shared"] = re.search(r"@(\w+)", str(module))[1], 0
    return module.str_nodebug().encode()


triton.knobs.runtime.add_stages_inspection_hook = stop_at_ir
driver.set_active(Processor())
backends._why_no_kernels = lambda device, index: None
