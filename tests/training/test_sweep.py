"""`hf-poolformer sweep` at what a person gives it and finds in the folder. Most trials here take no time: they are a
formula in the place of a training."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from digits import TINY_MODEL
from transformers import AutoModelForImageClassification
from warm import warm_python

from hf_poolformer.commands import sweep as command
from hf_poolformer.foundation.errors import Diverged, UserError
from hf_poolformer.foundation.processes import Stopped
from hf_poolformer.settings.classification import ClassificationSettings
from hf_poolformer.settings.command_line import parse
from hf_poolformer.training import sweep, sweep_space


pytest.importorskip("optuna")

FLAGS = ["--recipe", "demo", "--num_train_epochs", "4", "--num_warmup_epochs", "1", "--eval_epochs", "1"]
SEARCH = ["--search", "learning_rate=log:1e-4..1e-1", "optimizer=adamw,lamb"]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text("nothing looks into it")
    return tmp_path / "data"


@pytest.fixture
def formula(monkeypatch):
    """Trials whose accuracy is best at a learning rate of 0.01; `calls` has their settings."""

    def train(settings, after_evaluation):
        formula.calls.append(settings)
        folder = Path(settings.output_dir)
        (folder / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
        accuracy = 1 - abs(math.log10(settings.learning_rate) + 2) / 4
        for epoch in range(1, settings.num_train_epochs):
            if formula.at_epoch is not None:
                formula.at_epoch(len(formula.calls), epoch)
            after_evaluation(SimpleNamespace(progress=SimpleNamespace(epoch=epoch)), {"eval_accuracy": accuracy})
        (folder / "model.safetensors").write_text(str(accuracy))
        results = {"eval_accuracy": accuracy, "eval_loss": 1 - accuracy, "epoch": settings.num_train_epochs}
        (folder / "all_results.json").write_text(json.dumps(results))
        return results

    formula = SimpleNamespace(calls=[], at_epoch=None)
    monkeypatch.setattr(sweep, "train", train)
    return formula


@pytest.fixture
def run(tmp_path, data, capfd):
    """Runs the command; gives its exit status, what it said, and its folder."""

    def run(*words, search=SEARCH, flags=FLAGS, folder="sweep"):
        given = [*search, *flags, "--dataset_name", str(data), "--output_dir", str(tmp_path / folder), *words]
        status = command.main(given, "hf-poolformer sweep")
        said = capfd.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err, folder=tmp_path / folder)

    return run


def board(folder):
    with (folder / "leaderboard.csv").open() as file:
        return list(csv.DictReader(file))


# What is searched ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said", "every"),
    [
        ("learning_rate=log:1e-4..1e-2", "log:0.0001..0.01", None),
        ("num_train_epochs=5..8", "5..8", [5, 6, 7, 8]),
        ("num_train_epochs=2..9:3", "2..8:3", [2, 5, 8]),
        ("mixup-alpha=0..0.8:0.4", "0..0.8:0.4", [0, 0.4, 0.8]),
        ("weight_decay=0.01, 0.05,0.1,0.10", "0.01,0.05,0.1", [0.01, 0.05, 0.1]),
        ("learning_rate=auto,1e-3", "auto,0.001", ["auto", 0.001]),
        ("optimizer=adamw,lamb", "adamw,lamb", ["adamw", "lamb"]),
        ("ema_warmup=true,false", "true,false", ["true", "false"]),
        ('config_overrides=[{"pool_size": 3}, {"pool_size": 5}]', None, ['{"pool_size": 3}', '{"pool_size": 5}']),
    ],
)
def test_what_can_be_searched(text, said, every):
    space = sweep_space.make_space(sweep_space.read_texts([text], None), ClassificationSettings)
    [(name, one)] = space.items()
    assert name == text.partition("=")[0].replace("-", "_")
    assert said is None or sweep_space.describe(one) == said
    assert one.every() == every
    assert type(one.every()) is type(every)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to search: --search learning_rate="),
        (["learning_rate"], "takes NAME=VALUES"),
        (["lr=log:1e-4..1e-2"], "unknown setting to search: lr; did you mean learning_rate"),
        (["learning_rate=0.1..0.01"], "the first number must be less"),
        (["learning_rate=log:0..0.01"], "no 0; begin above 0"),
        (["learning_rate=-1..0.01"], "--learning_rate must be at least 0, not -1"),
        (["learning_rate=1e-3"], "that is one value"),
        (["learning_rate=1e-3..fast"], "low..high"),
        (["num_train_epochs=1.5..3"], "takes whole numbers"),
        (["drop_path_rate=0..2"], "between 0 and 0.99, not 2"),
        (["optimizer=adamw,sgd"], "invalid choice: 'sgd'"),
        (["config_overrides=[{]"], "is not JSON"),
        (["num_workers=1,2"], "does not depend on it. Give it as --num_workers"),
        (["task=image-classification,image-regression"], "no figure in common"),
        (["learning_rate=1e-3,1e-2", "learning-rate=1e-4,1e-3"], "is there twice"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(run, formula, words, message):
    done = run(search=["--search", *words] if words else [])
    assert done.status == 2
    assert re.search(re.escape(message), done.err), done.err
    assert done.err.count("\n") == 1 and not formula.calls and not done.folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "acuracy"], "did you mean eval_accuracy"),
        (["--trials", "0"], "at least 1"),
        (["--push_to_hub"], "publish the best model when it is there"),
        (["--resume_from_checkpoint", "latest"], "goes on by itself"),
        (["--sampler", "grid"], "those of learning_rate cannot be counted"),
        (["--serch", "x"], "unknown flag: --serch; did you mean --search"),
    ],
)
def test_flags_that_make_no_sweep(run, formula, words, message):
    done = run(*words)
    assert done.status == 2 and message in done.err and not formula.calls


def test_what_is_missing_is_named(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = run()
    assert done.status == 2 and "pip install 'hf-poolformer[sweep]'" in done.err


def test_a_file_says_it_too(run, formula, tmp_path):
    space = {"learning_rate": "log:1e-4..1e-1", "weight_decay": [0.01, 0.1], "ema_warmup": [True, False]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    done = run("--trials", "3", search=["--search_file", str(tmp_path / "space.yaml")])
    assert done.status == 0, done.err
    assert {settings.weight_decay for settings in formula.calls} <= {0.01, 0.1}
    assert all(isinstance(settings.ema_warmup, bool) for settings in formula.calls)


# What is left -------------------------------------------------------------------------------------------------------


def test_a_sweep_finds_the_best_and_says_how_to_go_on(run, formula):
    done = run("--trials", "10", "--pruner", "none")
    assert done.status == 0, done.err
    rows = board(done.folder)
    accuracies = [float(row["eval_accuracy"]) for row in rows]
    assert len(rows) == 10 and accuracies == sorted(accuracies, reverse=True)
    best = formula.calls[int(rows[0]["trial"])]
    assert rows[0]["learning_rate"] == str(best.learning_rate) and rows[0]["optimizer"] == best.optimizer
    # The figures of the best model, its settings, and the line that trains it again.
    assert float((done.folder / "best/model.safetensors").read_text()) == accuracies[0]
    line = re.search(r"train it again:\n  (.*)\n", done.out)[1].split()
    again = parse(line[line.index("train") + 1 :])
    changed = {"output_dir", "config_file", "project"}
    assert {k: v for k, v in again.to_dict().items() if k not in changed} == {
        k: v for k, v in best.to_dict().items() if k not in {*changed}
    } | {"resume_from_checkpoint": None, "overwrite_output_dir": False}
    # Nothing heavy of any trial.
    assert not list(done.folder.glob("trials/*/*.safetensors")) and not list(done.folder.glob("trials/*/checkpoints"))
    markdown = (done.folder / "leaderboard.md").read_text()
    assert markdown in done.out and "Top-1 accuracy" in markdown
    shares = dict(re.findall(r"^\| (learning_rate|optimizer) \| ([\d.]+) \|$", markdown, re.MULTILINE))
    assert float(shares["learning_rate"]) > 0.6 > float(shares["optimizer"])
    assert {path.name for path in done.folder.glob("*.png")} == {"sweep.png", "parallel.png"}
    assert len(re.findall(r"^\[\d+/10\]", done.out, re.MULTILINE)) == 10


def test_less_is_better_where_the_metric_says_so(run, formula):
    done = run("--trials", "3", "--metric", "loss", "--keep_all")
    losses = [float(row["eval_loss"]) for row in board(done.folder)]
    assert len(losses) > 1 and losses == sorted(losses)
    assert len(list(done.folder.glob("trials/*/model.safetensors"))) == len(losses)


def test_a_grid_tries_everything_once(run, formula):
    done = run("--sampler", "grid", search=["--search", "learning_rate=0.001,0.01", "num_train_epochs=2..3"])
    assert done.status == 0
    tried = [(settings.learning_rate, settings.num_train_epochs) for settings in formula.calls]
    assert tried == [(0.001, 2), (0.001, 3), (0.01, 2), (0.01, 3)]


def test_values_that_were_tried_are_not_trained_again(run, formula):
    done = run("--trials", "8", search=["--search", "optimizer=adamw,lamb"])
    assert done.status == 0 and len(formula.calls) == 2 == len(board(done.folder))


def test_trials_that_are_worse_than_the_others_end_early(run, formula):
    done = run("--trials", "9")
    pruned = [row for row in board(done.folder) if row["state"] == "pruned"]
    best = float(board(done.folder)[0]["eval_accuracy"])
    assert pruned and "pruned at epoch 2" in done.out  # the first epoch is the warm-up
    assert all(float(row["note"].split()[-1]) < best for row in pruned)


# Failures -----------------------------------------------------------------------------------------------------------


def test_what_diverges_or_runs_out_of_memory_is_no_end(run, formula):
    def fail(call, epoch):
        if call == 1:
            raise Diverged("the loss is nan at step 3")
        if call == 2:
            raise MemoryError("cannot allocate 3 TB")
        if call == 3:
            raise UserError("out of memory in step 1, with 64 images per device")

    formula.at_epoch = fail
    done = run("--trials", "5")
    assert done.status == 0, done.err
    notes = {row["trial"]: row["note"] for row in board(done.folder) if row["state"] == "failed"}
    assert notes["0"] == "diverged: the loss is nan at step 3" and notes["1"].startswith("out of memory: cannot")
    assert set(notes) == {"0", "1", "2"}


@pytest.mark.parametrize("good", [0, 1])
def test_what_would_fail_again_and_again_is_the_end(run, formula, good):
    """At once before any trial came to its end, and then, with what was wrong put right, the folder can be used."""

    def fail(call, epoch):
        if call > good:
            raise UserError("the checkpoint has another shape")

    formula.at_epoch = fail
    done = run("--trials", "20")
    assert done.status == 2 and len(formula.calls) == (4 if good else 1)
    assert "would fail like the last: the checkpoint has another shape" in done.err
    formula.at_epoch = None
    done = run("--trials", "2", flags=[*FLAGS, "--weight_decay", "0.3"])
    assert done.status == (2 if good else 0)


# Going on -----------------------------------------------------------------------------------------------------------


def values(settings):
    return settings.learning_rate, settings.optimizer


def test_interrupted_and_longer_sweeps_try_the_same(run, formula):
    assert run("--trials", "6", folder="whole").status == 0
    whole = list(map(values, formula.calls))
    formula.calls.clear()

    def stop(call, epoch):
        if call == 3 and epoch == 2:
            raise Stopped(signal.SIGTERM)

    formula.at_epoch = stop
    with pytest.raises(Stopped):
        run("--trials", "4")
    formula.at_epoch = None
    done = run("--trials", "4")
    assert done.status == 0 and "[3/4]" in done.out and "(goes on)" in done.out
    assert [row["trial"] for row in board(done.folder) if row["resumed"] == "1"] == ["2"]
    assert run("--trials", "6").status == 0
    parts = list(map(values, formula.calls))
    assert parts[2] == parts[3]  # once more, and from its checkpoint
    assert [*parts[:3], *parts[4:]] == whole
    assert all(settings.resume_from_checkpoint == "latest" for settings in formula.calls)
    formula.calls.clear()
    assert run("--trials", "6").status == 0 and not formula.calls  # nothing is left to do
    assert run("--trials", "3", "--seed", "7", folder="other").status == 0
    assert not set(map(values, formula.calls)) & set(whole)


def test_a_trial_whose_end_was_not_noted_is_not_trained_again(run, formula, monkeypatch):
    tell = sweep.Sweep.tell

    def killed(self, outcome):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.Sweep, "tell", killed)
    assert run("--trials", "2").status == 130
    monkeypatch.setattr(sweep.Sweep, "tell", tell)
    assert run("--trials", "2").status == 0
    assert len(formula.calls) == 2


def test_a_trial_whose_process_dies_each_time_fails(run, formula):
    def die(call, epoch):
        raise KeyboardInterrupt  # as far as the study can tell, it is gone without a word

    formula.at_epoch = die
    for _ in range(3):
        assert run("--trials", "2").status == 130
    formula.at_epoch = None
    done = run("--trials", "2")
    assert done.status == 0
    assert "its process ended 3 times without a word" in [row["note"] for row in board(done.folder)][-1]


def test_a_line_that_was_not_finished_is_taken_away(run, formula):
    done = run("--trials", "2")
    journal = done.folder / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 6, "worker')
    assert run("--trials", "3").status == 0
    assert len(formula.calls) == 3


@pytest.mark.parametrize("line", [b"\x00\xff{", b'{"op_code": 4, "work', b"7"])
def test_a_damaged_study_is_told_and_left_alone(run, formula, line):
    journal = run("--trials", "2").folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[2] = line + b"\n"
    journal.write_bytes(b"".join(lines))
    done = run("--trials", "3")
    assert done.status == 2 and "study.journal is damaged in line 3" in done.err and "Traceback" not in done.err
    assert journal.read_bytes() == b"".join(lines) and len(formula.calls) == 2
    assert (done.folder / "best.yaml").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flags": [*FLAGS, "--weight_decay", "0.3"]}, "weight_decay 0.05 instead of 0.3"),
        ({"search": ["--search", "learning_rate=log:1e-4..1e-2", "optimizer=adamw,lamb"]}, "another space"),
        ({"words": ["--metric", "loss"]}, "another metric"),
        ({"data": "more"}, "other data"),
    ],
)
def test_another_sweep_needs_another_folder(run, formula, data, change, message):
    assert run("--trials", "1").status == 0
    if change.pop("data", None):
        (data / "more.csv").write_text("x")
    done = run("--trials", "3", *change.pop("words", []), **change)
    assert done.status == 2 and message in done.err and "--output_dir" in done.err
    assert len(formula.calls) == 1


def test_a_folder_with_something_else_is_left_alone(run, formula, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "model.safetensors").write_text("mine")
    done = run()
    assert done.status == 2 and "holds something else" in done.err
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["model.safetensors"]


def test_two_at_once_share_the_work(run, formula, data, tmp_path):
    """While one is at a trial, another command on the folder takes the others."""
    inner = []

    def other(call, epoch):
        if call == 1 and epoch == 2:
            inner.append(run("--trials", "3"))

    formula.at_epoch = other
    outer = run("--trials", "3")
    assert outer.status == 0 and inner[0].status == 0
    assert len(formula.calls) == 3 and sorted(row["trial"] for row in board(outer.folder)) == ["0", "1", "2"]
    assert "[1/3]" not in inner[0].out.partition("[2/3]")[2]


# Real trials --------------------------------------------------------------------------------------------------------


def real(digits, folder, *words):
    return [
        *("--recipe", "demo", "--dataset_name", str(digits), "--output_dir", str(folder), "--num_workers", "0"),
        *("--config_overrides", json.dumps(TINY_MODEL), "--per_device_train_batch_size", "32"),
        *("--num_warmup_epochs", "0.5", "--eval_epochs", "1", "--shuffle_buffer_size", "64", *words),
    ]


def test_trials_are_trainings(digits, tmp_path, capfd):
    folder = tmp_path / "sweep"
    searched = ["--search", "learning_rate=1e-2,1e3", "--sampler", "grid", "--metric", "f1_macro"]
    status = command.main([*searched, *real(digits, folder, "--num_train_epochs", "1")])
    said = capfd.readouterr()
    assert status == 0, said.err
    good, bad = board(folder)
    assert good["learning_rate"] == "0.01" and good["state"] == "complete"
    assert bad["state"] == "failed" or float(bad["eval_f1_macro"]) < float(good["eval_f1_macro"])
    results = json.loads((folder / "best/all_results.json").read_text())
    assert results["eval_f1_macro"] == pytest.approx(float(good["eval_f1_macro"]))
    model = AutoModelForImageClassification.from_pretrained(folder / "best")
    assert model.config.id2label[3] == "digit 3"
    assert "(0.01)" not in said.out and "320 training images" in (folder / "trials/trial-000.txt").read_text()
    settings = yaml.safe_load((folder / "best/training_settings.yaml").read_text())
    assert settings["output_dir"] == str(folder / "best") and settings["learning_rate"] == 0.01


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(digits, tmp_path):
    folder = tmp_path / "sweep"
    words = ["--search", "learning_rate=log:1e-3..1e-2", "--trials", "3", *real(digits, folder)]
    words += ["--num_train_epochs", "6", "--pruner", "none"]
    start = [warm_python(), "-m", "hf_poolformer", "sweep", *words]
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(folder.glob("trials/trial-001/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(start, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {row["trial"]: row for row in board(folder)}
    assert set(rows) == {"0", "1", "2"} and all(row["state"] == "complete" for row in rows.values())
    assert [rows[trial]["resumed"] for trial in "012"] == ["0", "1", "0"]
    assert "Going on from" in (folder / "trials/trial-001.txt").read_text()
    # The same as without the kill, figure by figure.
    whole = tmp_path / "whole"
    words[words.index(str(folder))] = str(whole)
    again = subprocess.run([warm_python(), "-m", "hf_poolformer", "sweep", *words], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {row["trial"]: row["eval_accuracy"] for row in board(whole)} == {
        trial: row["eval_accuracy"] for trial, row in rows.items()
    }


@pytest.mark.slow
def test_two_processes_train_each_trial_together(digits, tmp_path):
    folder = tmp_path / "sweep"
    words = ["--search", "learning_rate=1e-3,1e-2,1e3", "--sampler", "grid", *real(digits, folder)]
    words += ["--num_train_epochs", "2"]
    launch = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "hf_poolformer", "sweep", *words], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert len(board(folder)) == 3 and done.stdout.count("[1/3]") == 1
    assert "2 x cpu" in (folder / "trials/trial-000.txt").read_text()
