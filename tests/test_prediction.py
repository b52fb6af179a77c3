"""Prediction as a person runs it: a folder of anything in, a table out."""

import csv
import functools
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline
from warm import warm_python

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor, PoolFormerModel
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction import predict


SCRIPT = Path(__file__).parents[1] / "scripts" / "predict.py"
NAMES = ["cat", "dog", "eel", "fox", "gnu", "hen", "ibis"]


def photograph(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(seed: int) -> bytes:
    buffer = io.BytesIO()
    photograph(seed).save(buffer, "PNG")
    return buffer.getvalue()


def config(**changes) -> PoolFormerConfig:
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    return PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 32, 64), **{**labels, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    classifier = PoolFormerForImageClassification(config())
    with torch.no_grad():
        classifier.classifier.weight.normal_(std=0.5)
    classifier.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    PoolFormerImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    (root / "below").mkdir(parents=True)
    for seed in range(7):
        photograph(seed).save(root / ("below" if seed > 4 else "") / f"{seed}.png")
    (root / "empty.jpg").touch()
    (root / "page.jpeg").write_text("<html></html>")
    (root / "notes.txt").write_text("not an image, not listed")
    return root


def read(table: Path) -> list[dict]:
    if table.suffix == ".parquet":
        return pq.read_table(table).to_pylist()
    if table.suffix == ".jsonl":
        return [json.loads(line) for line in table.read_text().splitlines()]
    with open(table, newline="") as file:
        rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        row["score"] = row["score"] and float(row["score"])
        for key in ("labels", "scores"):
            row[key] = row[key] and json.loads(row[key])
    return rows


def run(*arguments, **options):
    return subprocess.run(
        [warm_python(), SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_folder_to_table(model, folder, tmp_path, suffix, num_workers):
    output = tmp_path / "new" / f"predictions.{suffix}"
    arguments = {"top_k": 3, "batch_size": 4, "num_workers": num_workers, "progress": False}
    summary = predict(model, [folder], output, **arguments)
    assert (summary.predicted, summary.broken) == (7, 2)
    assert "7 images predicted, 2 broken" in str(summary) and str(output) in str(summary)
    rows = read(output)
    assert list(rows[0]) == ["path", "label", "score", "labels", "scores", "error"]
    assert [Path(row["path"]).name for row in rows] == [
        *[f"{seed}.png" for seed in range(5)],
        "empty.jpg",
        "page.jpeg",
        "5.png",
        "6.png",
    ]
    errors = {Path(row["path"]).name: row["error"] for row in rows if row["error"]}
    assert errors == {"empty.jpg": "empty file (0 bytes)", "page.jpeg": "not an image in a format that Pillow knows"}
    classify = pipeline("image-classification", str(model))
    for row in rows:
        if row["error"]:
            assert row["label"] is row["score"] is row["labels"] is row["scores"] is None
            continue
        expected = classify(row["path"], top_k=3)
        assert row["labels"] == [entry["label"] for entry in expected] and row["label"] == row["labels"][0]
        np.testing.assert_allclose(row["scores"], [entry["score"] for entry in expected], rtol=1e-4)
        assert row["score"] == row["scores"][0]
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]


def test_every_kind_of_input(model, folder, tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    images = [{"bytes": encode(seed), "path": None} for seed in range(5)]
    dataset = Dataset.from_dict({"image": images, "label": [0, 1, 2, 3, 4]}, features=features)
    shards = tmp_path / "shards"
    shards.mkdir()
    dataset.to_parquet(shards / "test-0.parquet")
    (shards / "test-1.parquet").write_bytes(b"PAR1 damaged")
    dataset.save_to_disk(tmp_path / "saved")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for seed in range(3):
            member = tarfile.TarInfo(f"a/{seed}.png")
            member.size = len(encode(seed))
            tar.addfile(member, io.BytesIO(encode(seed)))
    odd = folder / "no suffix"
    photograph(0).save(odd, "PNG")
    inputs = [odd, folder / "*.png", folder / "0.png", shards, tmp_path / "saved", tmp_path / "images.tar"]
    summary = predict(model, inputs, tmp_path / "table.jsonl", batch_size=4, progress=False)
    rows = read(tmp_path / "table.jsonl")
    assert (summary.predicted, summary.broken) == (1 + 5 + 5 + 5 + 3, 1)
    assert [row["path"] for row in rows] == [
        *[str(path) for path in [odd, *sorted(folder.glob("*.png"))]],
        *[f"{shards}/test-0.parquet#{index}" for index in range(5)],
        f"{shards}/test-1.parquet",
        *[f"{tmp_path}/saved#{index}" for index in range(5)],
        *[f"{tmp_path}/images.tar#a/{seed}.png" for seed in range(3)],
    ]
    assert "parquet" in rows[11]["error"]
    by_seed = rows[1:6]
    for group in (rows[6:11], rows[12:17], rows[17:]):
        for row, same in zip(group, by_seed, strict=False):
            assert row["labels"] == same["labels"] and row["scores"] == pytest.approx(same["scores"], rel=1e-4)


@pytest.mark.parametrize(("problem_type", "total"), [("multi_label_classification", None), (None, 1.0)])
def test_scores_are_those_of_the_problem(tmp_path, folder, problem_type, total):
    torch.manual_seed(0)
    classifier = PoolFormerForImageClassification(config(problem_type=problem_type)).eval()
    classifier.save_pretrained(tmp_path / "model")
    PoolFormerImageProcessor().save_pretrained(tmp_path / "model")
    predict(tmp_path / "model", [folder / "0.png"], tmp_path / "t.jsonl", top_k=100, progress=False)
    (row,) = read(tmp_path / "t.jsonl")
    assert len(row["scores"]) == len(NAMES) and row["scores"] == sorted(row["scores"], reverse=True)
    if total is not None:
        assert sum(row["scores"]) == pytest.approx(total)
    else:
        assert sum(row["scores"]) == pytest.approx(len(NAMES) / 2, rel=0.2)


def test_images_of_many_sizes_without_a_crop(model, folder, tmp_path):
    classifier = PoolFormerForImageClassification.from_pretrained(model)
    classifier.save_pretrained(tmp_path / "uncropped")
    PoolFormerImageProcessor(do_resize=False, do_center_crop=False).save_pretrained(tmp_path / "uncropped")
    photograph(1, 64, 32).save(folder / "1.png")
    predict(tmp_path / "uncropped", [folder / "0.png", folder / "1.png"], tmp_path / "t.jsonl", progress=False)
    assert [row["error"] for row in read(tmp_path / "t.jsonl")] == [None, None]


def test_what_cannot_be_done_is_said_first(model, folder, tmp_path):
    table = tmp_path / "t.csv"
    for inputs, output, message in [
        ([folder], tmp_path / "t.xlsx", r"must end in .parquet, .csv, .jsonl"),
        ([folder], folder, r"holds other files, .* for one"),
        ([folder], folder / "0.png" / "t", r"cannot create the folder"),
        ([], table, r"nothing to predict"),
        ([tmp_path / "absent"], table, r"absent: no such file"),
        ([tmp_path / "*.bmp"], table, r"no such file"),
        ([folder / "*.txt"], table, r"no images there"),
    ]:
        with pytest.raises(UserError, match=message):
            predict(model, inputs, output, progress=False)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="no images there"):
        predict(model, [tmp_path / "void"], table, progress=False)
    with pytest.raises(UserError, match="is not a model"):
        predict(tmp_path / "void", [folder], table, progress=False)
    with pytest.raises(UserError, match="no device"):
        predict(model, [folder], table, device="toaster", progress=False)
    with pytest.raises(UserError, match="top_k"):
        predict(model, [folder], table, top_k=0, progress=False)
    assert not table.exists()


def test_a_model_without_a_trained_head_is_refused(folder, tmp_path):
    PoolFormerModel(config()).save_pretrained(tmp_path / "headless")
    PoolFormerImageProcessor().save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="not a trained classifier"):
        predict(tmp_path / "headless", [folder], tmp_path / "t.csv", progress=False)


def test_existing_output_is_kept_unless_told(model, folder, tmp_path):
    table = folder / "t.parquet"
    table.write_bytes(b"precious")
    with pytest.raises(UserError, match="--overwrite"):
        predict(model, [folder], table, progress=False)
    assert table.read_bytes() == b"precious"
    # The old table lies among the inputs and is none of them.
    assert predict(model, [folder], table, overwrite=True, progress=False).broken == 2
    assert len(read(table)) == 9


def test_the_script(model, folder, tmp_path):
    table = tmp_path / "t.csv"
    done = run(model, folder, "--output", table, "--top_k", 2)
    assert done.returncode == 0, done.stderr
    assert "7 images predicted, 2 broken" in done.stdout and str(table) in done.stdout
    assert "empty.jpg: empty file" in done.stderr and "Traceback" not in done.stderr
    assert len(read(table)) == 9

    only_broken = run(model, folder / "empty.jpg", "--output", tmp_path / "u.csv")
    assert only_broken.returncode == 1 and read(tmp_path / "u.csv")[0]["error"]

    refused = run(model, folder, "--output", table)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_interrupted_it_leaves_nothing_behind(model, tmp_path, name):
    (tmp_path / "many").mkdir()
    for index in range(4000):
        (tmp_path / "many" / f"{index}.png").write_bytes(encode(index % 7))
    output = tmp_path / "out" / "t.jsonl"
    process = subprocess.Popen(
        [warm_python(), SCRIPT, model, tmp_path / "many", "--output", output, "--batch_size", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        # A shell starts jobs in the background deaf to SIGINT, and so would be all that they start.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in output.parent.glob(".*partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.Signals[name]
    assert errors.strip().splitlines()[-1] == f"stopped: {output} was not written" and "Traceback" not in errors
    assert list(output.parent.iterdir()) == []


# A folder of parts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Two Parquet files of 26 images in row groups of 5, three image files, a damaged image in each."""
    root = tmp_path / "shards"
    root.mkdir()
    for number in range(2):
        images = [{"bytes": encode(100 * number + seed), "path": None} for seed in range(26)]
        images[11]["bytes"] = b"junk"
        Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()})).to_parquet(
            root / f"{number}.parquet", batch_size=5
        )
    for seed in range(3):
        (root / f"{seed}.png").write_bytes(encode(seed))
    (root / "broken.png").write_bytes(b"junk")
    return root


