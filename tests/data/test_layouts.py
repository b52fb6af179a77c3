"""Layouts of folders as people have them: read as they are meant, or refused with what would work."""

import importlib.util
import io
import json
import logging
import os
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from hf_poolformer.data import files
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.layouts import open_source
from hf_poolformer.data.loader import make_loader
from hf_poolformer.foundation.errors import UserError


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(root, *names, count=None):
    """Images of these names; with `count`, so many in each of these folders."""
    if count:
        names = [f"{name}/{index}.jpg" for name in names for index in range(count)]
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(zlib.crc32(name.encode())))
    return root


def rows(root, split="train", **arguments):
    """(name of the file, name of its class) of each row."""
    dataset = open_datasets(dataset_name=root, train_val_split=0, **arguments)[split]
    names = dataset.label_names
    found = []
    for row in dataset.stream:
        label = row[dataset.label_column]
        index = dataset.classes.index(label)
        found.append((os.path.relpath(row[dataset.image_column]["path"], root), names[index]))
    assert dataset.num_examples == len(found)
    return sorted(found)


def counts(root, **arguments):
    opened = open_datasets(dataset_name=root, **arguments)
    return {split: (dataset.num_examples, dataset.label_names) for split, dataset in opened.items()}


PETS = ("cat", "dog")


def in_splits(root, *splits, count=4, classes=PETS):
    return put(root, *(f"{split}/{name}" for split in splits for name in classes), count=count)


@pytest.mark.parametrize(
    "train, held_out",
    [
        ("train", "val"),
        ("animals/train", "animals/valid"),
        ("a/b/Training", "a/b/Validation"),
        ("training_set", "test_set"),
        ("train_images", "val_images"),
        ("train2017", "val2017"),
        ("trainset", "testset"),
        ("TrainData", "TestData"),
        ("birds-train", "birds-val"),
    ],
)
def test_split_folders_are_found(tmp_path, train, held_out):
    in_splits(tmp_path, train)
    in_splits(tmp_path, held_out, count=2)
    assert counts(tmp_path) == {"train": (8, list(PETS)), "validation": (4, list(PETS))}
    source = open_source(tmp_path)
    assert source.split_origin("train") == f"folder {train.rpartition('/')[2]}"


@pytest.mark.parametrize(
    "beside, count", [("unlabeled", 3), ("samples", 1), ("test-of-all", 5), ("more/of/them", 2), ("winter/cat", 2)]
)
def test_a_folder_beside_the_splits_is_left_out_and_named(tmp_path, caplog, beside, count):
    in_splits(tmp_path, "train", "test")
    put(tmp_path, beside, count=count)
    assert counts(tmp_path) == {"train": (8, list(PETS)), "validation": (8, list(PETS))}
    assert f"left out: {beside.partition('/')[0]} ({count})" in caplog.text
    assert open_source(tmp_path).left_out == {".jpg": count}


def test_train_alone_beside_one_other_folder(tmp_path, caplog):
    put(in_splits(tmp_path, "train"), "extra", count=3)
    assert counts(tmp_path, train_val_split=0) == {"train": (8, list(PETS))}
    assert "extra (3)" in caplog.text


@pytest.mark.parametrize(
    "folders, message",
    [
        (["train/cat", "train/dog", "cat", "dog"], r"--train_dir .*train\), or move"),
        (["train/cat", "train/dog", "val/cat", "val/dog", "cat"], r"--train_dir .*train --validation_dir .*val\)"),
        (["train/steam", "train/diesel", "bus", "car"], "look like splits"),
        (["train/cat", "train/dog", "winter/cat", "winter/dog"], "look like splits"),
        (["val/cat", "val/dog", "pictures/cat", "pictures/dog"], "--validation_dir"),
        (["cat", "dog", "test"], "named like splits"),
        (["cat", "dog", "train", "val"], "named like splits"),
        (["train", "unlabeled"], "named like splits"),
        (["train/cat", "val/cat", "validation/cat"], "two directories for one split"),
    ],
)
def test_splits_that_cannot_be_told_from_classes_are_refused(tmp_path, folders, message):
    put(tmp_path, *folders, count=2)
    with pytest.raises(UserError, match=message):
        open_datasets(dataset_name=tmp_path)


