"""The table of exports: ratios, targets, and a gate that keeps wrong rows out of the timing."""

import json

import pytest
import torch

from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.exporters import EXPORTERS, Exporters
from hf_poolformer.benchmark.exports import ExportResult, Exports, gate_error
from hf_poolformer.benchmark.report import Report, targets
from hf_poolformer.benchmark.rows import Unavailable
from hf_poolformer.commands.benchmark import main
from hf_poolformer.foundation.timing import Deadline


@pytest.fixture
def report() -> Report:
    rows = [
        ExportResult("OpenVINO float32", 1e-6, seconds=0.3, spread=0.01),
        ExportResult("export openvino float32", 1e-6, size=47_000_000, seconds=0.25, spread=0.02),
        ExportResult("export openvino int8", 0.4, "failed", "off by 4e-01, allowed 2e-01", size=12_000_000),
    ]
    report = Report("python scripts/benchmark.py export", "cpu", Deadline(None))
    report.exports = [Exports(Case("infer"), rows)]
    return report


def test_targets_are_ratios_of_speed(report):
    (reached,) = targets(report)
    assert "batch 16" in reached["case"] and "export openvino float32" in reached["case"]
    assert reached["reached"] == pytest.approx(1.2) and reached["ok"]


def test_a_failed_row_is_shown_and_not_timed(report):
    text, figures = report.to_markdown(), report.to_dict()
    assert "64.0" in text and "12.0 MB" in text and "failed" in text
    (failure,) = report.failures()
    assert failure == "poolformer_s12, batch 16, 224 px: export openvino int8: off by 4e-01, allowed 2e-01"
    assert json.loads(json.dumps(figures))["exports"][0]["results"][2]["seconds"] is None


def test_errors():
    right = torch.tensor([[3.0, -4.0]])
    assert gate_error(right + torch.tensor([[0.0, 0.4]]), right, "float32") == pytest.approx(0.1)
    assert gate_error(right + torch.tensor([[0.0, 0.5]]), right, "int8") == pytest.approx(0.1)


def test_exporters_that_are_missing_are_rows_too(tmp_path, monkeypatch):
    """A library that is not there, and an exporter that fails, end no run: the row says why."""
    case = Case("infer", "tiny", batch_size=2, image_size=64)
    images = torch.zeros(2, 3, 64, 64)
    rows = Exporters(case, {}, images, tmp_path).rows(images)
    assert [row.name for row in rows][:2] == ["transformers onnx float32, built-in", "transformers onnx float32, ours"]
    with pytest.raises(Unavailable, match="Missing key"):  # there are no weights
        rows[0].prepare()
    monkeypatch.setitem(EXPORTERS, "onnx", EXPORTERS["onnx"]._replace(library="no_such_library"))
    with pytest.raises(Unavailable, match="no_such_library is not installed"):
        rows[0].prepare()
    other = Exporters(case.change(variant="caformer_s18"), {}, images, tmp_path).rows(images)
    assert not any("built-in" in row.name for row in other)


@pytest.mark.slow
def test_dry_run(tmp_path):
    small = ["--variant", "tiny", "--image_size", "64", "--batch_size", "4", "--seconds", "1", "--rounds", "2"]
    assert main(["export", *small, "--output", str(tmp_path / "export")]) == 0
    figures = json.loads((tmp_path / "export.json").read_text())
    tables = {part["case"]["batch_size"]: part["results"] for part in figures["exports"]}
    for rows in tables.values():
        assert {row["status"] for row in rows} <= {"passed", "skipped"}
        skipped = {row["name"]: row["note"] for row in rows if row["status"] == "skipped"}
        # Of random weights and four images, their int8 may be too far off to be timed.
        assert skipped.pop("transformers openvino int8, ours", "off by").startswith("off by")
        # ExecuTorch, which `dev` leaves out.
        assert all("not installed" in note for note in skipped.values())
    names = [row["name"] for row in tables[1]]
    assert {"export executorch float32", "export executorch int8", "export onnx int8"} <= set(names)
    assert len(names) == 19 and len(tables[4]) == 22
    assert {"transformers onnx float32, ours", "transformers openvino float32, built-in"} <= {
        row["name"] for row in tables[1] if row["seconds"]
    }
