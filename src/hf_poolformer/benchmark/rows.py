"""The contestants: one model, the same weights, in every implementation and every way of running it.

A row's name says all: library, how it runs, and NCHW where weights and images are not channels_last (NHWC).

    ours       auto (as one gets it), reference (HF_POOLFORMER_KERNELS=reference) or fused (=cpu on a CPU, =triton on a
               GPU), each also under torch.compile, or captured as a CUDA graph
    built-in   the PoolFormer of transformers: eager, torch.compile in its modes, CUDA graph
    timm       the same of timm
    onnxruntime, OpenVINO   the built-in model, exported to ONNX; CPU, inference
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.models.poolformer.configuration_poolformer import PoolFormerConfig as BuiltInConfig
from transformers.models.poolformer.modeling_poolformer import PoolFormerForImageClassification as BuiltIn

from hf_poolformer import MetaFormerConfig
from hf_poolformer.backends import VARIABLE
from hf_poolformer.conversion.key_maps import TIMM
from hf_poolformer.export.folder import Manifest
from hf_poolformer.export.formats import FORMATS
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.graphs import Recording

from .case import DTYPES, Case


Weights = dict[str, torch.Tensor]
PYTORCH = ("ours", "built-in", "timm")
# And the format of exports that each of them runs.
RUNTIMES = {"onnxruntime": "onnx", "OpenVINO": "openvino"}
# What computes the fused operations on a device, as HF_POOLFORMER_KERNELS names it.
BACKENDS = {"cpu": "cpu", "cuda": "triton"}
COMPILE_MODES = ("compile", "reduce-overhead", "max-autotune", "frozen")


class Unavailable(UserError):
    """This contestant cannot run here, and the message says why; the others can."""


@dataclass(frozen=True)
class Entry:
    """
    One contestant.

    Attributes:
        library: one of PYTORCH or RUNTIMES.
        how: "eager" or one of COMPILE_MODES, of which "frozen" is Inductor's option `freezing`, that takes the weights
            for constants; or "graph" for a CUDA graph.
        operations: "auto", "reference" or "fused"; of ours only.
        channels_last: memory format of weights and images.
    """

    library: str
    how: str = "eager"
    operations: str | None = None
    channels_last: bool = True

    @property
    def name(self) -> str:
        if self.library in RUNTIMES:
            return self.library
        words = [self.library, *([self.operations] if self.operations else [])]
        if self.how != "eager" or not self.operations:
            words.append(self.how)
        return " ".join(words) + ("" if self.channels_last else " NCHW")

    @property
    def compiled(self) -> bool:
        return self.how in COMPILE_MODES

    @property
    def is_peer(self) -> bool:
        """Whether it is what a user of PyTorch could pick instead of ours."""
        return self.library in ("built-in", "timm")


def all_rows(case: Case) -> list[Entry]:
    """Every row that makes sense for the case."""
    on_gpu = case.device != "cpu"
    ways = ["eager", "compile", "max-autotune"] + ["frozen"] * (case.mode != "train")
    if on_gpu and case.mode == "latency":
        ways += ["reduce-overhead", "graph"]
    rows = [Entry("ours", how, operations) for operations in ("reference", "fused", "auto") for how in ways]
    rows += [Entry(library, how) for library in PYTORCH[1:] for how in ways if library == "timm" or case.is_poolformer]
    rows += [replace(row, channels_last=False) for row in rows if row.how != "graph"]
    if not on_gpu and case.mode != "train" and case.is_poolformer:
        rows += [Entry("onnxruntime")] * (case.dtype == "float32") + [Entry("OpenVINO")] * (case.dtype != "float16")
    return rows


# What is informative, and fits into the ten minutes of `make benchmark` and the eight of `make gpu`: compilation is
# what costs. Left out are rows that never were the fastest of their library.
OURS = ("ours reference", "ours fused", "ours fused compile")
BUILT_IN = ("built-in eager NCHW", "built-in eager", "built-in compile")
TIMM_ROWS = ("timm eager", "timm compile")
DEFAULT_ROWS = {
    ("cpu", "infer"): (*OURS, *BUILT_IN, "built-in max-autotune", "built-in frozen", *TIMM_ROWS, *RUNTIMES),
    ("cpu", "latency"): (*OURS, *BUILT_IN, "timm eager", *RUNTIMES),
    ("cpu", "train"): (*OURS, *BUILT_IN, "timm eager"),
    ("cuda", "infer"): ("ours auto NCHW", *OURS, *BUILT_IN, "timm compile"),
    ("cuda", "latency"): (
        "ours auto NCHW",
        "ours fused",
        "ours fused graph",
        "built-in eager NCHW",
        "built-in graph",
        "timm eager",
        "timm graph",
    ),
    ("cuda", "train"): ("ours auto NCHW", "ours fused", "built-in eager NCHW", "built-in compile"),
}
# Of other models and sizes than the first case on a GPU: what is as one gets it, ours, and the best peer.
FEW_ROWS = ("ours auto NCHW", "ours fused", "built-in eager NCHW", "timm compile")

# The same graph was compiled and tuned in float32; it gains nothing in either.
LEFT_OUT = {("cpu", "infer", "bfloat16"): ("built-in max-autotune",)}


def choose_rows(case: Case, patterns: Sequence[str]) -> list[Entry]:
    """Rows by name; "default", "all" and shell patterns ("ours*", "*compile") stand for several.

    Raises:
        UserError: a pattern that fits no row of this case, neither here nor in another mode.
    """
    rows = {row.name: row for row in all_rows(case)}
    chosen: dict[str, Entry] = {}
    for pattern in patterns:
        if pattern == "all":
            names = list(rows)
        elif pattern == "default":
            left_out = LEFT_OUT.get((case.device, case.mode, case.dtype), ())
            few = case.device != "cpu" and (case.variant not in ("tiny", "poolformer_s12") or case.image_size > 224)
            names = FEW_ROWS if few else DEFAULT_ROWS[case.device, case.mode]
            names = [name for name in names if name in rows and name not in left_out]
        else:
            names = fnmatch.filter(rows, pattern)
            if not names and pattern not in RUNTIMES:
                raise UserError(f"--rows {pattern!r} fits none of: {', '.join(rows)}.")
        chosen |= {name: rows[name] for name in names}
    return list(chosen.values())


def make_weights(config: MetaFormerConfig) -> Weights:
    """Weights under which every part of the model matters: a fresh one's layer scales would hide all branches."""
    model = AutoModelForImageClassification.from_config(config)
    generator = torch.Generator().manual_seed(0)

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    weights = {}
    for name, value in model.state_dict().items():
        if value.ndim > 1:
            weights[name] = normal(value.shape, value[0].numel() ** -0.5)
        elif "scale" in name:  # of layers, shortcuts and activations; the latter two are 1 or so
            weights[name] = torch.rand(value.shape, generator=generator) * 0.5 + (0.1 if "layer" in name else 0.75)
        else:
            weights[name] = normal(value.shape, 0.2) + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


