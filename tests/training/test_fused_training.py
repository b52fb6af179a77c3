"""Training with the block's fused operations and with plain PyTorch: the same run, but for rounding."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import losses

from hf_poolformer import backends
from hf_poolformer.training.loop import train


ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
LAUNCH += ["--num_processes", "1", "--mixed_precision", "bf16"]
NO_KERNELS = backends.why_not_cpu(torch.zeros(1, 8, 4, 4))


@pytest.fixture
def train_with(monkeypatch, tmp_path):
    """Trains with the blocks computed by one backend, and sees to it that they are."""

    def run(backend, settings):
        used = set()
        decide = backends.decide

        def noted(*args):
            decision = decide(*args)
            used.add(decision.backend)
            return decision

        with monkeypatch.context() as patch:
            patch.setenv(backends.VARIABLE, backend)
            patch.setattr(backends, "decide", noted)
            folder = tmp_path / backend
            results = train(dataclasses.replace(settings, output_dir=str(folder)))
        assert used == {backend}
        rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
        return results, np.array([row["loss"] for row in rows if "loss" in row])

    return run


@pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
def test_a_few_steps_on_the_cpu(train_with, make_settings):
    settings = make_settings(max_train_steps=8, logging_steps=1, drop_path_rate=0.1, checkpointing_steps="no")
    _, reference = train_with("reference", settings)
    _, fused = train_with("cpu", settings)
    assert len(fused) == 8
    # float32 rounds otherwise when it is fused, 1e-7 relative, and each step carries it on.
    np.testing.assert_allclose(fused, reference, rtol=1e-4)


@pytest.mark.gpu
def test_a_few_steps_of_triton(train_with, make_settings):
    """On a GPU; in Triton's interpreter a step takes minutes."""
    settings = make_settings(max_train_steps=8, logging_steps=1, drop_path_rate=0.1, checkpointing_steps="no")
    _, reference = train_with("reference", settings)
    _, fused = train_with("triton", settings)
    np.testing.assert_allclose(fused, reference, rtol=1e-3)


@pytest.fixture
def start(tmp_path):
    """Starts scripts/train.py through accelerate with the blocks computed by one backend; whoever is left is ended."""
    processes = []

    def run(backend, settings, name=None, *flags):
        folder, file = tmp_path / (name or backend), tmp_path / f"{name or backend}.yaml"
        dataclasses.replace(settings, output_dir=str(folder)).save(file)
        environment = os.environ | {backends.VARIABLE: backend, "HF_HUB_OFFLINE": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [*LAUNCH, str(ROOT / "scripts/train.py"), "--config_file", str(file), *flags]
        with (tmp_path / f"{name or backend}.txt").open("a") as out:
            given = {"stdout": out, "stderr": subprocess.STDOUT, "env": environment, "cwd": ROOT}
            processes.append(subprocess.Popen(command, start_new_session=True, **given))
        return processes[-1], folder

    yield run
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finished(process, folder):
    assert process.wait(timeout=100) == 0, folder.with_suffix(".txt").read_text()[-4000:]
    return np.array(losses(folder))


def assert_near(fused, reference):
    """On a CPU, bfloat16 next to float32 moved these losses by 1e-3 at most, and by 2e-4 on average."""
    assert len(fused) == len(reference) and fused[-5:].mean() < fused[:5].mean()
    np.testing.assert_allclose(fused, reference, rtol=5e-3)
    assert np.abs(fused - reference).mean() < 1e-3 * reference.mean()


@pytest.mark.gpu
def test_a_script_with_triton_is_killed_and_resumed(start, make_settings):
    """In bfloat16, with checkpointed gradients and averaged weights, next to plain PyTorch without interruption."""
    settings = make_settings(
        max_train_steps=60, logging_steps=1, checkpointing_steps="5", gradient_checkpointing=True, ema_decay=0.9
    )
    reference, whole = start("reference", settings)
    fused, parts = start("triton", settings)
    end = time.monotonic() + 60
    while not any(parts.glob("checkpoints/*/complete.json")):
        assert fused.poll() is None and time.monotonic() < end, parts.with_suffix(".txt").read_text()[-4000:]
        time.sleep(0.02)
    assert fused.poll() is None
    os.killpg(fused.pid, signal.SIGKILL)
    fused.wait()
    assert not (parts / "all_results.json").exists()
    fused, _ = start("triton", settings, None, "--resume_from_checkpoint", "latest")
    assert_near(finished(fused, parts), finished(reference, whole))
    results, expected = (json.loads((folder / "all_results.json").read_text()) for folder in (parts, whole))
    assert results["eval_loss"] == pytest.approx(expected["eval_loss"], rel=5e-3)


@pytest.mark.gpu
def test_a_compiled_script_with_triton(start, make_settings):
    settings = make_settings(max_train_steps=20, logging_steps=1, checkpointing_steps="no")
    reference = start("reference", settings)
    compiled = start("triton", settings, "compiled", "--dynamo_backend", "inductor")
    assert_near(finished(*compiled), finished(*reference))


@pytest.mark.slow
@pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
def test_a_whole_run(train_with, make_settings, all_digits):
    """The demo's model, 0.9M parameters, on 1437 digits, tested on 360. Losses came out within 2e-7 of each other."""
    settings = make_settings(
        dataset_name=str(all_digits),
        config_overrides='{"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 192]}',
        per_device_train_batch_size=64,
        num_train_epochs=15,
        num_warmup_epochs=3.0,
        num_workers=1,
        shuffle_buffer_size=5000,
        logging_steps=22,  # an epoch
        checkpointing_steps="no",
    )
    expected, reference = train_with("reference", settings)
    results, fused = train_with("cpu", settings)
    assert len(fused) == len(reference) == 15
    np.testing.assert_allclose(fused, reference, rtol=1e-3)
    assert results["eval_accuracy"] > 0.97
    assert results["eval_accuracy"] == pytest.approx(expected["eval_accuracy"], abs=1.5 / 360)  # an image, at most