def fill(model, shards, folder, **options):
    settings = {"batch_size": 3, "part_size": 7, "num_workers": 0, **options}
    return predict(model, [shards], folder, progress=False, **settings)


def parts_of(folder: Path) -> dict[str, list[dict]]:
    return {path.name: read(path) for path in sorted(folder.glob("part-*"))}


def interrupt(after: int):
    count = iter(range(after))
    return lambda: next(count, None) is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parts_in_order_are_the_table(model, shards, tmp_path, num_workers):
    summary = fill(model, shards, tmp_path / "out", num_workers=num_workers)
    assert (summary.predicted, summary.broken, summary.complete) == (53, 3, True)
    assert "53 images predicted, 3 broken (see .broken.csv)" in str(summary)
    parts = parts_of(tmp_path / "out")
    # Whole row groups, of five rows, as many as fit into seven; image files between the Parquet files by themselves.
    assert [len(rows) for rows in parts.values()] == [5, 5, 5, 5, 6, 1, 5, 5, 5, 5, 6, 3]
    fill(model, shards, tmp_path / "table.parquet")
    rows, expected = [row for part in parts.values() for row in part], read(tmp_path / "table.parquet")
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    assert [row["error"] for row in rows] == [row["error"] for row in expected]
    for row, same in zip(rows, expected, strict=True):
        assert row["labels"] == same["labels"]
        if row["labels"]:
            # Other batches, hence other last digits.
            assert row["scores"] == pytest.approx(same["scores"], rel=1e-5)
    stored = json.loads((tmp_path / "out" / ".summary.json").read_text())
    assert stored == {"predicted": 53, "broken": 3, "parts": {name: len(part) for name, part in parts.items()}}
    with open(tmp_path / "out" / ".broken.csv", newline="") as file:
        broken = list(csv.DictReader(file))
    assert [row["path"] for row in broken] == [row["path"] for row in rows if row["error"]]
    assert all(row["error"] == "not an image in a format that Pillow knows" for row in broken)
    assert not list((tmp_path / "out").glob(".*.[pl]*"))


