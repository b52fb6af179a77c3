"""A pass over a dataset: a row for each image, whatever it is stored in, whatever is broken, whatever kills it."""

import json
import os
import shutil
import signal
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clouds import picture
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from digits import make_checkpoint  # noqa: F401
from killed import FORK

from hf_poolformer.data.datasets import open_every_split
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.reports.scan import scan


CLASSES = ["ape", "bear"]


def write_folder(root, counts, start=0):
    for number, (split, count) in enumerate(counts.items()):
        for index in range(count):
            folder = root / split / CLASSES[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            picture(start + 1000 * number + index).save(folder / f"{index:03d}.png")
    return root


def scanned(data, out, progress=False, num_workers=0, **options):
    how = {name: options.pop(name) for name in ("problem_type", "validation_dir", "train_dir") if name in options}
    opened = open_every_split(**{"dataset_name": data, **how})
    return scan(out, opened, progress=progress, num_workers=num_workers, **options)


def rows_of(found):
    return found.table.to_table().to_pylist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"), {"train": 70, "validation": 9})


def as_rows(folder, split):
    files = sorted((folder / split).glob("*/*.png"))
    return [{"image": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name} for file in files]


def test_a_folder_of_classes(folder, tmp_path):
    found = scanned(folder, tmp_path / "out")
    rows = rows_of(found)
    assert found.splits == {"train": 70, "validation": 9} and found.complete and found.label_names == CLASSES
    assert [(row["split"], row["position"]) for row in rows] == [
        *(("train", place) for place in range(70)),
        *(("validation", place) for place in range(9)),
    ]
    row = next(row for row in rows if row["path"].endswith(os.path.join("validation", "bear", "003.png")))
    values = np.asarray(picture(1003)) / 255
    size = (folder / "validation" / "bear" / "003.png").stat().st_size
    assert (row["label"], row["format"], row["mode"], row["width"], row["height"], row["bytes"], row["error"]) == (
        *("bear", "PNG", "RGB", 48, 48, size, None),
    )
    np.testing.assert_allclose(row["mean"], values.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(row["std"], values.std((0, 1)), rtol=1e-4)
    # The position leads back to the picture.
    stream = found.opened["train"].dataset.stream
    assert [row["image"]["path"] for row in stream] == [row["path"] for row in rows if row["split"] == "train"]


def write_parquet(folder, root):
    for split in ("train", "validation"):
        rows = as_rows(folder, split)
        root.mkdir(exist_ok=True)
        for number in range(2):  # several files, several row groups
            part = Dataset.from_list(rows[number::2]).cast_column("label", ClassLabel(names=CLASSES))
            part.cast_column("image", ImageFeature()).to_parquet(root / f"{split}-{number}.parquet", batch_size=8)


def write_tars(folder, root):
    root.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(root / f"{split}-0.tar", "w") as tar:
            for index, file in enumerate(sorted((folder / split).glob("*/*.png"))):
                tar.add(file, f"{index:04d}.png")
                text = tmp = root / "cls"
                text.write_text(file.parent.name)
                tar.add(tmp, f"{index:04d}.cls.txt")
                tmp.unlink()


def write_saved(folder, root):
    parts = {split: Dataset.from_list(as_rows(folder, split)) for split in ("train", "validation")}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    DatasetDict({split: part.cast(features) for split, part in parts.items()}).save_to_disk(root)


@pytest.mark.parametrize("write", [write_parquet, write_tars, write_saved])
def test_the_same_images_in_other_layouts(folder, tmp_path, write):
    write(folder, tmp_path / "data")
    found = scanned(tmp_path / "data", tmp_path / "out", part_size=20)
    rows, expected = rows_of(found), rows_of(scanned(folder, tmp_path / "expected"))

    def contents(rows):
        return sorted((row["split"], row["digest"], row["label"], row["width"], row["error"]) for row in rows)

    assert contents(rows) == contents(expected)
    assert len({row["path"] for row in rows}) == len(rows)
    for split, opened in found.opened.items():
        mine = [row for row in rows if row["split"] == split]
        assert [row["position"] for row in mine] == list(range(len(mine)))
        stored = [row[opened.dataset.image_column]["bytes"] for row in opened.dataset.stream]
        assert [len(data) for data in stored] == [row["bytes"] for row in mine]


def test_broken_files_of_every_kind_are_rows_with_a_reason(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 6})
    place = data / "train" / "ape"
    whole = (place / "000.png").read_bytes()
    picture(5).save(tmp_path / "whole.jpg")
    broken = {
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:700],
        "empty.png": b"",
        "text.jpg": b"<html>404</html>",
        "bomb.png": whole[:16] + (60000).to_bytes(4, "big") + (60000).to_bytes(4, "big") + whole[24:],
    }
    for name, content in broken.items():
        (place / name).write_bytes(content)
    (place / "gone.png").symlink_to(tmp_path / "nowhere.png")
    rows = {os.path.basename(row["path"]): row for row in rows_of(scanned(data, tmp_path / "out"))}
    assert len(rows) == 6 + len(broken) + 1
    for name in (*broken, "gone.png"):
        assert rows[name]["error"] and rows[name]["pixel_digest"] is rows[name]["thumbnail"] is None, name
        assert rows[name]["label"] == "ape"
    assert rows["cut.jpg"]["format"] == "JPEG" and rows["cut.jpg"]["width"] == 48
    assert "empty" in rows["empty.png"]["error"] and "no such file" in rows["gone.png"]["error"]
    assert sum(row["error"] is None for row in rows.values()) == 6


