"""The scripts as people run them: in processes of their own, through accelerate."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import warm_python

from hf_poolformer.evaluation.classification import evaluate_checkpoint
from hf_poolformer.evaluation.settings import EvaluationSettings


ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ACCELERATE = ["launch", "--quiet", "--cpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture
def flags(make_settings, tmp_path):
    """Flags of a small run: those of `make_settings`, from its own YAML file."""
    make_settings().save(tmp_path / "settings.yaml")
    return ["--config_file", str(tmp_path / "settings.yaml")]


def command_of(script, *arguments, launcher=None):
    """Without a launcher: of one process, through accelerate or torchrun of two."""
    words = {
        None: [warm_python()],
        # Its own command line is read by what it starts.
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli", *ACCELERATE],
        "torchrun": [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    return [*words[launcher], str(ROOT / "scripts" / script), *map(str, arguments)]


def environment():
    # torchrun's processes are those.
    return {**ENVIRONMENT, "PYTHON_EXEC": warm_python(), "ACCELERATE_USE_CPU": "1"}


def run(script, *arguments, launcher=None, where=ROOT):
    command = command_of(script, *arguments, launcher=launcher)
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, cwd=where)


def test_two_processes_train_and_evaluate_exactly(flags, digits, tmp_path):
    done = run("train.py", *flags, "--num_train_epochs", 3, launcher="accelerate")
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    trained = json.loads((tmp_path / "run/all_results.json").read_text())
    assert trained["eval_samples"] == 75 and trained["epoch"] == 3
    output = tmp_path / "evaluated"
    where = ["--dataset_name", digits, "--split", "test", "--per_device_eval_batch_size", 16, "--output_dir", output]
    done = run("evaluate.py", tmp_path / "run", *where, launcher="torchrun")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("75 images") == 1
    assert (output / "confusion_matrix.png").is_file()
    two = json.loads((output / "all_results.json").read_text())
    settings = EvaluationSettings(dataset_name=str(digits), split="test", num_workers=0)
    settings.model = str(tmp_path / "run")
    one = evaluate_checkpoint(settings)
    for name in ("eval_accuracy", "eval_top5_accuracy", "eval_samples", "eval_per_class_accuracy", "eval_f1_macro"):
        assert one[name] == two[name] == trained[name], name
    for name in ("eval_loss", "eval_auroc", "eval_calibration_error"):
        assert one[name] == pytest.approx(two[name], rel=1e-5), name
        # Batches of another size round the answers, and so the order of images that are drawn, differently.
        bounds = (results["eval_confidence_intervals"][name] for results in (one, two))
        assert next(bounds) == pytest.approx(next(bounds), rel=0.05), name


@pytest.mark.parametrize("launcher", [None, pytest.param("accelerate", marks=pytest.mark.slow)])
def test_sigterm_saves_and_the_printed_command_goes_on(flags, tmp_path, launcher):
    endless = ["--num_train_epochs", "500", "--checkpointing_steps", "no"]
    command = command_of("train.py", *flags, *endless, launcher=launcher)
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT)
        log = tmp_path / "run/training_log.jsonl"
        wait_for(lambda: log.is_file() and log.read_text().count("\n") > 2, process)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        # The launcher may be gone before the processes it left have saved.
        wait_for(lambda: "To go on:" in (tmp_path / "out").read_text())
    text = (tmp_path / "out").read_text()
    stopped = re.search(r"saved at step (\d+) of", text)
    assert stopped, text
    if launcher is None:
        assert code == 143
    assert code != 0
    step = int(stopped.group(1))
    assert (tmp_path / f"run/checkpoints/step-{step}/complete.json").is_file()
    printed = re.search(r"\n  accelerate launch (.*)", text).group(1).split()
    again = printed[printed.index(next(word for word in printed if word.endswith("train.py"))) + 1 :]
    # Also on another number of processes than before.
    done = run("train.py", *again, "--max_train_steps", step + 3)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/all_results.json").read_text())["step"] == step + 3
    assert f"step {step}," in done.stdout


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the run ended early"
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["--train_dir", "/nowhere", "--output_dir", "unused", "--recipe", "demo"], "nowhere"),
        ("evaluate.py", ["/nowhere", "--dataset_name", "/nowhere/either"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(script, arguments, message, tmp_path):
    done = run(script, *arguments, where=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_push_that_fails_keeps_the_model_and_says_how_to_retry(flags, tmp_path):
    push = ["--push_to_hub", "true", "--hub_model_id", "someone/digits", "--hub_token", "hf_secretsecret"]
    done = run("train.py", *flags, "--max_train_steps", 1, *push)
    assert done.returncode == 3
    assert "publish.py" in done.stderr and "--repo_id someone/digits" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run/model.safetensors").is_file()
    written = "".join(path.read_text() for path in (tmp_path / "run").iterdir() if path.suffix in (".yaml", ".md"))
    assert "hf_secretsecret" not in written + done.stderr + done.stdout
