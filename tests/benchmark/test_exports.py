"""The table of exports: ratios, targets, and a gate that keeps wrong rows out of the timing."""

import json

import pytest
import torch

from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.exports import ExportResult, failures, gate_error, render, targets
from hf_poolformer.benchmark.report import Report
from hf_poolformer.benchmark.timing import Deadline
from hf_poolformer.commands.benchmark import main


def tables() -> dict[int, list[ExportResult]]:
    rows = [
        ExportResult("OpenVINO float32", 1e-6, seconds=0.3, spread=0.01),
        ExportResult("export openvino float32", 1e-6, size=47_000_000, seconds=0.25, spread=0.02),
        ExportResult("export openvino int8", 0.4, status="failed, allowed 2e-01", size=12_000_000),
    ]
    return {16: rows}


def test_targets_are_ratios_of_speed():
    (reached,) = targets(tables())
    assert (reached["row"], reached["batch"]) == ("export openvino float32", 16)
    assert reached["got"] == pytest.approx(1.2)


def test_a_failed_row_is_shown_and_not_timed():
    report = Report("python scripts/benchmark.py export", "cpu", Deadline(None))
    text, figures = render(report, Case("infer"), tables())
    assert "64.0" in text and "12.0 MB" in text and "failed" in text
    assert failures(tables()) == ["batch 16: export openvino int8: failed, allowed 2e-01"]
    assert json.loads(json.dumps(figures))["rows"]["16"][2]["seconds"] is None


def test_errors():
    right = torch.tensor([[3.0, -4.0]])
    assert gate_error(right + torch.tensor([[0.0, 0.4]]), right, "float32") == pytest.approx(0.1)
    assert gate_error(right + torch.tensor([[0.0, 0.5]]), right, "int8") == pytest.approx(0.1)


@pytest.mark.slow
def test_dry_run(tmp_path):
    small = ["--variant", "tiny", "--image_size", "64", "--batch_size", "4", "--seconds", "1", "--rounds", "2"]
    assert main(["export", *small, "--output", str(tmp_path / "export")]) == 0
    figures = json.loads((tmp_path / "export.json").read_text())
    assert {row["status"] for rows in figures["rows"].values() for row in rows} == {"passed"}
    assert len(figures["rows"]["4"]) == 11 and len(figures["rows"]["1"]) == 8
