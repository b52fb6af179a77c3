"""The notebook, from top to bottom, without a network."""

import re
from pathlib import Path

import pytest


NOTEBOOK = Path(__file__).parents[2] / "examples" / "finetune.ipynb"


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat")
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_what_is_committed_is_small_and_tells_nothing_of_a_machine(notebook):
    assert NOTEBOOK.stat().st_size < 300_000
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    kinds = [output.output_type for output in outputs(notebook)]
    assert kinds and "error" not in kinds
    assert not [output for output in outputs(notebook) if output.output_type == "stream" and output.name == "stderr"]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom"


@pytest.mark.slow
def test_it_runs_and_learns(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = "".join(output.text for output in outputs(notebook) if output.output_type == "stream")
    measured = float(re.search(r"^accuracy (0\.\d+|1\.000) on", printed, re.MULTILINE)[1])
    assert measured >= 0.95
    assert f"{measured:.1%} of" in printed, "measured again it is the same"
    assert "library_name" in printed and "1 error" not in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 3