def test_several_labels_numbers_and_none(tmp_path):
    image = {"bytes": None, "path": None}

    def write(name, rows, **features):
        rows = [{"image": encoded(index), **row} for index, row in enumerate(rows)]
        Dataset.from_list(rows, features=Features({"image": ImageFeature(), **features})).to_parquet(tmp_path / name)
        return tmp_path / name

    def encoded(index):
        picture(index, 16).save(tmp_path / "one.png")
        return {**image, "bytes": (tmp_path / "one.png").read_bytes()}

    several = [{"tags": tags} for tags in (["red", "round"], [], ["round"], None)] * 3
    found = scanned(write("several.parquet", several, tags=List(Value("string"))), tmp_path / "several")
    assert found.problem_type == "multi_label_classification" and found.label_names == ["red", "round"]
    assert [row["labels"] for row in rows_of(found)][:4] == [["red", "round"], [], ["round"], None]

    numbers = [{"score": value} for value in (0.5, 2.0, float("nan"), -1.0)] * 3
    found = scanned(write("numbers.parquet", numbers, score=Value("float32")), tmp_path / "numbers")
    assert found.problem_type == "regression"
    assert [row["targets"] for row in rows_of(found)][:4] == [[0.5], [2.0], None, [-1.0]]

    found = scanned(write("none.parquet", [{}] * 3), tmp_path / "none")
    assert found.problem_type is None and found.label_column is None and found.splits == {"train": 3}
    assert "without labels" in found.remarks[0]
    assert not {"label", "labels", "targets"} & set(found.table.schema.names)


def test_a_split_whose_labels_are_others_is_read_all_the_same(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 6, "validation": 4})
    (data / "validation" / "bear").rename(data / "validation" / "yak")
    found = scanned(data, tmp_path / "out")
    labels = {row["label"] for row in rows_of(found) if row["split"] == "validation"}
    assert labels == {"ape", "yak"}


def test_validation_data_in_a_folder_of_its_own(folder, tmp_path):
    found = scanned(None, tmp_path / "out", train_dir=folder / "train", validation_dir=folder / "validation")
    assert found.splits == {"train": 70, "validation": 9}