@pytest.mark.parametrize("after", [1, 4, 9, 13])
def test_stopped_and_started_again_the_rows_are_the_same(model, shards, tmp_path, after):
    fill(model, shards, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fill(model, shards, tmp_path / "out", should_stop=interrupt(after))
    done = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in parts_of(tmp_path / "out")}
    assert not list((tmp_path / "out").glob(".*.[pl]*")) and not (tmp_path / "out" / ".summary.json").exists()
    # Killed while it wrote: an unfinished part of a process that is no more.
    (tmp_path / "out" / ".part-00000-of-00015-00009.parquet.1.partial").write_bytes(b"PAR1")
    summary = fill(model, shards, tmp_path / "out")
    assert summary.before == sum(len(rows) for name, rows in parts_of(tmp_path / "out").items() if name in done)
    assert parts_of(tmp_path / "out") == parts_of(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == done
    again = fill(model, shards, tmp_path / "out")
    assert (again.predicted, again.broken, again.before) == (53, 3, 56)


def test_processes_share_the_shards_and_may_change_in_number(model, shards, tmp_path):
    fill(model, shards, tmp_path / "whole")
    first = fill(model, shards, tmp_path / "out", process_index=1, num_processes=3)
    assert not first.complete and "not complete yet" in str(first)
    with pytest.raises(KeyboardInterrupt):
        fill(model, shards, tmp_path / "out", process_index=0, num_processes=3, should_stop=interrupt(3))
    assert not fill(model, shards, tmp_path / "out", process_index=0, num_processes=2).complete
    last = fill(model, shards, tmp_path / "out", process_index=1, num_processes=2)
    assert last.complete and (last.predicted, last.broken) == (53, 3)
    assert parts_of(tmp_path / "out") == parts_of(tmp_path / "whole")
    # More processes than shards.
    assert fill(model, shards, tmp_path / "out", process_index=40, num_processes=41).complete


def test_what_is_done_is_not_read_again(model, folder, tmp_path):
    (folder / "below" / "extra.png").write_bytes(encode(50))
    options = {"part_size": 4, "batch_size": 2, "num_workers": 0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        predict(model, [folder], tmp_path / "out", should_stop=interrupt(3), **options)
    for seed in range(4):
        file = folder / f"{seed}.png"
        facts = file.stat()
        file.write_bytes(b"?" * facts.st_size)  # unread, these bytes do not count
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert predict(model, [folder], tmp_path / "out", **options).broken == 2
    assert all(row["error"] is None for row in parts_of(tmp_path / "out")["part-00000-of-00003-00000.parquet"])


def test_a_tar_is_entered_again_in_the_middle(model, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for seed in range(9):
            member = tarfile.TarInfo(f"{seed}.png")
            member.size = len(encode(seed))
            tar.addfile(member, io.BytesIO(encode(seed)))
    with pytest.raises(KeyboardInterrupt):
        fill(model, tmp_path / "images.tar", tmp_path / "out", part_size=4, batch_size=2, should_stop=interrupt(3))
    assert list(parts_of(tmp_path / "out")) == ["part-00000-of-00001-00000.parquet"]
    fill(model, tmp_path / "images.tar", tmp_path / "out", part_size=4, batch_size=2)
    names = [row["path"] for part in parts_of(tmp_path / "out").values() for row in part]
    assert names == [f"{tmp_path}/images.tar#{seed}.png" for seed in range(9)]


def test_a_damaged_part_is_made_again(model, shards, tmp_path):
    fill(model, shards, tmp_path / "out")
    expected = parts_of(tmp_path / "out")
    victim = tmp_path / "out" / list(expected)[3]
    victim.write_bytes(victim.read_bytes()[:-20])
    (tmp_path / "out" / list(expected)[5]).unlink()
    assert fill(model, shards, tmp_path / "out").complete
    assert parts_of(tmp_path / "out") == expected


def test_another_jobs_folder_is_refused(model, shards, tmp_path):
    out = tmp_path / "out"
    fill(model, shards, out)
    expected = parts_of(out)
    other = PoolFormerForImageClassification.from_pretrained(model)
    with torch.no_grad():
        other.classifier.bias.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    PoolFormerImageProcessor.from_pretrained(model).save_pretrained(tmp_path / "other")
    for changes, message in [
        ({"model": tmp_path / "other"}, "another model"),
        ({"top_k": 3}, "top_k 5 instead of 3"),
        ({"part_size": 8}, "part_size 7 instead of 8"),
        ({"embeddings": True}, "columns"),
        ({"shards": shards / "0.parquet"}, "other images"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            fill(**{"model": model, "shards": shards, "folder": out, **changes})
        assert "--overwrite" in str(caught.value)
    assert parts_of(out) == expected
    (out / "notes.txt").write_text("mine")
    fill(tmp_path / "other", shards, out, overwrite=True)
    assert parts_of(out).keys() == expected.keys() and parts_of(out) != expected
    assert (out / "notes.txt").read_text() == "mine"
    (out / ".manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        fill(model, shards, out)
    with pytest.raises(UserError, match="several processes fill a folder"):
        fill(model, shards, tmp_path / "t.csv", process_index=0, num_processes=2)


def test_storage_out_of_reach_is_waited_for_and_never_taken_for_the_end(model, tmp_path, monkeypatch):
    from datasets import IterableDataset

    from hf_poolformer.foundation import faults
    from hf_poolformer.prediction import inputs, run

    failures = []

    def rows():
        for seed in range(10):
            if seed == 6 and failures:
                raise failures.pop()
            yield {"image": {"bytes": encode(seed), "path": None}}

    class Remote(inputs.Images):
        count = 10

        def shards(self, size):
            stream = IterableDataset.from_generator(rows, features=Features({"image": ImageFeature(decode=False)}))
            return [inputs.StreamShard(stream, "image", "remote", 10, by_name=False)]

    monkeypatch.setattr(run, "find_images", lambda *_, **__: [Remote()])
    monkeypatch.setattr(faults, "DELAYS", (0.0, 0.0))
    options = {"part_size": 4, "batch_size": 4, "num_workers": 0, "progress": False}
    failures[:] = [ConnectionResetError("reset"), TimeoutError("slow")]
    predict(model, [], tmp_path / "once", **options)
    failures[:] = [ConnectionResetError("reset")] * 3
    with pytest.raises(UserError, match=r"reading failed at remote after 6 images: reset.*same command"):
        predict(model, [], tmp_path / "twice", **options)
    assert list(parts_of(tmp_path / "twice")) == ["part-00000-of-00001-00000.parquet"]
    assert predict(model, [], tmp_path / "twice", **options).before == 4
    assert parts_of(tmp_path / "once") == parts_of(tmp_path / "twice")
    paths = [row["path"] for part in parts_of(tmp_path / "once").values() for row in part]
    assert paths == [f"remote#{index}" for index in range(10)]
    failures[:] = [ValueError("damaged")]
    summary = predict(model, [], tmp_path / "damaged", **options)
    assert (summary.predicted, summary.broken) == (6, 1)


def test_a_full_disk_costs_a_part(model, shards, tmp_path, run_python):
    code = """
import resource, sys
from hf_poolformer.prediction import predict
from hf_poolformer.foundation.errors import UserError
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model, shards, out = sys.argv[1:]
options = {"batch_size": 3, "part_size": 7, "num_workers": 0, "progress": False, "embeddings": True}
count = iter(range(6))
def limit():
    if next(count, None) is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    predict(model, [shards], out, should_stop=limit, **options)
except UserError as error:
    print(error)
"""
    done = run_python(code, model, shards, tmp_path / "out")
    assert "cannot be written" in done.stdout and "File too large" in done.stdout
    assert 0 < len(parts_of(tmp_path / "out")) < 8 and not list((tmp_path / "out").glob(".*.[pl]*"))
    fill(model, shards, tmp_path / "out", embeddings=True)
    fill(model, shards, tmp_path / "whole", embeddings=True)
    assert parts_of(tmp_path / "out") == parts_of(tmp_path / "whole")


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_embeddings_are_what_the_head_takes(model, folder, tmp_path, suffix):
    predict(model, [folder], tmp_path / f"t.{suffix}", embeddings=True, batch_size=4, progress=False)
    rows = read(tmp_path / f"t.{suffix}")
    classifier = PoolFormerForImageClassification.from_pretrained(model).eval()
    for row in rows:
        embedding = row["embedding"]
        if row["error"]:
            assert embedding is None
            continue
        embedding = torch.tensor(json.loads(embedding) if isinstance(embedding, str) else embedding)
        assert embedding.shape == (64,)
        with torch.no_grad():
            scores = classifier.classifier(embedding).softmax(-1).sort(descending=True).values
        torch.testing.assert_close(scores[:5], torch.tensor(row["scores"]), rtol=1e-4, atol=1e-6)
    if suffix == "parquet":
        stored = pq.read_schema(tmp_path / "t.parquet").field("embedding").type
        assert str(stored).startswith("fixed_size_list<") and str(stored).endswith("float>[64]")


def test_embeddings_of_a_model_without_a_head(folder, tmp_path):
    torch.manual_seed(0)
    bare = PoolFormerModel(config()).eval()
    bare.save_pretrained(tmp_path / "headless")
    PoolFormerImageProcessor().save_pretrained(tmp_path / "headless")
    fill(tmp_path / "headless", folder / "0.png", tmp_path / "out", embeddings=True)
    fill(tmp_path / "headless", folder / "0.png", tmp_path / "out", embeddings=True)  # the same job, whatever its head
    (rows,) = parts_of(tmp_path / "out").values()
    assert rows[0].keys() == {"path", "embedding", "error"}
    pixels = PoolFormerImageProcessor()(Image.open(folder / "0.png"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = bare(pixels).pooler_output[0]
    torch.testing.assert_close(torch.tensor(rows[0]["embedding"]), expected, rtol=1e-4, atol=1e-6)


def test_files_need_no_datasets(model, folder, tmp_path, run_python):
    code = """
import sys
sys.modules["datasets"] = None
from hf_poolformer.prediction import predict
from hf_poolformer.foundation.errors import UserError
model, folder, table = sys.argv[1:]
assert predict(model, [folder], table, progress=False).predicted == 7
open(folder + "/a.parquet", "wb").write(b"PAR1")
assert predict(model, [folder + "/0.png", folder], table, overwrite=True, progress=False).predicted == 7
assert "hf-poolformer[train]" in open(table).read()
"""
    run_python(code, model, folder, tmp_path / "t.csv")