@pytest.mark.parametrize(
    "classes", [["bus", "car", "train"], ["freight train", "test tube"], ["testimony", "training shoes", "value"]]
)
def test_words_of_splits_in_class_names_are_no_splits(tmp_path, classes):
    put(tmp_path, *classes, count=2)
    assert counts(tmp_path, train_val_split=0) == {"train": (2 * len(classes), classes)}


def test_splits_below_the_classes(tmp_path):
    put(tmp_path, *(f"pets/{name}/{split}" for name in PETS for split in ("train", "val", "test")), count=2)
    assert counts(tmp_path) == {"train": (4, list(PETS)), "validation": (4, list(PETS))}
    assert rows(tmp_path, "validation")[0] == ("pets/cat/val/0.jpg", "cat")


def test_a_test_folder_of_its_own_name_has_no_class(tmp_path):
    put(in_splits(tmp_path, "train"), "test/test", count=5)
    found = counts(tmp_path, train_val_split=0.4)
    assert set(found) == {"train", "validation"} and sum(number for number, _ in found.values()) == 8


def test_sub_folders_of_classes_are_told(tmp_path, caplog):
    put(tmp_path, "cat/indoors", "cat/outdoors", "dog", count=2)
    assert counts(tmp_path, train_val_split=0) == {"train": (6, list(PETS))}
    assert "in cat: indoors, outdoors" in caplog.text


def test_litter_is_nobodys_data(tmp_path):
    put(tmp_path, *PETS, count=2)
    put(tmp_path, "cat/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/cat/0.jpg", "#recycle/a.jpg", "cat/._0.jpg")
    put(tmp_path, ".thumbnails/a.jpg", "$RECYCLE.BIN/a.jpg", "lost+found/a.jpg", "cat/.ipynb_checkpoints/a.jpg")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"thumbs")
    source = open_source(tmp_path)
    assert source.left_out == {} and source.open("train").num_examples == 4
    assert len(files.match_pattern(f"{tmp_path}/**/*.jpg")) == 4
    # A folder that is named itself is looked at, whatever its name.
    assert len(list(files.list_files(tmp_path / "lost+found"))) == 1


@pytest.mark.parametrize(
    "marks",
    [
        ["training_settings.yaml"],
        ["config.json", "model.safetensors"],
        ["all_results.json"],
        ["ablation.md"],
        ["part-00000-of-00001-00000.parquet"],
    ],
)
@pytest.mark.parametrize("place", ["results", "cat/results"])
def test_folders_of_results_are_not_read(tmp_path, caplog, marks, place):
    put(tmp_path, *PETS, count=2)
    put(tmp_path, f"{place}/curves.png", f"{place}/evaluation/confusion_matrix.png")
    for mark in marks:
        (tmp_path / place / mark).touch()
    assert counts(tmp_path, train_val_split=0) == {"train": (4, list(PETS))}
    assert caplog.text.count("holds results") == 1 and "is no class" not in caplog.text
    assert {path.suffix for path in files.match_pattern(f"{tmp_path}/**/*.*g")} == {".jpg"}
    assert list(files.list_files(tmp_path / place))


def test_files_are_counted_by_kind_and_images_without_a_suffix_are_read(tmp_path):
    put(tmp_path, *PETS, count=2)
    for index, kind in enumerate(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]):
        (tmp_path / "cat" / f"{index:04d}").write_bytes(encoded(index, kind))
        (tmp_path / "dog" / f"{index}.jpg!large").write_bytes(encoded(index, kind))
    (tmp_path / "cat" / "README").write_text("no picture")
    (tmp_path / "cat" / "raw.nef").write_bytes(encoded(9, "TIFF"))
    for index in range(3):
        (tmp_path / "dog" / f"{index}.txt").write_text("a dog")
    source = open_source(tmp_path)
    assert source.left_out == {".txt": 3, ".nef": 1, "without suffix": 1}
    assert source.open("train").num_examples == 4 + 12


