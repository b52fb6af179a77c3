"""Results that belong to their settings and data: what has changed is measured, or predicted, anew."""

import json
import os
import shutil

import pytest
from PIL import Image

from hf_poolformer.data.fingerprints import state_of_dataset, state_of_files, state_of_path
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction import parts, predict
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import ablation, records


# Files -------------------------------------------------------------------------------------------------------------


def changed_time(file):
    os.utime(file, (1, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(b"other"),
        lambda file: file.unlink(),
        lambda file: file.with_name("another").write_bytes(b"x"),
        lambda file: file.rename(file.with_name("renamed")),
        changed_time,  # older, and as large
    ],
    ids=["content", "gone", "more", "name", "time"],
)
def test_the_state_of_a_folder_tells_changes(tmp_path, change):
    (tmp_path / "below").mkdir()
    file = tmp_path / "below" / "file"
    file.write_bytes(b"bytes")
    before = state_of_path(tmp_path)
    assert state_of_path(tmp_path) == state_of_path(str(tmp_path) + "/.") == before
    change(file)
    assert state_of_path(tmp_path) != before


def test_states_of_files_that_are_not_there_and_of_any_name(tmp_path):
    assert state_of_path(tmp_path / "nothing") is None
    assert state_of_files([tmp_path / "nothing"]) != state_of_files([])
    file = os.fsencode(tmp_path) + b"/caf\xe9"
    open(file, "wb").close()
    assert state_of_path(tmp_path) == state_of_path(tmp_path / "*")
    assert state_of_dataset("someone/something", "v2").startswith("someone/something@")


# Ablation ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """`ablation.measure` with a training that takes no time, and counts."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"rows")
    trained = []

    def train(settings):
        trained.append(settings)
        return {"eval_accuracy": len(trained) / 100, "train_loss": 1.0, "train_runtime": 2.0}

    monkeypatch.setattr(ablation, "train", train)

    def run(name="identity", seed=1, **changes):
        how = {"dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"), "max_train_steps": 2}
        base = TrainingSettings.from_recipe("demo", **{**how, **changes})
        result = ablation.measure(name, base, tmp_path / "out" / "rows" / name / f"seed-{seed}", seed)
        run.base = base
        return result["accuracy"]

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"max_train_steps": 3},
        {"learning_rate": 1e-3},
        {"label_smoothing": 0.2},
        {"train_val_split": 0.3},
        {"config_overrides": '{"depths": [1, 1, 1, 1]}'},
        {"mixed_precision": "bf16"},
    ],
    ids=str,
)
def test_other_settings_are_measured_and_both_results_stay(measure, changes, capsys):
    assert measure() == measure() == 0.01
    assert measure(**changes) == 0.02
    assert f"{next(iter(changes))} " in capsys.readouterr().out
    assert (measure(), measure(**changes)) == (0.01, 0.02)
    assert measure(seed=5) == 0.03


@pytest.mark.parametrize(
    "changes",
    [{"num_workers": 3}, {"logging_steps": 1}, {"eval_epochs": 2}, {"with_tracking": True}, {"save_total_limit": 9}],
    ids=str,
)
def test_what_decides_nothing_measures_nothing(measure, changes):
    assert measure() == measure(**changes) == 0.01


def test_other_data_other_version_and_other_processes_are_measured(measure, tmp_path, monkeypatch, capsys):
    assert measure() == 0.01
    (tmp_path / "data" / "train.parquet").write_bytes(b"ROWS")
    assert measure() == 0.02
    assert "other data" in capsys.readouterr().out
    monkeypatch.setattr(records, "__version__", "99")
    assert measure() == 0.03
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert measure() == 0.04
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert measure(dataset_name=str(tmp_path / "moved")) == 0.05


@pytest.mark.parametrize("record", ["", "{", "[]", "null", '{"row": "identity"}', '{"key": 3}', "\x00\x00", '"text"'])
def test_a_damaged_or_foreign_record_is_measured_anew_and_kept(measure, tmp_path, record, capsys):
    folder = tmp_path / "out" / "rows" / "identity" / "seed-1"
    folder.mkdir(parents=True)
    (folder / "ablation.json").write_text(record)
    assert measure() == measure() == 0.01
    assert "measured anew" in capsys.readouterr().out
    assert json.loads((folder / "ablation.json").read_text())["accuracy"] == 0.01
    assert record in [path.read_text() for path in folder.glob("ablation.json-*")]


