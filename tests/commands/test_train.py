"""`hf-poolformer train` in processes of its own: several at once, and stopped in the middle."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def flags(things, folder):
    words = ["--recipe", "demo", "--model_name_or_path", things.model, "--train_dir", things.photos]
    words += ["--train_val_split", 0.25, "--per_device_train_batch_size", 4, "--output_dir", folder]
    return [*map(str, words), "--num_workers", "0"]


@pytest.mark.slow
def test_accelerate_launches_the_package(things, tmp_path):
    """Two processes train and evaluate; `-m hf_poolformer` stands for a script."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--cpu"]
    launch += ["--num_processes", "2", "--main_process_port", "0", "-m", "hf_poolformer"]
    done = subprocess.run(
        [*launch, "train", *flags(things, tmp_path / "run"), "--max_train_steps", "4"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("Reading: ") == 1 and " of each of 2 processes, which read" in done.stdout
    trained = json.loads((tmp_path / "run" / "all_results.json").read_text())
    done = subprocess.run(
        [*launch, "evaluate", tmp_path / "run", "--dataset_name", things.photos, "--json"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    evaluated = json.loads(done.stdout[done.stdout.index("{") :])
    assert evaluated["eval_samples"] == trained["eval_samples"]


@pytest.mark.slow
def test_sigterm_saves_and_the_printed_command_goes_on(things, tmp_path):
    command = [sys.executable, "-m", "hf_poolformer", "train", *flags(things, tmp_path / "run")]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "--num_train_epochs", "5000", "--checkpointing_steps", "no"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
        log, end = tmp_path / "run" / "training_log.jsonl", time.monotonic() + 120
        while not (log.is_file() and log.read_text().count("\n") > 1):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "out").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    text = (tmp_path / "out").read_text()
    step = int(re.search(r"saved at step (\d+) of", text)[1])
    printed = shlex.split(re.search(r"\n  (accelerate launch .*)", text)[1])
    assert printed[:5] == ["accelerate", "launch", "-m", "hf_poolformer", "train"]
    again = [sys.executable, "-m", "hf_poolformer", *printed[4:], "--max_train_steps", str(step + 2)]
    done = subprocess.run(again, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["step"] == step + 2
