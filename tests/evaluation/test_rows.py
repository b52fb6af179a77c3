"""Rows of single images: whatever the layout, the task, the workers and the processes, each image once, with its own
answer; and its picture is found again."""

import io
import json
import multiprocessing
import os
import signal
import socket
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, log_loss, mean_absolute_error

import hf_poolformer_cli
from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.data.pictures_again import pictures_of
from hf_poolformer.evaluation import rows
from hf_poolformer.evaluation.classification import evaluate_checkpoint
from hf_poolformer.evaluation.rows import read_rows
from hf_poolformer.evaluation.settings import EvaluationSettings
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.strict_json import to_json
from hf_poolformer.foundation.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, TASKS


COUNT, BROKEN = 40, (7, 20)
NAMES = {
    CLASSIFICATION: ["cat", '<script>alert("dog")</script>', "e\neł"],
    MULTI_LABEL: ["round", "red", "old", "wet"],
    REGRESSION: ["loss", "age"],  # one is called as a column is
}
LAYOUTS = ["folder", "parquet", "tar", "saved"]


def encode(value):
    """An image whose grey tells which one it is, whatever its size."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), (value, value, value)).save(buffer, "PNG")
    return b"no image" if value in BROKEN else buffer.getvalue()


def labels_of(task):
    rng = np.random.default_rng(1)
    if task == CLASSIFICATION:
        return rng.integers(0, 3, COUNT)
    return rng.integers(0, 2, (COUNT, 4)) if task == MULTI_LABEL else rng.normal(size=(COUNT, 2)) * 50


def columns_of(task):
    """Of each image its number, camera (or nothing), night (true or false), exposure (a fraction), and its labels."""
    labels, numbers = labels_of(task), range(COUNT)
    columns = {
        "number": list(numbers),
        "camera": [None if number % 5 == 0 else f"cam {number % 3}" for number in numbers],
        "night": [number % 4 == 0 for number in numbers],
        "exposure": [number / 7 for number in numbers],
    }
    if task == CLASSIFICATION:
        return {**columns, "label": [NAMES[task][label] for label in labels]}
    kind = bool if task == MULTI_LABEL else float
    return {**columns, **{name: list(map(kind, labels[:, place])) for place, name in enumerate(NAMES[task])}}


def write_folder(root, columns):
    rows = [{"file_name": f"{number:02d}.png"} for number in range(COUNT)]
    for number, row in enumerate(rows):
        (root / row["file_name"]).write_bytes(encode(number))
        row.update({name: values[number] for name, values in columns.items()})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def write_parquet(root, columns):
    table = pa.table({"image": list(map(encode, range(COUNT))), **columns})
    for part, start in enumerate((0, 15, 30)):
        pq.write_table(table.slice(start, 15), root / f"test-{part}.parquet", row_group_size=4)
    return root


def write_tar(root, columns):
    for part in range(2):
        with tarfile.open(root / f"test-{part}.tar", "w") as tar:
            for number in range(part * COUNT // 2, (part + 1) * COUNT // 2):
                row = {name: values[number] for name, values in columns.items()}
                for suffix, data in (("png", encode(number)), ("json", json.dumps(row).encode())):
                    member = tarfile.TarInfo(f"{number:02d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def write_saved(root, columns):
    images = [{"bytes": encode(number), "path": None} for number in range(COUNT)]
    dataset = Dataset.from_dict({"image": images, **columns}).cast_column("image", ImageFeature(decode=False))
    dataset.save_to_disk(root / "saved")
    return root / "saved"


WRITERS = {"folder": write_folder, "parquet": write_parquet, "tar": write_tar, "saved": write_saved}


def save_model(folder, task, names=None):
    torch.manual_seed(0)
    config = PoolFormerConfig(
        depths=(1, 1, 1, 1),
        hidden_sizes=(8, 16, 32, 64),
        id2label=dict(enumerate(names or NAMES[task])),
        problem_type=TASKS[task].problem_type,
    )
    if task == MULTI_LABEL:
        config.label_thresholds = [0.1, 0.5, 0.52, 0.9]
    model = PoolFormerForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.8)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "crop_pct": 1.0}
    PoolFormerImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {task: save_model(root / task, task) for task in NAMES}


def settings_of(model, data, report=None, **others):
    told = {"dataset_name": str(data), "num_workers": 0, "max_skipped": 2, "per_device_eval_batch_size": 6, **others}
    settings = EvaluationSettings(report=None if report is None else str(report), **told)
    settings.model = str(model)
    return settings


def logits_of(model, numbers):
    network = PoolFormerForImageClassification.from_pretrained(model).eval()
    processor = PoolFormerImageProcessor.from_pretrained(model)
    images = [Image.open(io.BytesIO(encode(number))) for number in numbers]
    with torch.inference_mode():
        return network(**processor(images, return_tensors="pt")).logits


def assert_figures(rows, results):
    """Those of the evaluation, from its rows, by scikit-learn."""
    labels, answers = rows.labels, rows.answers.astype(np.float64)
    assert results["eval_samples"] == len(rows)
    assert results["eval_loss"] == pytest.approx(rows.losses.mean(dtype=np.float64), rel=1e-5)
    if rows.task == CLASSIFICATION:
        answers /= answers.sum(1, keepdims=True)
        assert results["eval_accuracy"] == accuracy_score(labels, rows.predictions)
        assert results["eval_f1_macro"] == pytest.approx(f1_score(labels, rows.predictions, average="macro"))
        assert results["eval_loss"] == pytest.approx(log_loss(labels, answers, labels=range(3)), rel=1e-4)
    elif rows.task == MULTI_LABEL:
        assert results["eval_exact_match"] == accuracy_score(labels, rows.predictions)
        assert results["eval_average_precision"] == pytest.approx(average_precision_score(labels, answers))
        named = [[rows.label_names[place] for place in np.flatnonzero(chosen)] for chosen in rows.predictions]
        assert rows.table["predicted"].to_pylist() == named
    else:
        assert results["eval_mae"] == pytest.approx(mean_absolute_error(labels, answers), rel=1e-6)


# Every layout once, and every task once.
PAIRS = [(task, layout) for task in NAMES for layout in LAYOUTS]
FIRST = {(next(iter(NAMES)), layout) for layout in LAYOUTS} | {(task, "parquet") for task in NAMES}


@pytest.mark.parametrize(
    ("task", "layout"), [pair if pair in FIRST else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_each_image_has_its_own_row(layout, task, models, tmp_path):
    (tmp_path / "data").mkdir()
    data = WRITERS[layout](tmp_path / "data", columns_of(task))
    settings = settings_of(models[task], data, tmp_path / "report", slice_by="number,camera,night,exposure")
    settings.num_workers, settings.output_dir = 2, str(tmp_path / "out")
    if layout == "tar" and task != CLASSIFICATION:
        settings.label_column_name = ",".join(NAMES[task])
    told = {}

    def report(folder, settings, model, processor, dataset, results):
        rows = read_rows(folder)
        wanted = [*rows.table["position"].to_pylist()[::3], *(image["position"] for image in results["broken"]), 999]
        told.update(pictures=pictures_of(dataset, wanted, 16), wanted=wanted, results=results)

    evaluate_checkpoint(settings, report)
    rows = read_rows(tmp_path / "report")
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert rows.task == task and rows.label_names == NAMES[task] and rows.about["model"] == str(models[task])
    assert rows.about["dataset"] == str(data) and set(rows.table["split"].to_pylist()) == {rows.about["split"]}

    names = rows.about["slice_by"]
    numbers = rows.table[names[0]].to_numpy()
    assert sorted(numbers) == [number for number in range(COUNT) if number not in BROKEN]
    stored = columns_of(task)
    for name, column in zip(names, ("number", "camera", "night", "exposure"), strict=True):
        assert name == (f"json.{column}" if layout == "tar" else column)
        assert rows.table[name].to_pylist() == [stored[column][number] for number in numbers]
    assert rows.labels == pytest.approx(labels_of(task)[numbers])
    logits = logits_of(models[task], numbers)
    expected = {CLASSIFICATION: logits.softmax(1), MULTI_LABEL: logits.sigmoid(), REGRESSION: logits}[task]
    assert rows.answers == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-6)
    assert_figures(rows, results)

    positions = rows.table["position"].to_numpy()
    assert (np.diff(positions) > 0).all()
    broken = told["results"]["broken"]
    assert sorted([*positions, *(image["position"] for image in broken)]) == list(range(COUNT))
    assert {image["error"] for image in broken} == {"not an image in a format that Pillow knows"}
    paths = rows.table["path"].to_pylist() + [image["path"] for image in broken]
    if layout == "folder":
        assert sorted(paths) == [str(data / f"{number:02d}.png") for number in range(COUNT)]
    else:
        assert np.array_equal(positions, numbers), "the stored order"
        end = "{:02d}.png" if layout == "tar" else "{}"
        assert sorted(paths) == sorted(f"{data}#{end.format(number)}" for number in range(COUNT))

    there = told["wanted"][: -len(BROKEN) - 1]
    assert list(told["pictures"]) == there
    greys = dict(zip(positions, numbers, strict=True))
    for position, picture in told["pictures"].items():
        assert picture.size == (16, 13) and picture.getpixel((3, 3)) == (greys[position],) * 3


def run_process(settings, rank, count, port, path):
    """What a process of an evaluation does."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "1"})
    os.environ.update({name: str(value) for name, value in names.items()})
    found = evaluate_checkpoint(settings, lambda *given: path.write_text(to_json(given[-1]["broken"])))
    assert found["eval_samples"] == COUNT - len(BROKEN)


