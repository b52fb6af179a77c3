"""Exports of this package next to those of transformers and to OpenVINO and onnxruntime of the built-in model.

All rows are timed in one run, in turns. Each export is timed as `hf_poolformer.export.load` runs it; those of OpenVINO
also as a graph alone, in the settings of the peer, which shows what is the graph's merit and what is that of running
small pieces of a batch on two streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_poolformer.export.deployable import Deployable, write_graph
from hf_poolformer.export.folder import folder_size
from hf_poolformer.export.formats import FORMATS
from hf_poolformer.export.graph import fold
from hf_poolformer.export.images import sample_photographs
from hf_poolformer.export.quantisation import Quality, quantise
from hf_poolformer.export.runtime import Graph
from hf_poolformer.image_processing_poolformer import PoolFormerImageProcessor

from ..foundation.errors import UserError
from ..foundation.timing import Deadline, take_turns
from . import gate
from .case import Case
from .exporters import Exporters
from .rows import Entry, Unavailable, Weights, build, export_manifest, make_weights, transformers_model


# Images that int8 is calibrated on; the weights are random, so that more would not be better.
CALIBRATION = 24
PEERS = (("OpenVINO", "float32"), ("OpenVINO", "bfloat16"), ("onnxruntime", "float32"))
EXPORTS = (
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
    ("onnx", "float32"),
    ("onnx", "int8"),
)
# With libraries that not everybody has.
PHONES = (("executorch", "float32"), ("executorch", "int8"))
# The largest difference relative to the largest logit; of int8 the root of the mean squares relative to theirs.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 0.25}


@dataclass
class ExportResult:
    """`error` is as TOLERANCES says; `size` is bytes of the folder; `seconds` of one batch, the median."""

    name: str
    error: float | None = None
    status: str = "passed"
    note: str = ""
    size: int | None = None
    seconds: float | None = None
    spread: float | None = None


@dataclass
class Exports:
    """Results for one number of images."""

    case: Case
    results: list[ExportResult]

    @property
    def title(self) -> str:
        return f"{self.case.variant}, batch {self.case.batch_size}, {self.case.image_size} px"


def measure_exports(base: Case, folder: Path, deadline: Deadline, seconds: float, rounds: int) -> list[Exports]:
    """
    Rows for a batch of `base.batch_size` and of one image.

    Args:
        folder: an empty one, for the exports.
        seconds: of timing, per batch size.

    Raises:
        UserError: a library is missing.
    """
    for name, precision in EXPORTS:
        FORMATS[name].check_installed(precision)
    weights = make_weights(base.config())
    square = {"height": base.image_size, "width": base.image_size}
    processor = PoolFormerImageProcessor(size={"shortest_edge": base.image_size}, crop_size=square)
    pixel_values = sample_photographs(processor, max(CALIBRATION, base.batch_size)).pixel_values
    paths = write_exports(base, weights, pixel_values[:CALIBRATION], folder)
    exporters = Exporters(base, weights, pixel_values[:CALIBRATION], folder)
    cases = [base.change(batch_size=batch_size) for batch_size in dict.fromkeys((base.batch_size, 1))]
    return [
        Exports(
            case, compare(case, weights, pixel_values[: case.batch_size], paths, exporters, deadline, seconds, rounds)
        )
        for case in cases
    ]


def write_exports(
    case: Case, weights: Weights, calibration: torch.Tensor, folder: Path
) -> dict[tuple[str, str], Path]:
    """The graphs, by format and precision."""
    module = Deployable(fold(transformers_model("ours", case, weights)), torch.float32)
    original = write_graph(module, folder, export_manifest(case, "onnx"))
    paths = {}
    phones = [(name, precision) for name, precision in PHONES if not missing(name, precision)]
    for name, precision in tqdm([*EXPORTS, *phones], desc="exports", leave=False):
        format = FORMATS[name]
        path = folder / f"{name}-{precision}" / format.file
        path.parent.mkdir()
        if format.by_way_of_onnx:
            format.write_from_onnx(original, path, precision)
        else:
            write_graph(module, path.parent, export_manifest(case, name, precision))
        if precision == "int8":
            # Of random weights the best class means nothing: the first attempt is taken, and the gate judges it.
            quantise(format, path, calibration.numpy(), lambda graph: Quality(1.0, 0.0, True), attention=False)
        paths[name, precision] = path
    return paths


def compare(
    case: Case,
    weights: Weights,
    pixel_values: torch.Tensor,
    paths: dict[tuple[str, str], Path],
    exporters: Exporters,
    deadline: Deadline,
    seconds: float,
    rounds: int,
) -> list[ExportResult]:
    """A row for each peer, each of our exports and each of transformers', all that passed the gate timed."""
    labels = torch.zeros(len(pixel_values), dtype=torch.long)
    right = gate.standard(case, weights, pixel_values, labels, pools_first=False).logits
    rows: list[ExportResult] = []
    steps: dict[str, Callable[[], Any]] = {}

    def skip(name: str, note: str = "no time left in the budget") -> None:
        rows.append(ExportResult(name, status="skipped", note=note))

    def admit(name: str, precision: str, size: int | None, step: Callable[[], Any]) -> None:
        if deadline.left <= 0:
            skip(name)
            return
        row = ExportResult(name, gate_error(torch.as_tensor(step()), right, precision), size=size)
        if row.error <= TOLERANCES[precision]:  # which NaN is not
            steps[name] = step
        else:
            row.status, row.note = "failed", f"off by {row.error:.0e}, allowed {TOLERANCES[precision]:.0e}"
        rows.append(row)

    for library, precision in PEERS if case.is_poolformer else ():
        contestant = build(Entry(library), case.change(dtype=precision), weights)
        batch = contestant.prepare(pixel_values)
        admit(f"{library} {precision}", precision, None, lambda contestant=contestant, batch=batch: contestant(batch))
    for (name, precision), path in paths.items():
        manifest = export_manifest(case, name, precision)
        run = Graph(path, manifest)
        admit(f"export {name} {precision}", precision, folder_size(path.parent), lambda run=run: run(pixel_values))
        alone = FORMATS[name].open_whole(path, manifest, torch.get_num_threads()) if len(pixel_values) > 1 else None
        if alone is not None:
            admit(f"export {name} {precision}, the graph alone", precision, None, lambda run=alone: run(pixel_values))
    for name, precision, prepare in tqdm(exporters.rows(pixel_values), desc="transformers' exporters", leave=False):
        if deadline.left <= 0:
            skip(name)
            continue
        try:
            step, size = prepare()
            admit(name, precision, size, step)
        except Unavailable as error:
            skip(name, str(error))
        if precision == "int8" and rows[-1].status == "failed":
            # Nobody looks at what their quantiser leaves of the answers: no fault of a run.
            rows[-1].status = "skipped"
    for name, precision in PHONES:
        if (name, precision) not in paths:
            note = missing(name, precision) or "not written"
            rows.append(ExportResult(f"export {name} {precision}", status="skipped", note=note))
    timings = take_turns(
        steps, device="cpu", rounds=rounds, seconds=min(seconds, max(deadline.left, 0.0)), turn=0.3, label=case.title
    )
    for row in rows:
        if row.name in timings:
            row.seconds, row.spread = timings[row.name].median, timings[row.name].spread
    return rows


def missing(name: str, precision: str) -> str:
    """What a format needs and is not installed, in one line."""
    try:
        FORMATS[name].check_installed(precision)
    except UserError as error:
        return str(error)
    return ""


def gate_error(got: torch.Tensor, right: torch.Tensor, precision: str) -> float:
    if precision == "int8":
        return ((got - right).square().mean().sqrt() / right.square().mean().sqrt()).item()
    return gate.logits_error(got, right)