def scan_and_die(data, out, after, options):
    seen = iter(range(after))

    def stop():
        if next(seen, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    scanned(data, out, should_stop=stop, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_continued_it_is_as_in_one_go(folder, tmp_path, workers):
    options = {"part_size": 10, "batch_size": 4}
    expected = scanned(folder, tmp_path / "expected", **options).table.to_table()
    for after in (1, 8, 13):
        process = FORK.Process(
            target=scan_and_die, args=(folder, tmp_path / "out", after, {**options, "num_workers": workers})
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "out" / "images.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / ".scan").glob("part-*")}
    assert len(before) > 3
    found = scanned(folder, tmp_path / "out", **options, num_workers=workers)
    assert found.table.to_table().equals(expected)
    assert before == {path: path.stat().st_mtime_ns for path in before}  # what was there was not made again
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_interrupted_it_keeps_what_is_whole(folder, tmp_path):
    calls = iter([False] * 6)
    with pytest.raises(KeyboardInterrupt):
        scanned(folder, tmp_path / "out", part_size=10, batch_size=4, should_stop=lambda: next(calls, True))
    assert list((tmp_path / "out" / ".scan").glob("part-*"))
    assert scanned(folder, tmp_path / "out", part_size=10, batch_size=4).splits == {"train": 70, "validation": 9}


def test_only_what_has_changed_is_read_again(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 70})
    scanned(data, tmp_path / "out", part_size=40)
    parts = sorted((tmp_path / "out" / ".scan").glob("part-*"))
    times = [path.stat().st_mtime_ns for path in parts]
    whole = (tmp_path / "out" / "images.parquet").stat().st_mtime_ns
    scanned(data, tmp_path / "out", part_size=40)
    assert (tmp_path / "out" / "images.parquet").stat().st_mtime_ns == whole
    (data / "train" / "ape" / "004.png").write_bytes(b"broken")
    rows = rows_of(scanned(data, tmp_path / "out", part_size=40))
    assert [os.path.basename(row["path"]) for row in rows if row["error"]] == ["004.png"]
    assert sum(path.stat().st_mtime_ns != time for path, time in zip(parts, times, strict=True)) == 1
    picture(77).save(data / "train" / "ape" / "new.png")
    assert scanned(data, tmp_path / "out", part_size=40).splits == {"train": 71}


def test_labels_that_have_changed_in_a_table_are_read_again(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for index in range(4):
        picture(index).save(data / f"{index}.png")
    lines = ["file_name,label", "0.png,ape", "1.png,bear", "2.png,ape", "3.png,bear"]
    (data / "metadata.csv").write_text("\n".join(lines))
    assert sorted(row["label"] for row in rows_of(scanned(data, tmp_path / "out"))) == ["ape", "ape", "bear", "bear"]
    (data / "metadata.csv").write_text("\n".join(lines).replace("0.png,ape", "0.png,bear"))
    assert sorted(row["label"] for row in rows_of(scanned(data, tmp_path / "out"))) == ["ape", "bear", "bear", "bear"]


def test_another_dataset_does_not_take_a_scans_place(folder, tmp_path):
    scanned(folder, tmp_path / "out")
    other = write_folder(tmp_path / "other", {"train": 4})
    with pytest.raises(UserError, match="--overwrite"):
        scanned(other, tmp_path / "out")
    assert scanned(other, tmp_path / "out", overwrite=True).splits == {"train": 4}


def test_a_sample_is_spread_over_each_split(folder, tmp_path):
    rows = sorted(as_rows(folder, "train"), key=lambda row: row["label"])
    data = tmp_path / "sorted.parquet"
    part = Dataset.from_list(rows).cast_column("label", ClassLabel(names=CLASSES))
    part.cast_column("image", ImageFeature()).to_parquet(data, batch_size=10)
    found = scanned(data, tmp_path / "out", max_images=7)
    sample = rows_of(found)
    assert [row["position"] for row in sample] == [5, 15, 25, 35, 45, 55, 65] and not found.complete
    assert {row["label"] for row in sample} == set(CLASSES)
    digests = {row["position"]: row["digest"] for row in rows_of(scanned(data, tmp_path / "all"))}
    assert all(digests[row["position"]] == row["digest"] for row in sample)
    found = scanned(folder, tmp_path / "of-folder", max_images=20)
    assert found.splits == {"train": 20, "validation": 9}


def test_hostile_names(tmp_path):
    data = tmp_path / "data"
    names = ["<script>alert(1)</script>", "new\nline", "quo\"te's", "\u202eright to left"]
    for index, name in enumerate(names):
        place = os.fsencode(data) + b"/" + os.fsencode(name.replace("/", "\u2215"))
        os.makedirs(place)
        picture(index).save(tmp_path / "one.png")
        shutil.copy(tmp_path / "one.png", place + b"/caf\xe9 \xff.png")
    rows = rows_of(scanned(data, tmp_path / "out"))
    assert {row["label"] for row in rows} == {name.replace("/", "\u2215") for name in names}
    assert all(row["error"] is None and row["path"].endswith("caf\\xe9 \\xff.png") for row in rows)


def test_features_of_a_model(folder, tmp_path, make_checkpoint):  # noqa: F811
    broken = tmp_path / "data"
    shutil.copytree(folder, broken)
    (broken / "train" / "ape" / "000.png").write_bytes(b"broken")
    found = scanned(broken, tmp_path / "out", model=make_checkpoint(), device="cpu", batch_size=16)
    rows = rows_of(found)
    assert found.embedded and found.table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert [row["embedding"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert len({tuple(row["embedding"]) for row in rows if row["embedding"]}) == 78
    with pytest.raises(UserError, match="model"):
        scanned(broken, tmp_path / "out")


def test_channels_other_than_colours(tmp_path):
    for index in range(3):
        place = tmp_path / "data" / CLASSES[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{index}.npy", np.random.default_rng(index).integers(0, 255, (20, 30, 5), np.uint8))
    rows = rows_of(scanned(tmp_path / "data", tmp_path / "out", num_channels=5))
    assert [(row["format"], row["mode"], row["width"], len(row["mean"])) for row in rows] == [
        ("array", "uint8", 30, 5)
    ] * 3


def test_the_file_says_what_it_is_of(folder, tmp_path):
    found = scanned(folder, tmp_path / "out")
    told = json.loads(pq.read_metadata(found.file).metadata[b"hf_poolformer"])
    assert told["splits"] == found.splits and told["label_names"] == CLASSES and told["complete"]
