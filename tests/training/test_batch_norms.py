"""Batch norms in a run: what they gather is resumed, and all processes evaluate with what is saved."""

import json
import os
import signal

import pytest
import torch
from digits import TINY_MODEL
from killed import assert_same, run
from safetensors.torch import load_file

from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.training import loop
from hf_poolformer.training.classification import ClassificationTraining
from hf_poolformer.training.loop import train


@pytest.fixture
def make_normed(make_settings):
    """As `make_settings`, with batch norms."""

    def make(**changes):
        overrides = json.dumps({**TINY_MODEL, "norm_layer": "batch_norm"})
        return make_settings(config_name="metaformer_id_s12", config_overrides=overrides, **changes)

    return make


def statistics(folder):
    weights = load_file(folder / "model.safetensors")
    found = {name: tensor for name, tensor in weights.items() if "running_" in name}
    assert found
    return found


@pytest.mark.parametrize("ema_decay", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_stopped_and_resumed_they_are_the_same(make_normed, tmp_path, monkeypatch, ema_decay):
    changes = {"ema_decay": ema_decay, "resume_from_checkpoint": "latest", "max_train_steps": 6, "logging_steps": 1}
    train(make_normed(**changes, output_dir=str(tmp_path / "whole")))
    step = loop.optimiser_step

    def stopped(run, window):
        if run.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, window)

    parts = make_normed(**changes, output_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "optimiser_step", stopped)
        train(parts)
    train(parts)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    for name, tensor in statistics(tmp_path / "whole").items():
        assert not torch.equal(tensor, torch.full_like(tensor, float("running_var" in name))), f"{name} as it began"


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_two_processes_evaluate_what_is_saved(make_normed, tmp_path, monkeypatch, ema_decay):
    """Each has seen other images in its last step, and would else judge its part of the images by those."""
    evaluate = ClassificationTraining.evaluate

    def noted(self, run, model, final):
        found = run.accelerator.unwrap_model(model).state_dict()
        torch.save(found, tmp_path / f"process-{run.accelerator.process_index}.pt")
        return evaluate(self, run, model, final)

    monkeypatch.setattr(ClassificationTraining, "evaluate", noted)
    assert run(make_normed(ema_decay=ema_decay, max_train_steps=4, learning_rate=4e-3), 2)
    first, second = (torch.load(tmp_path / f"process-{rank}.pt") for rank in range(2))
    for name, tensor in statistics(tmp_path / "run").items():
        assert torch.equal(first[name], tensor) and torch.equal(second[name], tensor), name
