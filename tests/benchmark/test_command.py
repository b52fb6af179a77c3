"""The program as it is called."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_poolformer.benchmark.rows import build
from hf_poolformer.commands import benchmark as command
from hf_poolformer.foundation.errors import UserError


SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"
TINY = ["--variant", "tiny", "--batch_size", "2", "--image_size", "64", "--seconds", "0.1", "--rounds", "1"]


def test_mistakes_at_the_command_line():
    done = subprocess.run([sys.executable, SCRIPT, "infer", "--rows", "ours fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: --rows 'ours fast' fits none of" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([name, "--help"])
    assert stopped.value.code == 0
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", "--seconds", "0"], "--seconds must be positive"),
        (["latency", "--batch_size", "-1"], "--batch_size must be positive"),
        (["infer", "--image_size", "16"], "--image_size must be at least 32"),
        (["infer", "--variant", "resnet50"], "--variant resnet50: it must be one of tiny, poolformer_s12"),
        (["growth", "--variant", "nothing"], "--variant nothing: it must be one of"),
        (["train", "--loop", "--dtype", "float32", "bfloat16"], "--loop takes one --dtype"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert command.main([*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_rows_can_be_listed(capsys):
    assert command.main(["latency", "--list_rows", "--device", "cpu"]) == 0
    assert {"ours fused", "built-in max-autotune NCHW", "OpenVINO"} <= set(capsys.readouterr().out.splitlines())


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert set(command.COMMANDS) <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_selection_of_everything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("hf_poolformer.benchmark.run.SIZES", ((64, 48), (96, 64)))
    prefix = tmp_path / "benchmarks" / "cpu"
    rows = ["ours fused", "built-in eager"]
    status = command.main(["all", *TINY, "--device", "cpu", "--rows", *rows, "--output", str(prefix)])
    assert status == 0
    out = capsys.readouterr().out
    assert "**latency, tiny, bfloat16, batch 1, 64 px**" in out and str(prefix) in out.splitlines()[-1]
    content = json.loads(prefix.with_suffix(".json").read_text())
    cases = [(part["case"]["mode"], part["case"]["dtype"]) for part in content["comparisons"]]
    assert sorted(cases) == [(m, d) for m in ("infer", "latency", "train") for d in ("bfloat16", "float32")]
    assert all(row["status"] == "passed" for part in content["comparisons"] for row in part["results"])
    assert len(content["processing"]) == 2
    assert prefix.with_suffix(".png").stat().st_size > 10_000


def test_a_failed_gate_is_the_exit_status(monkeypatch, tmp_path, capsys):
    def build_wrong(row, case, weights):
        if row.library == "ours":
            weights = {**weights, "norm.weight": weights["norm.weight"] * 1.1}
        return build(row, case, weights)

    monkeypatch.setattr("hf_poolformer.benchmark.comparison.build", build_wrong)
    figures = tmp_path / "figures.json"
    rows = ["--rows", "ours fused", "built-in eager"]
    status = command.main(["infer", *TINY, "--dtype", "float32", "--device", "cpu", *rows, "--json", str(figures)])
    assert status == 1
    assert "Failed:" in capsys.readouterr().out
    results = json.loads(figures.read_text())["comparisons"][0]["results"]
    assert [result["status"] for result in results] == ["failed", "passed"]


def test_growth_stays_within_its_budget(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_poolformer.benchmark.growth.BATCHES", (1, 2))
    arguments = [*TINY, "--device", "cpu", "--dtype", "float32", "--json", str(tmp_path / "growth.json")]
    assert command.main(["growth", *arguments, "--budget", "0.001"]) == 0
    growth = json.loads((tmp_path / "growth.json").read_text())["growth"]
    assert growth["axes"] == {"batch": [], "pixels": [], "model": []} and len(growth["left_out"]) > 10


def test_another_allocator_starts_the_program_again(monkeypatch):
    started = []
    monkeypatch.setattr("os.execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so.2")
    command.use_allocator("system")
    assert not started
    command.use_allocator("jemalloc")
    command.use_allocator("keep")
    assert started[0][2]["LD_PRELOAD"] == "libjemalloc.so.2"
    assert int(started[1][2]["MALLOC_TRIM_THRESHOLD_"]) > 2**30
    monkeypatch.setenv("HF_POOLFORMER_ALLOCATOR", "keep")
    command.use_allocator("keep")
    assert len(started) == 2
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(UserError, match="apt install libjemalloc2"):
        command.use_allocator("jemalloc")