@pytest.mark.parametrize("layout", ["parquet", pytest.param("folder", marks=pytest.mark.slow)])
def test_two_processes_write_the_rows_of_one(layout, models, tmp_path):
    (tmp_path / "data").mkdir()
    data = WRITERS[layout](tmp_path / "data", columns_of(CLASSIFICATION))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tables, broken = [], []
    for count in (1, 2):
        settings = settings_of(models[CLASSIFICATION], data, tmp_path / str(count), slice_by="camera", num_workers=1)
        fork = multiprocessing.get_context("fork")
        given = [(settings, rank, count, port + count, tmp_path / f"{count}.json") for rank in range(count)]
        workers = [fork.Process(target=run_process, args=arguments, daemon=False) for arguments in given]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * count
        assert [path.name for path in (tmp_path / str(count)).iterdir()] == ["images.parquet"]
        tables.append(read_rows(tmp_path / str(count)).table.to_pydict())
        broken.append(json.loads((tmp_path / f"{count}.json").read_text()))
    assert broken[0] == broken[1] and len(broken[0]) == len(BROKEN)
    for name, values in tables[0].items():
        if name in ("probability", "probabilities", "loss"):  # of batches of other images
            assert np.array(tables[1][name]) == pytest.approx(np.array(values), rel=1e-5)
        else:
            assert tables[1][name] == values, name