class Contestant:
    """
    A row, built for a case.

    `prepare(images)` brings images (B, 3, H, W) into the form it wants, which is not timed; calling it with that gives
    logits (B, labels), a tensor or an array. `module` holds the weights, None for a runtime, and `our_name` maps the
    names of its parameters to ours.
    """

    def __init__(
        self,
        row: Entry,
        forward: Callable[[Any], Any],
        prepare: Callable[[torch.Tensor], Any],
        module: nn.Module | None = None,
        our_name: Callable[[str], str] = str,
        backend: str | None = None,
        is_poolformer: bool = True,
    ):
        self.row = row
        self.is_poolformer = is_poolformer
        self.backend = backend
        self.module = module
        self.prepare = prepare
        self.our_name = our_name
        self._forward = forward

    def __call__(self, images: Any) -> Any:
        with kernels(self.backend):
            return self._forward(images)

    @property
    def pools_first(self) -> bool:
        """timm's PoolFormer averages over the positions before its last norm: another function than the authors'."""
        return self.row.library == "timm" and self.is_poolformer

    def named_gradients(self) -> dict[str, torch.Tensor]:
        return {self.our_name(name): parameter.grad for name, parameter in self.module.named_parameters()}


@contextlib.contextmanager
def kernels(backend: str | None) -> Iterator[None]:
    """Inside, our operations are computed by this backend; None leaves the choice as it is."""
    if backend is None:
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def build(row: Entry, case: Case, weights: Weights) -> Contestant:
    """
    The contestant with these weights, on the case's device and in its precision; compilation waits for the first call.

    Raises:
        Unavailable: a library is missing.
    """
    if row.library in RUNTIMES:
        return _runtime(row, case, weights)
    module, our_name = (
        _timm(case, weights) if row.library == "timm" else (transformers_model(row.library, case, weights), str)
    )
    layout = torch.channels_last if row.channels_last else torch.contiguous_format
    module.to(case.device, DTYPES[case.dtype], memory_format=layout)
    module.train(case.mode == "train")
    forward = _isolated(module)
    if row.compiled:
        if row.how == "frozen":
            forward = torch.compile(forward, options={"freezing": True}, dynamic=False)
        else:
            forward = torch.compile(forward, mode=None if row.how == "compile" else row.how, dynamic=False)
    elif row.how == "graph":
        forward = _as_graph(forward)
    return Contestant(
        row,
        forward,
        lambda images: images.contiguous(memory_format=layout),
        module,
        our_name,
        backend=BACKENDS[case.device] if row.operations == "fused" else row.operations,
        is_poolformer=case.is_poolformer,
    )


