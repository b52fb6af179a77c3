"""A task that somebody adds: a row of the table, settings and a training of its own; the loop and the command know."""

import dataclasses
import json
from dataclasses import dataclass, replace

import pytest
import yaml
from digits import TINY_MODEL

from hf_poolformer.commands.train import main
from hf_poolformer.foundation.settings import setting
from hf_poolformer.foundation.tasks import CLASSIFICATION, TASKS
from hf_poolformer.hub import contents
from hf_poolformer.settings.classification import ClassificationSettings
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training.classification import ClassificationTraining
from hf_poolformer.training.loop import train


@dataclass
class WeighedSettings(ClassificationSettings):
    _argument_group_name = "weighing"

    weight: float = setting(2.0, "What the loss is multiplied by.", low=0.5, high=4, shown=True)


class WeighedTraining(ClassificationTraining):
    loss_parts = ("plain_loss",)

    def losses(self, run, batch):
        [loss] = super().losses(run, batch)
        return [self.settings.weight * loss, loss]


@pytest.fixture
def weighed(monkeypatch):
    named = {
        "settings": f"{__name__}:{WeighedSettings.__name__}",
        "training": f"{__name__}:{WeighedTraining.__name__}",
    }
    row = replace(TASKS[CLASSIFICATION], name="weighed-classification", **named)
    monkeypatch.setitem(TASKS, row.name, row)
    return row.name


def test_the_command_trains_it_and_goes_on(weighed, digits, tmp_path, capsys):
    flags = [
        "--task",
        weighed,
        "--recipe",
        "demo",
        "--dataset_name",
        str(digits),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    flags += ["--config_overrides", json.dumps(TINY_MODEL), "--num_workers", "0", "--logging_steps", "1"]
    assert main([*flags, "--weight", "3", "--max_train_steps", "2"]) == 0
    assert f"{weighed}: " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/training_log.jsonl").read_text().splitlines()]
    losses = [(row["loss"], row["plain_loss"]) for row in rows if "loss" in row]
    assert len(losses) == 2 and all(loss == pytest.approx(3 * plain, rel=1e-5) for loss, plain in losses)
    assert "`weight` | 3" in (tmp_path / "run/README.md").read_text()

    written = tmp_path / "run/training_settings.yaml"
    assert yaml.safe_load(written.read_text())["task"] == weighed
    again = ["--config_file", str(written), "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]
    assert main(again) == 0
    assert json.loads((tmp_path / "run/all_results.json").read_text())["step"] == 3


def test_its_settings_are_said_once(weighed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--task", weighed, "--help"])
    text = capsys.readouterr().out
    assert "\nweighing:\n" in text and "--weight X" in text and weighed in text
    assert main(["--task", weighed, "--train_dir", "x", "--output_dir", str(tmp_path), "--weight", "5"]) == 2
    assert "--weight must be between 0.5 and 4, not 5" in capsys.readouterr().err
    # The flag of one task is none of another.
    assert main(["--train_dir", "x", "--output_dir", str(tmp_path), "--weight", "3"]) == 2
    assert "unknown flag: --weight" in capsys.readouterr().err


def test_settings_of_one_task_are_refused_by_another(make_settings):
    with pytest.raises(Exception, match="not for object-detection"):
        dataclasses.replace(make_settings(), task="object-detection")
    with pytest.raises(Exception, match="did you mean"):
        TrainingSettings.from_recipe(task="object-detecton")


def test_every_setting_that_may_be_a_path_is_hidden_on_the_way_to_the_hub():
    assert {"output_dir", "dataset_name", "teacher", "train_dir", "_name_or_path"} <= contents.PATH_KEYS
    hidden = contents.without_paths({"teacher": "/home/me/t", "validation_dir": "../v", "seed": 1}, [])
    assert hidden == {"teacher": "t", "validation_dir": "v", "seed": 1}


def test_the_loop_takes_another_task_object(make_settings):
    class Counted(ClassificationTraining):
        batches = 0

        def losses(self, run, batch):
            self.batches += 1
            return super().losses(run, batch)

    settings = make_settings(max_train_steps=2, gradient_accumulation_steps=2)
    task = Counted(settings)
    assert train(settings, task)["step"] == 2 and task.batches == 4