def test_columns_that_are_kept(models, tmp_path):
    """A class by its name, what is called as a column of the rows, texts of any kind, dates, and a held-out part."""
    columns = columns_of(CLASSIFICATION)
    features = Features(
        {
            "image": ImageFeature(decode=False),
            "label": Value("string"),
            "site": ClassLabel(names=["n\0rth", "</table>"]),
            "loss": Value("float32"),
            "day": Value("date32"),
            "boxes": [Value("int64")],
        }
    )
    rows = {
        "image": [{"bytes": encode(number), "path": f"{number}.png"} for number in range(COUNT)],
        "label": columns["label"],
        "site": [number % 3 - 1 for number in range(COUNT)],
        "loss": [float("nan")] * COUNT,
        "day": [f"2026-01-{number % 28 + 1:02d}" for number in range(COUNT)],
        "boxes": [[number] for number in range(COUNT)],
    }
    rows["day"] = pa.array(rows["day"]).cast(pa.date32()).to_pylist()
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "data.parquet")
    where = {"model": models[CLASSIFICATION], "data": tmp_path / "data.parquet"}
    told = {}

    def report(folder, settings, model, processor, dataset, results):
        positions = read_rows(folder).table["position"].to_pylist()
        told.update(pictures=pictures_of(dataset, positions, 8))

    kept = {"slice_by": "site,loss,day,label", "train_val_split": 0.5}
    evaluate_checkpoint(settings_of(**where, report=tmp_path / "report", **kept), report)
    found = read_rows(tmp_path / "report")
    assert found.about["slice_by"] == ["site", "loss (1)", "day", "label (3)"]
    assert set(found.table["site"].to_pylist()) <= {None, "n\0rth", "</table>"}
    assert np.isnan(found.table["loss (1)"].to_numpy()).all() and not np.isnan(found.losses).any()
    assert found.table["label (3)"].to_pylist() == found.table["label"].to_pylist()
    # Which of the images were held out, their days and pictures tell.
    assert 5 < len(found) < 35 and sorted(told["pictures"]) == found.table["position"].to_pylist()
    for picture, day in zip(told["pictures"].values(), found.table["day"].to_pylist(), strict=True):
        assert day == f"2026-01-{picture.getpixel((0, 0))[0] % 28 + 1:02d}"

    def refused(match, **others):
        with pytest.raises(UserError, match=match):
            evaluate_checkpoint(settings_of(**where, report=tmp_path / "other", **others))
        assert not (tmp_path / "other").exists()

    refused(r"no column 'lens' \(--slice_by\), only image .*day \(date32\)", slice_by="site,lens")
    refused("'boxes' of .* holds list of int64", slice_by="boxes")
    refused("'image' of .* holds Image", slice_by="image")
    with pytest.raises(UserError, match="--slice_by is for the report"):
        settings_of(**where, slice_by="site")


