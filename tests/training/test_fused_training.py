"""Training with the block's fused operations and with plain PyTorch: the same run, but for rounding."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from hf_poolformer import backends
from hf_poolformer.training.loop import train


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