def test_heic(tmp_path, monkeypatch, caplog, request):
    request.addfinalizer(files.image_suffixes.cache_clear)
    put(tmp_path, *PETS, count=2)
    for index in range(3):
        (tmp_path / "dog" / f"{index}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))

    def installed(answer):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: answer if name == "pillow_heif" else find(name))
        files.image_suffixes.cache_clear()

    installed(None)
    assert open_source(tmp_path).left_out == {".heic": 3}
    assert "3 .heic (pip install pillow-heif" in caplog.text
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "a.heif").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    with pytest.raises(UserError, match=r"bird would be no class.*1 \.heif.*pip install pillow-heif"):
        open_source(tmp_path)
    installed(object())
    assert open_source(tmp_path).open("train").num_examples == 4 + 4


def test_a_class_without_images_is_named(tmp_path, caplog):
    put(tmp_path, *PETS, count=2)
    (tmp_path / "eel").mkdir()
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "notes.txt").write_text("none yet")
    assert counts(tmp_path, train_val_split=0) == {"train": (4, list(PETS))}
    assert "eel is no class: it holds no image (no files)" in caplog.text
    assert "fox is no class: it holds no image (1 .txt)" in caplog.text


def write_metadata(path, names, labels, columns=("file_name", "label"), encoding="utf-8", delimiter=","):
    lines = [delimiter.join(columns), *(delimiter.join(map(str, row)) for row in zip(names, labels, strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


def test_metadata_in_the_root_tells_of_splits(tmp_path):
    names = [f"{split}/{index}.jpg" for split in ("train", "val") for index in range(6)]
    put(tmp_path, *names)
    write_metadata(tmp_path / "metadata.csv", names, ["ab"[index % 2] for index in range(12)])
    assert counts(tmp_path) == {"train": (6, ["a", "b"]), "validation": (6, ["a", "b"])}
    assert rows(tmp_path, "validation") == [(name, "ab"[index % 2]) for index, name in enumerate(names[6:])]
    assert open_source(tmp_path).split_origin("train") == "rows of metadata.csv for folder train"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_one_metadata_file_for_each_split(tmp_path, kind):
    for split, count in (("train", 8), ("test", 4)):
        names = [f"{index}.jpg" for index in range(count)]
        put(tmp_path / split, *names)
        table = pa.table({"file_name": names, "label": ["ab"[index % 2] for index in range(count)]})
        path = tmp_path / split / f"metadata.{kind}"
        if kind == "csv":
            write_metadata(path, *table.to_pydict().values())
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        else:
            pq.write_table(table, path)
    assert counts(tmp_path) == {"train": (8, ["a", "b"]), "validation": (4, ["a", "b"])}


def test_names_of_files_are_no_splits(tmp_path):
    names = ["train in the rain.jpg", "test tubes.jpg", "val.jpg", *(f"{index}.jpg" for index in range(5))]
    write_metadata(put(tmp_path, *names) / "metadata.csv", names, list("abababab"))
    assert counts(tmp_path, train_val_split=0) == {"train": (8, ["a", "b"])}


def test_a_class_named_like_a_split_in_metadata(tmp_path):
    names = [f"{name}/{index}.jpg" for name in ("bus", "train") for index in range(4)]
    write_metadata(put(tmp_path, *names) / "metadata.csv", names, list("aabbaabb"))
    assert counts(tmp_path, train_val_split=0) == {"train": (8, ["a", "b"])}


def test_a_column_called_split(tmp_path):
    names = [f"{index}.jpg" for index in range(8)]
    lines = [f"{name},{'ab'[index % 2]},{'val' if index > 5 else 'train'}" for index, name in enumerate(names)]
    (put(tmp_path, *names) / "metadata.csv").write_text("\n".join(["file_name,label,split", *lines]))
    assert counts(tmp_path) == {"train": (6, ["a", "b"]), "validation": (2, ["a", "b"])}


@pytest.mark.parametrize(
    "labels", [["None", "NA"], ["nan", "null"], ["007", "08"], ["true", "false"], ["2020-01-01", "1e"], ["inf", "nan"]]
)
@pytest.mark.parametrize("many", [False, True])
def test_words_in_csv_stay_words(tmp_path, labels, many):
    names = [f"{index}.jpg" for index in range(120 if many else 4)]
    chosen = [labels[index % 2] for index in range(len(names))]
    write_metadata(put(tmp_path, *names) / "metadata.csv", names, chosen)
    assert rows(tmp_path) == sorted(zip(names, chosen, strict=True))


def test_numbers_in_csv_are_numbers_and_empty_cells_are_null(tmp_path):
    names = [f"{index}.jpg" for index in range(4)]
    lines = ["0.jpg,3,0.5,x", '1.jpg,,nan,""', "2.jpg,-1,2,y", "3.jpg,12,,"]
    (put(tmp_path, *names) / "metadata.csv").write_text("\n".join(["file_name,label,weight,note", *lines]))
    found = {row["image"]["path"][-5]: row for row in open_source(tmp_path).open("train").stream}
    assert [found[key]["label"] for key in "0123"] == [3, None, -1, 12]
    assert [found[key]["weight"] for key in "0123"] == [0.5, None, 2.0, None]
    assert [found[key]["note"] for key in "0123"] == ["x", None, "y", None]


@pytest.mark.parametrize("encoding, delimiter", [("utf-8-sig", ","), ("utf-16", ","), ("utf-8", ";"), ("utf-8", "\t")])
def test_csv_as_spreadsheets_write_it(tmp_path, encoding, delimiter):
    names = ["große katze.jpg", "sub/b.jpg", "c.jpg"]
    put(tmp_path, *names)
    listed = ["große katze.jpg", "sub\\b.jpg", " c.jpg"]  # decomposed, from Windows, with a blank
    write_metadata(tmp_path / "metadata.csv", listed, "xyx", encoding=encoding, delimiter=delimiter)
    assert rows(tmp_path) == sorted(zip(names, "xyx", strict=True))


def test_csv_in_another_encoding_is_refused(tmp_path):
    write_metadata(put(tmp_path, "a.jpg") / "metadata.csv", ["a.jpg"], ["Hündin"], encoding="latin-1")
    with pytest.raises(UserError, match=r"metadata.csv cannot be read: .*UTF8"):
        open_source(tmp_path)


def test_rows_without_files_and_files_without_rows_are_counted(tmp_path, caplog):
    put(tmp_path, *(f"{index}.jpg" for index in range(6)))
    write_metadata(tmp_path / "metadata.csv", [f"{index}.jpg" for index in range(2, 9)], "abababa")
    source = open_source(tmp_path)
    assert source.left_out == {"rows whose file is not there": 3, "images without a row": 2}
    assert source.open("train").num_examples == 4
    assert "3 rows whose file is not there" in caplog.text and "6.jpg, for one, is not there" in caplog.text
    write_metadata(tmp_path / "metadata.csv", ["elsewhere/1.jpg", "../2.jpg"], "ab")
    with pytest.raises(UserError, match=r"none of the 2 files that metadata\.csv names is there"):
        open_source(tmp_path)
    write_metadata(tmp_path / "metadata.csv", ["1.jpg"], "a", columns=("file", "label"))
    assert open_source(tmp_path).open("train").num_examples == 1
    write_metadata(tmp_path / "metadata.csv", ["one"], "a", columns=("file", "label"))
    with pytest.raises(UserError, match="no column file_name, only file, label"):
        open_source(tmp_path)


def test_metadata_with_objects_and_maps(tmp_path):
    put(tmp_path, "1.jpg", "maps/1.png")
    row = {"file_name": "1.jpg", "mask_file_name": "maps/1.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [5]}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = open_source(tmp_path).open("train").stream
    assert found["image"]["path"].endswith("1.jpg") and found["mask"]["path"].endswith("maps/1.png")
    assert found["objects"] == row["objects"]


@pytest.mark.parametrize(
    "table, columns, named",
    [
        ("labels.csv", ("id", "breed"), lambda name: name[:-4]),
        ("train.csv", ("image_id", "label"), lambda name: name),
        ("truth.tsv", ("filename", "class"), lambda name: f"elsewhere/{name}"),
    ],
)
@pytest.mark.parametrize("folder", ["", "images/", "train/"])
def test_tables_of_competitions(tmp_path, table, columns, named, folder):
    names = [f"{index:04x}.jpg" for index in range(10)]
    put(tmp_path, *(f"{folder}{name}" for name in names))
    labels = ["ab"[index % 2] for index in range(10)]
    delimiter = "\t" if table.endswith("tsv") else ","
    write_metadata(tmp_path / table, [named(name) for name in names], labels, columns, delimiter=delimiter)
    (tmp_path / "sample_submission.csv").write_text("id,a\n0000,0\n0001,0\n")
    assert rows(tmp_path) == [(f"{folder}{name}", label) for name, label in zip(names, labels, strict=True)]


def test_a_table_for_each_split_where_names_come_twice(tmp_path):
    names = [f"{index}.jpg" for index in range(4)]
    put(tmp_path, *(f"{split}/{name}" for split in ("train", "test") for name in names))
    write_metadata(tmp_path / "train.csv", range(4), "abab", ("id", "label"))
    write_metadata(tmp_path / "test.csv", range(4), "bbaa", ("id", "label"))
    assert rows(tmp_path) == [(f"train/{name}", label) for name, label in zip(names, "abab", strict=True)]
    assert rows(tmp_path, "validation") == [(f"test/{name}", label) for name, label in zip(names, "bbaa", strict=True)]


def test_folders_of_classes_go_before_a_table(tmp_path, caplog):
    names = [f"{name}/{index}.jpg" for name in PETS for index in range(3)]
    put(tmp_path, *names)
    write_metadata(tmp_path / "sizes.csv", names, range(6), ("file", "height"))
    assert counts(tmp_path, train_val_split=0) == {"train": (6, list(PETS))}
    assert "sizes.csv is not used" in caplog.text
    write_metadata(tmp_path / "labels.csv", names, ["cat"] * 3 + ["dog"] * 3, ("file", "label"))
    (tmp_path / "sizes.csv").unlink()
    assert counts(tmp_path, train_val_split=0) == {"train": (6, list(PETS))}
    write_metadata(tmp_path / "labels.csv", names, "ababab", ("file", "breed"))
    with pytest.raises(
        UserError, match=r"labels\.csv may tell the classes .* .breed: a, b., and so may their folders"
    ):
        open_source(tmp_path)


def test_a_table_of_images_in_parts(tmp_path):
    names = [f"part_{part}/{part}{index}.jpg" for part in (1, 2) for index in range(3)]
    put(tmp_path, *names)
    write_metadata(tmp_path / "truth.csv", [name[7:-4] for name in names], "abcabc", ("image_id", "label"))
    assert rows(tmp_path) == sorted(zip(names, "abcabc", strict=True))


def test_two_tables_are_not_chosen_between(tmp_path):
    put(tmp_path, "1.jpg", "2.jpg")
    for name in ("mine.csv", "yours.csv"):
        write_metadata(tmp_path / name, [1, 2], "ab", ("id", "label"))
    with pytest.raises(UserError, match=r"several tables that name its images, mine.csv, yours.csv"):
        open_source(tmp_path)


def test_own_predictions_are_no_labels(tmp_path):
    put(tmp_path, "1.jpg", "2.jpg")
    lines = ["path,label,score,labels,scores,error", *(f"{name}.jpg,cat,0.9,,," for name in "12")]
    (tmp_path / "predictions.csv").write_text("\n".join(lines))
    table = pa.table({"path": ["1.jpg", "2.jpg"], "label": ["cat", "dog"], "score": [0.5, 0.5], "error": ["", ""]})
    pq.write_table(table, tmp_path / "predictions.parquet")
    with pytest.raises(UserError, match="no label column"):
        open_datasets(dataset_name=tmp_path)


def test_a_flat_folder_says_what_would_work(tmp_path):
    put(tmp_path, "b.jpg", "a.jpg")
    with pytest.raises(UserError, match=r'one folder for each class.*metadata.csv .*"file_name,label", "a.jpg,cat"'):
        open_datasets(dataset_name=tmp_path)
    put(tmp_path / "yolo", "images/1.jpg")
    (tmp_path / "yolo" / "labels").mkdir()
    (tmp_path / "yolo" / "labels" / "1.txt").write_text("0 .5 .5 .1 .1")
    with pytest.raises(UserError, match="YOLO"):
        open_datasets(dataset_name=tmp_path / "yolo")


@pytest.mark.parametrize(
    "image, mask",
    [
        ("images/{}.jpg", "masks/{}.png"),
        ("images/{}.jpg", "labels/{}_mask.png"),
        ("{split}/images/{}.jpg", "{split}/annotations/{}.png"),
        ("JPEGImages/{split}/{}.jpg", "SegmentationClass/{split}/{}.png"),
        ("deep/img/{split}/x/{}.jpg", "deep/gt/{split}/x/{}.png"),
    ],
)
def test_images_beside_maps(tmp_path, image, mask):
    for split, count in (("training", 4), ("validation", 2)):
        names = [f"{split}{index}" for index in range(count)]
        put(tmp_path, *(path.format(name, split=split) for name in names for path in (image, mask)))
    source = open_source(tmp_path)
    counted = {split: source.open(split).num_examples for split in source.splits}
    assert counted == ({"train": 4, "validation": 2} if "split" in image else {"train": 6})
    for row in source.open("train").stream:
        stem = os.path.basename(row["image"]["path"])[:-4]
        assert os.path.basename(row["annotation"]["path"]).startswith(stem)
    with pytest.raises(UserError, match="train-dense"):
        open_datasets(dataset_name=tmp_path)
    opened = open_datasets(dataset_name=tmp_path, labelled=False, train_val_split=0.4)
    assert sum(dataset.num_examples for dataset in opened.values()) == 6


def test_maps_of_other_names_are_refused(tmp_path):
    put(tmp_path, "images/1.jpg", "images/2.jpg", "masks/a.png", "masks/b.png")
    with pytest.raises(UserError, match="of 2 images only 0 have a map"):
        open_source(tmp_path)


COCO = {
    "images": [{"id": 10, "file_name": "a.jpg", "width": 8, "height": 8}, {"id": 11, "file_name": "b.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 10, "category_id": 90, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 4, 2, 4, 6]]},
        {
            "id": 2,
            "image_id": 10,
            "category_id": 3,
            "bbox": [0, 0, 2, 2.5],
            "segmentation": {"size": [8, 8], "counts": [0, 64]},
            "iscrowd": 1,
            "area": 5,
        },
    ],
    "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "brush"}],
}


@pytest.mark.parametrize(
    "where, folder",
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("{}/_annotations.coco.json", "{}"),
        ("annotations/instances_{}.json", "images/{}"),
    ],
)
def test_raw_coco(tmp_path, where, folder):
    for split in ("train", "val"):
        put(tmp_path, *(f"{folder.format(split)}/{name}.jpg" for name in "ab"))
        path = tmp_path / where.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(COCO))
    captions = {"images": COCO["images"], "annotations": [{"image_id": 10, "caption": "a car"}]}
    (path.parent / f"captions_{path.stem}.json").write_text(json.dumps(captions))
    source = open_source(tmp_path)
    assert source.splits == ["train", "validation"] and source.class_names == {3: "car", 90: "brush"}
    found = sorted(source.open("validation").stream, key=lambda row: row["image"]["path"])
    assert [os.path.relpath(row["image"]["path"], tmp_path) for row in found] == [
        f"{folder.format('val')}/{name}.jpg" for name in "ab"
    ]
    objects = found[0]["objects"]
    assert [entry["category"] for entry in objects] == [90, 3] and [entry["iscrowd"] for entry in objects] == [0, 1]
    assert [entry["bbox"] for entry in objects] == [[1, 2, 3, 4], [0, 0, 2, 2.5]]
    assert json.loads(objects[1]["segmentation"])["counts"] == [0, 64] and found[1]["objects"] == []
    with pytest.raises(UserError, match=r"COCO's annotations of objects.*train-dense"):
        open_datasets(dataset_name=tmp_path)


def test_coco_with_one_file_and_images_that_are_not_there(tmp_path, caplog):
    put(tmp_path, "photos/b.jpg")
    (tmp_path / "instances_default.json").write_text(json.dumps(COCO))
    source = open_source(tmp_path)
    assert source.splits == ["train"] and source.open("train").num_examples == 1
    assert source.left_out == {"images in the JSON that are not there": 1}
    (tmp_path / "instances_default.json").write_text(json.dumps({**COCO, "annotations": [{"bbox": [1, 2, 3, 4]}]}))
    with pytest.raises(UserError, match=r"instances_default.json is not as COCO has it: KeyError"):
        open_source(tmp_path)


@pytest.mark.parametrize("label", ["cls", "txt", "json"])
def test_tars_with_images_of_several_suffixes(tmp_path, label):
    kinds = {"jpg": "JPEG", "png": "PNG", "JPEG": "JPEG"}
    texts = {"cls": "{}", "txt": "class {}", "json": '{{"label": {}}}'}
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for index in range(9):
                suffix = list(kinds)[index // 3 if shard else index % 3]
                members = {suffix: encoded(index, kinds[suffix]), label: texts[label].format(index % 2).encode()}
                for name, data in members.items():
                    member = tarfile.TarInfo(f"{shard}/{index}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    dataset = open_datasets(dataset_name=tmp_path, train_val_split=0)["train"]
    assert (dataset.image_column, dataset.num_examples, len(dataset.label_names)) == ("image", 18, 2)
    loader = make_loader(dataset, lambda image: np_tensor(image), batch_size=6, training=False)
    batches = list(loader)
    assert sum(len(batch["labels"]) for batch in batches) == 18 and loader.skipped == 0
    parts = open_datasets(dataset_name=tmp_path, train_val_split=0.4)
    assert sum(part.num_examples for part in parts.values()) == 18


def np_tensor(image):
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "name, message",
    [
        ("photos.zip", "an archive .photos.zip.*unpack it"),
        ("data.tar.gz", "an archive .data.tar.gz.*unpack it"),
        ("clip.mp4", r"holds 1 files but no images.*1 \.mp4"),
    ],
)
def test_what_is_no_dataset_says_what_it_is(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)
    with pytest.raises(UserError, match=r"archive|neither an image"):
        open_source(tmp_path / name)


@pytest.mark.parametrize(
    "address, message",
    [
        ("https://huggingface.co/datasets/someone/pets", "--dataset_name someone/pets"),
        ("https://huggingface.co/datasets/someone/pets/tree/main", "--dataset_name someone/pets$"),
        ("hf://datasets/someone/pets@main/train", "--dataset_name someone/pets$"),
        ("http://example.org/photos.zip", "download it"),
        ("s3://bucket/photos", "download it"),
    ],
)
def test_addresses(address, message):
    with pytest.raises(UserError, match=message):
        open_source(address)


def test_images_beside_parquet_are_counted(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg")
    images = [{"bytes": encoded(index), "path": None} for index in range(4)]
    Dataset.from_dict({"image": images, "label": list("abab")}).cast_column("image", Image()).to_parquet(
        tmp_path / "train.parquet"
    )
    source = open_source(tmp_path)
    assert source.left_out == {".jpg": 2} and source.split_origin("train") == "files named train"


def test_described_images_divide_by_content_and_shard(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    names = [f"{index}.jpg" for index in range(60)]
    write_metadata(put(tmp_path, *names) / "metadata.csv", names, ["ab"[index % 2] for index in range(60)])
    parts = open_datasets(dataset_name=tmp_path, train_val_split=0.3)
    found = {}
    for split, dataset in parts.items():
        stream = dataset.stream
        shards = [stream.shard(stream.num_shards, index) for index in range(stream.num_shards)]
        found[split] = [os.path.basename(row["image"]["path"]) for shard in shards for row in shard]
        assert dataset.num_examples == len(found[split]) > 0
    assert sorted(found["train"] + found["validation"]) == sorted(names)