def _isolated(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits of a module, through code of its own: torch.compile keeps what it compiled with the code, and would
    otherwise give one row the other's."""

    def forward(images: torch.Tensor) -> torch.Tensor:
        output = module(images)
        return output if isinstance(output, torch.Tensor) else output.logits

    forward.__code__ = forward.__code__.replace(co_name=f"forward_{id(module)}")
    return forward


def _as_graph(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward, recorded in its first call, and then replayed, the copy of its input included."""
    recordings: list[Recording] = []

    def replay(images: torch.Tensor) -> torch.Tensor:
        if not recordings:
            recordings.append(Recording(forward, images))
        return recordings[0](images)

    return replay


def transformers_model(library: str, case: Case, weights: Weights) -> nn.Module:
    """Our model ("ours") or the one of transformers ("built-in"), in float32 on the CPU."""
    config = case.config()
    if library == "ours":
        model: nn.Module = AutoModelForImageClassification.from_config(config)
    else:
        model = BuiltIn(BuiltInConfig.from_dict(config.to_dict()))
    model.load_state_dict(weights)
    return model


def _timm(case: Case, weights: Weights) -> tuple[nn.Module, Callable[[str], str]]:
    """timm's model of the same name; of PoolFormers, the arguments are those of its own factories."""
    try:
        from timm.models import create_model
        from timm.models.metaformer import GroupNorm1, MetaFormer
    except ImportError as error:
        raise Unavailable("timm missing: pip install 'hf-poolformer[benchmark]'") from error

    config = case.config()
    if case.is_poolformer:
        model = MetaFormer(
            num_classes=config.num_labels,
            depths=tuple(config.depths),
            dims=tuple(config.hidden_sizes),
            downsample_norm=None,
            mlp_act=nn.GELU,
            mlp_bias=True,
            norm_layers=GroupNorm1,
            layer_scale_init_values=config.layer_scale_init_value,
            res_scale_init_values=None,
            use_mlp_head=False,
        )
    else:
        try:
            model = create_model(case.variant, num_classes=config.num_labels)
        except RuntimeError as error:
            raise Unavailable(f"timm has no {case.variant}") from error
    bare = {re.sub("^(poolformer|metaformer)[.]", "", name): name for name in weights}
    theirs = TIMM.to_theirs(bare, config.position_embeddings)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    # Where they have a matrix, we may have a 1x1 convolution.
    model.load_state_dict({theirs[ours]: weights[name].reshape(shapes[theirs[ours]]) for ours, name in bare.items()})
    return model, {theirs[ours]: name for ours, name in bare.items()}.__getitem__


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


@functools.cache
def _export_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="hf-poolformer-benchmark-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _exported(case: Case, weights: Weights) -> Path:
    """The built-in model as ONNX, opset 21, which has GroupNormalization; one file for all batch sizes."""
    path = _export_folder() / f"{case.variant}-{case.image_size}.onnx"
    if not path.exists():
        model = _Logits(transformers_model("built-in", case, weights)).eval()
        example = torch.zeros(2, 3, case.image_size, case.image_size)
        FORMATS["onnx"].write(model, example, path, export_manifest(case, "onnx"))
    return path


def export_manifest(case: Case, format: str, precision: str = "float32") -> Manifest:
    """Of a graph for any number of the case's images."""
    return Manifest(
        format=format,
        precision=precision,
        task="image-classification",
        file=FORMATS[format].file,
        preprocessing=False,
        input="pixel_values",
        output="logits",
        image_size=[case.image_size] * 2,
        dynamic_size=False,
    )


def _runtime(row: Entry, case: Case, weights: Weights) -> Contestant:
    """The built-in model in the runtime of an export format, whole batches at a time."""
    format = FORMATS[RUNTIMES[row.library]]
    try:
        format.check_installed(case.dtype)
    except UserError as error:
        raise Unavailable(str(error)) from error
    manifest = export_manifest(case, format.name, case.dtype)
    arguments = _exported(case, weights), manifest, torch.get_num_threads()
    run = format.open_whole(*arguments) or format.open(*arguments)
    return Contestant(row, run, lambda images: images.float().contiguous())
