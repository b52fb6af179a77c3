"""A learning rate that the run chooses for itself, and a run that is otherwise as if it had been given."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from killed import assert_same, run

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.training import range_test
from hf_poolformer.training.classification import ClassificationTraining
from hf_poolformer.training.loop import train
from hf_poolformer.training.range_test import HIGHEST, LOWEST, STEPS, Curve


pytestmark = pytest.mark.usefixtures("drawn")
FILES = [f"{range_test.FILE}.json", f"{range_test.FILE}.png"]
# Whatever a test of a hundred steps could leave behind: the average, dropped paths, mixed images, clipped gradients.
CHANGES = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "ema_decay": 0.9,
    "drop_path_rate": 0.2,
    "mixup_alpha": 0.8,
    "random_erasing": 0.5,
    "layer_decay": 0.8,
    "logging_steps": 1,
    "checkpointing_steps": "2",
    "num_train_epochs": 1,
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(range_test, "STEPS", 40)


def facts(folder: Path) -> dict:
    return json.loads((folder / FILES[0]).read_text())


@pytest.mark.parametrize(("num_workers", "count"), [(2, 1), pytest.param(0, 2, marks=pytest.mark.slow)])
def test_the_run_is_the_one_that_is_given_the_number(make_settings, tmp_path, short, num_workers, count):
    changes = {**CHANGES, "num_workers": num_workers}
    auto = make_settings(**changes, learning_rate="auto", output_dir=str(tmp_path / "auto"))
    auto = dataclasses.replace(auto, resume_from_checkpoint="latest")
    assert not run(auto, count, kill_at=3)
    rate = facts(tmp_path / "auto")["learning_rate"]
    (tmp_path / "auto" / FILES[0]).unlink()
    assert run(auto, count)
    assert not (tmp_path / "auto" / FILES[0]).exists()  # it kept to what it had chosen
    assert run(make_settings(**changes, learning_rate=rate, output_dir=str(tmp_path / "given")), count)
    assert_same(tmp_path / "auto", tmp_path / "given")
    results = json.loads((tmp_path / "auto/all_results.json").read_text())
    assert results["learning_rate"] == rate and LOWEST < rate < HIGHEST
    assert f"`learning_rate` | auto: {rate}" in (tmp_path / "auto/README.md").read_text()


def test_killed_amid_the_test_it_begins_anew(make_settings, tmp_path, short, monkeypatch):
    """Nothing of the killed one counts: not what its steps changed, and not the images it has seen."""
    changes = {**CHANGES, "num_workers": 0, "learning_rate": "auto", "resume_from_checkpoint": "latest"}
    assert run(make_settings(**changes, output_dir=str(tmp_path / "whole")))
    parts = make_settings(**changes, output_dir=str(tmp_path / "parts"))
    losses, calls = ClassificationTraining.losses, iter(range(1000))

    def killed(*arguments):
        if next(calls) == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ClassificationTraining, "losses", killed)
        assert not run(parts)  # in a fork, so that the count here stays
    assert not (tmp_path / "parts" / FILES[0]).exists()
    assert run(parts)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert facts(tmp_path / "parts") == facts(tmp_path / "whole")


@pytest.mark.slow
def test_what_it_chooses_learns(make_settings, tmp_path, capsys):
    """Better than a rate far below, on the same budget."""
    changes = {"num_train_epochs": 3, "label_smoothing": 0.0}
    found = train(make_settings(**changes, learning_rate="auto", output_dir=str(tmp_path / "auto")))
    rate = found["learning_rate"]
    assert f"learning_rate auto: {rate:g} (range test of" in capsys.readouterr().out
    below = train(make_settings(**changes, learning_rate=0.01 * rate, output_dir=str(tmp_path / "below")))
    assert found["eval_loss"] < 0.9 * below["eval_loss"]
    curve = facts(tmp_path / "auto")
    rates = np.array(curve["rates"])
    assert np.allclose(rates, np.geomspace(LOWEST, HIGHEST, STEPS)[: len(rates)], rtol=1e-12)
    assert len(rates) == len(curve["losses"]) == len(curve["smoothed_losses"])
    assert (tmp_path / "auto" / FILES[1]).read_bytes()[:4] == b"\x89PNG"


def curve_of(loss, exploded=True):
    rates = np.geomspace(LOWEST, HIGHEST, STEPS)
    return Curve(rates.tolist(), [float(loss(math.log10(rate))) for rate in rates], exploded)


def test_the_choice_is_a_tenth_of_where_the_loss_is_lowest():
    """A parabola over the logarithm keeps its lowest point when it is smoothed."""
    rate, fault = curve_of(lambda x: 1 + (x + 3) ** 2).choice()
    step = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    assert not fault and 1e-4 / step <= rate <= 1e-4 * step


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (curve_of(lambda x: 2.3), "hardly falls at any learning rate: from 2.3 to 2.3"),
        (curve_of(lambda x: 2.3 + 0.3 * math.sin(40 * x)), "hardly falls"),
        (curve_of(lambda x: -x, exploded=False), "still falls at the highest learning rate, 1"),
        (curve_of(lambda x: 1 + 99 * (x + 5.5) ** 2), "rises from a learning rate of 3.1e-06 on"),
        (Curve(exploded=True), "not finite at the lowest"),
    ],
)
def test_a_curve_that_says_nothing(curve, message):
    rate, fault = curve.choice()
    assert rate is None and message in fault


def test_the_user_is_told_and_sees_the_curve(make_settings, tmp_path, monkeypatch, short):
    losses = ClassificationTraining.losses
    monkeypatch.setattr(ClassificationTraining, "losses", lambda *arguments: [0 * losses(*arguments)[0] + 1])
    with pytest.raises(UserError, match=r"hardly falls at any .* Give a number with --learning_rate.*test.png"):
        train(make_settings(learning_rate="auto"))
    assert facts(tmp_path / "run")["learning_rate"] is None
    assert all((tmp_path / "run" / name).is_file() for name in FILES)


def test_told_to_stop_it_stops(make_settings, tmp_path, monkeypatch, capsys):
    losses, steps = ClassificationTraining.losses, iter(range(1000))

    def interrupted(*arguments):
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*arguments)

    monkeypatch.setattr(ClassificationTraining, "losses", interrupted)
    with pytest.raises(Stopped):
        train(make_settings(learning_rate="auto"))
    assert "before the first step: there is nothing to save" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_a_run_that_was_given_a_number_keeps_it(make_settings):
    train(make_settings(max_train_steps=1))
    with pytest.raises(UserError, match="was made with a number: go on with that"):
        train(make_settings(max_train_steps=2, learning_rate="auto", resume_from_checkpoint="latest"))