def test_names_that_mean_something_elsewhere(tmp_path):
    """Bytes that are no UTF-8, markup, newlines, marks that turn the direction of writing."""
    folders = [b"\xff", b"<script>a\nb", 'x"y\u202e'.encode(), b"z" * 200]
    names = ["\\xff", "<script>a\nb", 'x"y\u202e', "z" * 200]
    model = save_model(tmp_path / "model", CLASSIFICATION, names)
    for number in range(12):
        folder = tmp_path / "data" / os.fsdecode(folders[number % 4])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / os.fsdecode(b"\xfe<b>\n%d.png" % number)).write_bytes(encode(number))
    told = {}

    def report(folder, settings, model, processor, dataset, results):
        told.update(broken=results["broken"], pictures=pictures_of(dataset, range(12), 8))

    evaluate_checkpoint(settings_of(model, tmp_path / "data", tmp_path / "report"), report)
    rows = read_rows(tmp_path / "report")
    assert rows.label_names == names and len(told["pictures"]) == len(rows) == 11
    (broken,) = told["broken"]
    assert broken["path"] == f"{tmp_path / 'data' / names[3]}/\\xfe<b>\n7.png"
    for row in rows.table.to_pylist():
        number = told["pictures"][row["position"]].getpixel((0, 0))[0]
        assert row["label"] == names[number % 4] and row["path"].endswith(f"\\xfe<b>\n{number}.png")


def test_who_is_killed_leaves_nothing_half(models, tmp_path):
    (tmp_path / "data").mkdir()
    data = write_parquet(tmp_path / "data", columns_of(CLASSIFICATION))
    folder = tmp_path / "report"
    settings = settings_of(models[CLASSIFICATION], data, folder)

    def die(scratch, *_):
        (scratch / "report.html").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    victim = multiprocessing.get_context("fork").Process(target=evaluate_checkpoint, args=(settings, die))
    victim.start()
    victim.join(120)
    assert victim.exitcode == -signal.SIGKILL
    assert not [path for path in folder.iterdir() if not path.name.startswith(".")]

    def fail(scratch, *_):
        (scratch / "report.html").write_text("half")
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        evaluate_checkpoint(settings, fail)
    assert not folder.exists() or not list(folder.iterdir())

    def write(text):
        return lambda scratch, *_: (scratch / "report.html").write_text(text)

    (tmp_path / "report").mkdir(exist_ok=True)
    (tmp_path / "report/notes.txt").write_text("mine")
    evaluate_checkpoint(settings, write("first"))
    with pytest.raises(UserError, match=r"holds report\.html already"):
        evaluate_checkpoint(settings, write("second"))
    settings.overwrite = True
    evaluate_checkpoint(settings, write("third"))
    assert (folder / "report.html").read_text() == "third"
    assert sorted(path.name for path in folder.iterdir()) == ["images.parquet", "notes.txt", "report.html"]


def test_command(models, tmp_path, capfd, monkeypatch):
    """The page, the rows and the results; what a program reads stays JSON."""
    monkeypatch.setattr(rows, "_MOST_ROWS", 5)  # put away several times, as rows of large datasets are
    (tmp_path / "data").mkdir()
    data = write_parquet(tmp_path / "data", columns_of(CLASSIFICATION))
    words = [models[CLASSIFICATION], "--dataset_name", data, "--report", tmp_path / "report", "--slice_by", "camera"]
    words += ["--num_workers", "0", "--max_skipped", "2", "--batch_size", "3", "--output", tmp_path / "report"]
    assert hf_poolformer_cli.main(["evaluate", *map(str, words)]) == 0
    assert f"Report: {tmp_path / 'report/report.html'}\n" in capfd.readouterr().out
    figures = json.loads((tmp_path / "report/report.json").read_text())
    assert [image["position"] for image in figures["broken"]] == list(BROKEN)
    assert "all_results.json" in {path.name for path in (tmp_path / "report").iterdir()}
    assert hf_poolformer_cli.main(["evaluate", *map(str, words), "--json"]) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert hf_poolformer_cli.main(["evaluate", *map(str, words), "--json", "--overwrite"]) == 0
    assert json.loads(capfd.readouterr().out)["eval_samples"] == COUNT - len(BROKEN)
    # Beside the data, a report is no data.
    assert len(read_rows(tmp_path / "report")) == COUNT - len(BROKEN)


def test_files_without_rows(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "images.parquet")
    with pytest.raises(UserError, match="has no rows of an evaluation"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="has no rows of an evaluation"):
        read_rows(tmp_path / "nowhere")