def test_the_table_has_all_rows_of_the_same_settings_and_no_others(measure, tmp_path):
    measure("identity")
    measure("relu", max_train_steps=9)
    measure("silu", seed=2)
    measure("identity")
    content = ablation.content_of(measure.base)
    lines = ablation.summarise(ablation.all_results(measure.base, tmp_path / "out", content))
    assert [(line["row"], line["accuracy"]) for line in lines] == [("identity", 1.0), ("silu", 3.0)]


# Predictions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, colour in enumerate(["red", "green", "blue", "white", "black"]):
        Image.new("RGB", (32, 32), colour).save(folder / f"{number}.bmp")  # all of one size in bytes
    return folder


def rows_of(folder):
    import pyarrow.parquet as pq

    return [row for path in sorted(folder.glob("part-*")) for row in pq.read_table(path).to_pylist()]


OPTIONS = {"part_size": 2, "num_workers": 0, "progress": False}


@pytest.mark.parametrize("older", [False, True])
def test_shards_whose_images_changed_are_predicted_anew(make_checkpoint, images, tmp_path, caplog, older):
    model, out = make_checkpoint(), tmp_path / "out"
    predict(model, [images], out, **OPTIONS)
    untouched = {path.name: path.stat().st_mtime_ns for path in out.glob("part-0000[02]*")}
    shutil.copyfile(images / "4.bmp", images / "2.bmp")
    if older:
        os.utime(images / "2.bmp", (10**9, 10**9))
    summary = predict(model, [images], out, **OPTIONS)
    assert summary.complete and summary.before == 3 and "1 of 3 shards have changed" in caplog.text
    rows = rows_of(out)
    assert rows[2]["scores"] == pytest.approx(rows[4]["scores"], rel=1e-5)  # in other batches
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("part-0000[02]*")} == untouched
    caplog.clear()
    assert predict(model, [images], out, **OPTIONS).before == 5 and not caplog.text


def test_a_process_that_finds_changes_takes_back_the_summary(make_checkpoint, images, tmp_path):
    model, out = make_checkpoint(), tmp_path / "out"
    predict(model, [images], out, **OPTIONS)
    shutil.copyfile(images / "4.bmp", images / "2.bmp")
    with pytest.raises(KeyboardInterrupt):
        predict(model, [images], out, should_stop=lambda: True, **OPTIONS)
    assert not (out / parts.SUMMARY).exists()
    assert predict(model, [images], out, **OPTIONS).complete and (out / parts.SUMMARY).exists()


@pytest.mark.parametrize("damage", ["", "{", '{"run": 3}', "[1]"])
def test_a_damaged_manifest_is_written_anew_where_the_parts_are_this_jobs(make_checkpoint, images, tmp_path, damage):
    model, out = make_checkpoint(), tmp_path / "out"
    predict(model, [images], out, **OPTIONS)
    (out / parts.MANIFEST).write_text(damage)
    assert predict(model, [images], out, **OPTIONS).before == 5
    (out / parts.MANIFEST).write_text(damage)
    with pytest.raises(UserError, match="cannot be read"):
        predict(model, [images], out, **{**OPTIONS, "top_k": 2})


def test_whatever_reads_folders_of_parquet_reads_this_one(make_checkpoint, images, tmp_path):
    import datasets
    import pandas

    (images / "broken.png").write_bytes(b"no image")
    predict(make_checkpoint(), [images], tmp_path / "out", **OPTIONS)
    assert len(pandas.read_parquet(tmp_path / "out")) == 6
    for how in ({"path": str(tmp_path / "out")}, {"path": "parquet", "data_dir": str(tmp_path / "out")}):
        opened = datasets.load_dataset(**how, cache_dir=str(tmp_path / "cache"))["train"]
        assert opened.num_rows == 6 and "label" in opened.features
