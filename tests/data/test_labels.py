"""Several labels per image, and numbers: read as people store them, or refused with what would work."""

import csv
import io
import json
import os
import shutil
import statistics
import tarfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, LargeList, List
from PIL import Image as PILImage

import hf_poolformer_cli
from hf_poolformer.data import contents
from hf_poolformer.data.classes import Classes
from hf_poolformer.data.datasets import align_labels, open_datasets
from hf_poolformer.data.description import describe_data, judge
from hf_poolformer.data.loader import make_loader
from hf_poolformer.foundation.errors import UserError


COUNT = 24
NAMES = ("cat", "dog", "eel")
MULTI, NUMBERS = "multi_label_classification", "regression"


def encode(value: int) -> bytes:
    """An image whose first pixel tells which one it is."""
    pixels = np.random.default_rng(value).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels[0, 0] = value
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [encode(value) for value in range(COUNT)]


def has(value: int) -> list[int]:
    """The classes of an image: of the first none, of the last all."""
    return [int(value % number == number - 1) for number in (2, 3, 4)]


TRUTH = torch.tensor([has(value) for value in range(COUNT)], dtype=torch.float32)
OF = [[index for index, flag in enumerate(has(value)) if flag] for value in range(COUNT)]
NAMED = [[NAMES[index] for index in own] for own in OF]


def parquet(root, columns):
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": IMAGES[: len(next(iter(columns.values())))], **columns}), root / "data.parquet")
    return root


def saved(root, columns):
    features = Features({"image": Image()})
    features.update(Features.from_arrow_schema(pa.table(columns).schema))
    rows = {name: column.to_pylist() for name, column in columns.items()}
    images = [{"bytes": data, "path": None} for data in IMAGES[: len(next(iter(rows.values())))]]
    Dataset.from_dict({"image": images, **rows}, features=features).save_to_disk(root)
    return root


def folder(root, columns, kind):
    """Images beside a metadata file."""
    root.mkdir(parents=True, exist_ok=True)
    table = pa.table({"file_name": [f"{value}.png" for value in range(COUNT)], **columns})
    for value, data in enumerate(IMAGES):
        (root / f"{value}.png").write_bytes(data)
    if kind == "parquet":
        pq.write_table(table, root / "metadata.parquet")
    elif kind == "jsonl":
        (root / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    else:
        with open(root / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table.column_names)
            writer.writeheader()
            writer.writerows(table.to_pylist())
    return root


def tars(root, columns):
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "00000.tar", "w") as tar:
        for value, row in enumerate(pa.table(columns).to_pylist()):
            for suffix, data in (("png", IMAGES[value]), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{value:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root


LAYOUTS = {
    "parquet": parquet,
    "saved": saved,
    "metadata.csv": lambda root, columns: folder(root, columns, "csv"),
    "metadata.jsonl": lambda root, columns: folder(root, columns, "jsonl"),
    "metadata.parquet": lambda root, columns: folder(root, columns, "parquet"),
    "tar": tars,
}
# How labels are stored: columns, names that the classes have then, and arguments.
STORED = {
    "lists of names": ({"tags": pa.array(NAMED)}, NAMES, {}),
    "large lists": ({"tags": pa.array(NAMED, pa.large_list(pa.string()))}, NAMES, {}),
    "lists of numbers from 10": ({"labels": pa.array([[10 * n + 10 for n in o] for o in OF])}, ("10", "20", "30"), {}),
    "numbers with names": ({"labels": pa.array(OF)}, NAMES, {"label_names": ",".join(NAMES)}),
    "padded lists": ({"labels": pa.array([(o + [-1] * 3)[:3] if o else [] for o in OF])}, ("0", "1", "2"), {}),
    "vectors": ({"label": pa.array([has(v) for v in range(COUNT)], pa.list_(pa.int64(), 3))}, ("0", "1", "2"), {}),
    "vectors with names": (
        {"label": pa.array([[bool(f) for f in has(v)] for v in range(COUNT)])},
        NAMES,
        {"label_names": ",".join(NAMES)},
    ),
    "vectors of floats": ({"label": pa.array(TRUTH.tolist())}, ("0", "1", "2"), {}),
    "a column of truths each": ({n: pa.array(TRUTH[:, i].bool().tolist()) for i, n in enumerate(NAMES)}, NAMES, {}),
    "a column of ones and zeros each": (
        {f"has_{n}": pa.array([has(v)[i] for v in range(COUNT)]) for i, n in enumerate(NAMES)},
        ("has_cat", "has_dog", "has_eel"),
        {"label_column_name": "has_*"},
    ),
    "JSON": ({"tags": pa.array([json.dumps(own) for own in NAMED])}, NAMES, {}),
    "Python": ({"label": pa.array([repr(own) for own in NAMED])}, NAMES, {}),
}
IN_TEXT = ("a column of truths each", "a column of ones and zeros each", "JSON", "Python")


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batches(dataset, **arguments):
    return list(make_loader(dataset, to_tensor, batch_size=5, training=False, **arguments))


def labels_by_image(found):
    """Labels in the order of the images' first pixels."""
    values = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in found])
    return torch.cat([batch["labels"] for batch in found])[values.argsort()]


def opened(root, **arguments):
    return open_datasets(**{"dataset_name": root, "train_val_split": 0, "problem_type": MULTI, **arguments})["train"]


ELSEWHERE = ("lists of names", "vectors", "a column of ones and zeros each", "JSON")


@pytest.mark.parametrize(
    ("stored", "layout"),
    [(stored, "parquet") for stored in STORED]
    + [(stored, layout) for stored in ELSEWHERE for layout in LAYOUTS if layout not in ("parquet", "metadata.csv")]
    + [(stored, "metadata.csv") for stored in IN_TEXT],
)
def test_several_labels_are_read_as_they_are_stored(tmp_path, stored, layout):
    columns, names, arguments = STORED[stored]
    if stored == "a column of truths each" and layout == "metadata.csv":
        arguments = {"label_column_name": ",".join(columns)}  # truths are texts there
    dataset = opened(LAYOUTS[layout](tmp_path / "data", columns), counted=True, **arguments)
    assert dataset.label_names == list(names) and dataset.problem_type == MULTI
    found = batches(dataset)
    assert found[0]["labels"].dtype == torch.float32 and found[0]["labels"].shape == (5, 3)
    assert torch.equal(labels_by_image(found), TRUTH)
    assert dataset.counts == tuple(TRUTH.sum(0).int().tolist())
    assert (dataset.labelled, dataset.unlabelled, dataset.num_examples) == (COUNT, 0, COUNT)
    mean, *others = dataset.per_image
    assert mean == pytest.approx(TRUTH.sum().item() / COUNT) and others == [0, 3, int((TRUTH.sum(1) == 0).sum())]


@pytest.mark.parametrize("kind", [List, LargeList])
def test_lists_of_a_class_label(tmp_path, kind):
    features = Features({"image": Image(), "labels": kind(ClassLabel(names=["eel", "dog", "cat"]))})
    images = [{"bytes": data, "path": None} for data in IMAGES]
    rows = {"image": images, "labels": [[2 - index for index in own + own] for own in OF]}  # each twice
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    dataset = opened(tmp_path / "data.parquet")
    assert dataset.label_names == ["eel", "dog", "cat"]
    assert torch.equal(labels_by_image(batches(dataset)), TRUTH.flip(1))
    aligned = align_labels(dataset, {"cat": 0, "ant": 1, "dog": 2, "eel": 3}, subset=True)
    assert aligned.counts == (12, 0, 8, 6)
    assert torch.equal(labels_by_image(batches(aligned))[:, [0, 2, 3]], TRUTH)


@pytest.mark.parametrize("separator", ["|", ";", ",", ", ", " / "])
def test_names_in_a_text(tmp_path, separator):
    cells = [separator.join(own) or "[]" for own in NAMED]
    told = {} if separator.strip() in "|;," else {"label_separator": separator}
    dataset = opened(folder(tmp_path, {"tags": pa.array(cells)}, "csv"), **told)
    assert dataset.label_names == list(NAMES) and dataset.unlabelled == 0
    assert torch.equal(labels_by_image(batches(dataset)), TRUTH)
    assert repr(separator.strip()) in describe_data({"train": dataset}) or told


SYNONYMS = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark"]


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (
            ["cat", "dog", "cat;dog", "dog;eel", "cat;eel", "cat;dog;eel"],
            "6 class names are made of 3, with ';' between",
        ),
        (
            ["eel|cat", "cat|dog", "dog|eel", "dog", "eel|cat", "cat|dog"],
            "4 class names are made of 3, with '|' between",
        ),
        (SYNONYMS * 2, None),
        (["red, round", "red, square", "blue, round", "blue, square"], None),
        (["cat", "dog", "salt, pepper"] * 2, None),
        (['a"b\rc;d', 'd;"', '";"'], None),
    ],
)
def test_several_names_learned_as_one_class_are_told(tmp_path, caplog, cells, told):
    path = folder(tmp_path, {"tags": pa.array((cells * COUNT)[:COUNT])}, "csv")
    dataset = opened(path, problem_type=SINGLE)
    assert dataset.label_names == sorted(set(cells))
    assert (told or "") in caplog.text and (told is not None) == ("--task multi-label" in caplog.text)


def test_a_name_that_contains_the_separator(tmp_path):
    quoted = [", ".join([*own, '"dog, wild"']) for own in NAMED]
    dataset = opened(folder(tmp_path / "quoted", {"tags": pa.array(quoted)}, "csv"))
    assert dataset.label_names == ["cat", "dog", "dog, wild", "eel"] and dataset.counts[2] == COUNT
    plain = folder(tmp_path / "plain", {"tags": pa.array([cell.replace('"', "") for cell in quoted])}, "csv")
    with pytest.raises(UserError, match=r"the class 'dog, wild' contains ',', .* double quotes"):
        opened(plain, train_split=None, classes=dataset.classes, label_separator=",")


SINGLE = "single_label_classification"
REFUSED = {
    "lists for one class": (SINGLE, STORED["lists of names"][0], "--task multi-label-classification would learn tags"),
    "truths for one class": (SINGLE, STORED["a column of truths each"][0], "--task multi-label-classification would"),
    "fractions for one class": (SINGLE, {"label": pa.array([v / 2 for v in range(COUNT)])}, "--task image-regression"),
    "one class for lists": (MULTI, {"label": pa.array([v % 2 for v in range(COUNT)])}, "--task image-classification"),
    "fractions for lists": (
        MULTI,
        {"label": pa.array([v / 2 for v in range(COUNT)])},
        "--task image-regression would",
    ),
    "lists of fractions": (MULTI, {"label": pa.array([[v / 2] for v in range(COUNT)])}, "--task image-regression"),
    "names for numbers": (NUMBERS, {"label": pa.array(["1"] * COUNT)}, "--task image-classification would .*string"),
    "lists for numbers": (NUMBERS, STORED["lists of names"][0], "--task multi-label-classification would learn tags"),
    "truths for numbers": (NUMBERS, {"label": pa.array([True] * COUNT)}, "--task image-classification"),
    "single names": (MULTI, {"tags": pa.array(["a", "b"] * 12)}, "image-classification; .* --label_separator"),
    "a line's end between quotes": (MULTI, {"tags": pa.array(['a"b\rc;d', "e;d"] * 12)}, "cannot be told apart"),
    "two separators": (MULTI, {"tags": pa.array(["a|b, c", "d"] * 12)}, r"contain '\|' and ','.*--label_separator"),
    "names with commas": (
        MULTI,
        {"tags": pa.array([f"{v % 3}, a{v % 3}" for v in range(COUNT)])},
        "6 names if ',' .* only 3 different texts, .*--label_separator ','",
    ),
    "lists of lists": (MULTI, {"labels": pa.array([[["a"]]] * COUNT)}, r"no label column .* labels \(list of list of"),
    "pairs": (MULTI, {"label": pa.array([[v % 2, 1 - v % 2] for v in range(COUNT)])}, "may be the indices .*booleans"),
    "grades": (MULTI, {"label": pa.array([[v % 3, 1, 1, -1] for v in range(COUNT)])}, "4 numbers each, .*no lists of"),
    "vectors of two lengths": (MULTI, {"label": pa.array([[True] * (v % 2 + 1) for v in range(COUNT)])}, "in length"),
    "lists as numpy prints them": (
        MULTI,
        {"tags": pa.array([str(np.array(own)) for own in NAMED])},
        "is no list, such",
    ),
    "free texts": (MULTI, {"tags": pa.array([[f"t{v}"] for v in range(COUNT)])}, "24 different values in 24 labels"),
    "always the same": (MULTI, {"tags": pa.array([["a"]] * COUNT)}, "single class, a"),
    "no labels": (MULTI, {"tags": pa.array([None] * COUNT, pa.list_(pa.string()))}, "is empty"),
    "a text beside truths": (
        MULTI,
        {"tags": pa.array(["a|b"] * COUNT), **STORED["a column of truths each"][0]},
        "--label_column_name tags or --label_column_name cat,dog,eel",
    ),
    "numbers of two lengths": (
        NUMBERS,
        {"label": pa.array([[v] * (1 + v % 2) for v in range(COUNT)])},
        "2 numbers in",
    ),
    "a constant": (NUMBERS, {"label": pa.array([0.7] * COUNT)}, r"'label' .* is 0\.7 in all 24 rows"),
    "no numbers": (NUMBERS, {"label": pa.array([float("nan")] * COUNT)}, "no row has a label"),
    "too large a number": (NUMBERS, {"label": pa.array([1e39, 1.0] * 12)}, "1e\\+39, more than 32 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_are_something_else_are_refused_with_what_would_work(tmp_path, case):
    problem_type, columns, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        opened(parquet(tmp_path / "data", columns), problem_type=problem_type)


def test_a_column_of_a_class_with_something_else_in_it(tmp_path):
    columns = {"a": pa.array([v % 2 for v in range(COUNT)]), "b": pa.array([v % 3 - 1 for v in range(COUNT)])}
    with pytest.raises(UserError, match=r"the column 'b' holds -1: store 1 where"):
        opened(parquet(tmp_path / "data", columns), label_column_name="a,b")
    nested = parquet(tmp_path / "nested", {"a": pa.array([[["cat"]]] * COUNT)})
    with pytest.raises(UserError, match=r"'a' of .* holds list of list of string; multi-label-classification needs"):
        opened(nested, label_column_name="a")
    with pytest.raises(UserError, match=r"no column 'c' \(--label_column_name\), only image"):
        opened(tmp_path / "data", label_column_name="a,c")


def test_the_command_names_the_task_that_learns_the_labels(tmp_path, capsys):
    data = parquet(tmp_path / "data", STORED["lists of names"][0])
    flags = ["--dataset_name", str(data), "--output_dir", str(tmp_path / "run"), "--recipe", "demo"]
    assert hf_poolformer_cli.main(["train", *flags]) == 2
    told = capsys.readouterr().err
    assert "--task multi-label-classification would learn tags (list of string)" in told and "Traceback" not in told


def test_no_class_is_an_answer_and_no_label_is_none(tmp_path):
    lists = [None if value < 6 else own for value, own in enumerate(NAMED)]
    dataset = opened(parquet(tmp_path / "data", {"tags": pa.array(lists)}))
    assert (dataset.labelled, dataset.unlabelled, dataset.num_examples) == (18, 6, 18)
    assert torch.equal(labels_by_image(found := batches(dataset)), TRUTH[6:])
    assert not any(batch["skipped"] for batch in found)  # they were counted before
    said = describe_data({"train": dataset})
    assert "6 rows of" in said and "labels on average, 0 to 3; 6 images have none of the classes" in said
    with pytest.raises(UserError, match=r"6 of 24 rows .* have no label.*--max_skipped 0.25.* empty list"):
        judge({"train": dataset}, 0.1)


def test_a_validation_split_in_the_sense_of_training(tmp_path):
    root = parquet(tmp_path / "data", STORED["a column of truths each"][0])
    (root / "data.parquet").rename(root / "train.parquet")
    names = ["dog", "eel", "cat"]
    other = {name: STORED["a column of truths each"][0][name] for name in names}
    pq.write_table(pa.table({"image": IMAGES, **other}), root / "validation.parquet")
    validation = open_datasets(dataset_name=root, problem_type=MULTI)["validation"]
    assert validation.label_names == list(NAMES) and torch.equal(labels_by_image(batches(validation)), TRUTH)
    pq.write_table(pa.table({"image": IMAGES, "cat": other["cat"], "dog": other["dog"]}), root / "validation.parquet")
    with pytest.raises(UserError, match=r"validation.* no column for eel"):
        open_datasets(dataset_name=root, problem_type=MULTI)
    # Lists of what training has not heard of.
    root = parquet(tmp_path / "lists", STORED["lists of names"][0])
    (root / "data.parquet").rename(root / "train.parquet")
    pq.write_table(pa.table({"image": IMAGES, "tags": pa.array([["fox", "cat"]] * COUNT)}), root / "test.parquet")
    with pytest.raises(UserError, match=r"none of the classes cat, dog, eel: 'fox' \(24 rows\)"):
        open_datasets(dataset_name=root, problem_type=MULTI)


def test_a_test_split_without_labels_is_no_validation(tmp_path, caplog):
    for name, lists in (("train", NAMED), ("test", [[-1]] * COUNT)):
        labels = pa.array(lists) if name == "test" else pa.array([[index + 5 for index in own] for own in OF])
        parquet(tmp_path, {"labels": labels})
        (tmp_path / "data.parquet").rename(tmp_path / f"{name}.parquet")
    caplog.set_level("INFO")
    found = open_datasets(dataset_name=tmp_path, problem_type=MULTI, train_val_split=0)
    assert list(found) == ["train"] and "is unlabelled and not used" in caplog.text


def test_what_a_model_knows_is_not_asked_for_again(tmp_path):
    known = {"problem_type": MULTI, "train_split": None, "train_val_split": 0, "classes": Classes.named(NAMES[::-1])}
    columns = {**STORED["a column of ones and zeros each"][0], "width": pa.array(range(COUNT))}
    columns = {name.removeprefix("has_"): column for name, column in columns.items()}
    dataset = open_datasets(dataset_name=parquet(tmp_path / "data", columns), **known)["validation"]
    assert dataset.label_columns == ("eel", "dog", "cat")
    assert torch.equal(labels_by_image(batches(dataset)), TRUTH.flip(1))
    known = {**known, "problem_type": NUMBERS, "classes": Classes.named(["width"])}
    dataset = open_datasets(dataset_name=tmp_path / "data", **known)["validation"]
    assert dataset.target_names == ("width",) and dataset.label_columns == ("width",)
    # Where reading the labels would be reading all of the data, it is not read for their sake; unless that is wanted.
    shards = tars(tmp_path / "tars", STORED["lists of names"][0])
    known = {**known, "problem_type": MULTI, "classes": Classes.named(NAMES), "dataset_name": shards}
    assert open_datasets(**known)["validation"].counts is None
    assert open_datasets(**known, counted=True)["validation"].counts == (12, 8, 6)


TARGETS = {
    "fractions": ({"label": pa.array([v / 3 for v in range(COUNT)])}, {}),
    "integers": ({"score": pa.array([v * v for v in range(COUNT)])}, {}),
    "decimals": ({"price": pa.array([Decimal(v) / 4 for v in range(COUNT)])}, {}),
    "32 bits": ({"label": pa.array([v / 3 for v in range(COUNT)], pa.float32())}, {}),
    "two columns": (
        {"b": pa.array([v / 3 for v in range(COUNT)]), "a": pa.array([-v for v in range(COUNT)])},
        {"label_column_name": "a,b"},
    ),
    "a list": ({"size": pa.array([[v, v / 2] for v in range(COUNT)])}, {"label_column_name": "size"}),
}


@pytest.mark.parametrize(
    ("stored", "layout"),
    [(stored, "parquet") for stored in TARGETS]
    + [("two columns", layout) for layout in LAYOUTS if layout != "parquet"]
    + [("a list", layout) for layout in ("saved", "tar", "metadata.jsonl")],
)
def test_numbers_are_read_in_units_with_their_mean_and_spread(tmp_path, stored, layout):
    columns, arguments = TARGETS[stored]
    dataset = opened(LAYOUTS[layout](tmp_path / "data", columns), problem_type=NUMBERS, **arguments)
    ordered = [columns[name] for name in arguments.get("label_column_name", next(iter(columns))).split(",")]
    rows = zip(*(column.to_pylist() for column in ordered), strict=True)
    targets = [[float(x) for value in row for x in (value if isinstance(value, list) else [value])] for row in rows]
    assert dataset.classes is None and dataset.counts is None and dataset.problem_type == NUMBERS
    names = {"a list": ("size_0", "size_1"), "two columns": ("a", "b")}.get(stored, tuple(columns))
    assert dataset.target_names == names
    assert dataset.label_names == list(names)
    found = batches(dataset)
    assert found[0]["labels"].dtype == torch.float32 and found[0]["labels"].shape == (5, len(names))
    assert torch.equal(labels_by_image(found), torch.tensor(targets, dtype=torch.float32))
    for mean, std, numbers in zip(dataset.target_mean, dataset.target_std, zip(*targets, strict=True), strict=True):
        # Exact but for the last rounding.
        assert mean == pytest.approx(statistics.fmean(numbers), rel=1e-15)
        assert std == pytest.approx(statistics.pstdev(numbers), rel=1e-15)


def test_a_row_without_all_of_its_numbers_is_one_without_label(tmp_path):
    numbers = [None, float("nan"), float("inf"), *(value * 0.1 for value in range(3, COUNT))]
    other = [1, 2, 3, None, *range(4, COUNT)]
    root = parquet(tmp_path / "data", {"a": pa.array(numbers), "b": pa.array(other)})
    dataset = opened(root, problem_type=NUMBERS, label_column_name="a,b")
    assert (dataset.labelled, dataset.unlabelled, dataset.num_examples) == (COUNT - 4, 4, COUNT - 4)
    assert dataset.target_mean[1] == statistics.fmean(range(4, COUNT))
    assert dataset.target_range == ((0.4, numbers[-1]), (4, COUNT - 1))
    labels = labels_by_image(batches(dataset))
    assert len(labels) == COUNT - 4 and labels.isfinite().all()
    said = describe_data({"train": dataset})
    assert "b: mean 13.5, std 5.766, 4 to 23" in said and "4 rows of" in said
    with pytest.raises(UserError, match=r"4 of 24 rows .*NaN or infinity"):
        judge({"train": dataset}, 0.01)


def test_mean_and_spread_do_not_depend_on_the_order_of_rows(tmp_path):
    numbers = [10.0 ** (value % 12) + value / 7 for value in range(COUNT)]
    found = set()
    for name, order in (("up", range(COUNT)), ("down", range(COUNT)[::-1])):
        dataset = opened(
            parquet(tmp_path / name, {"label": pa.array([numbers[index] for index in order])}), problem_type=NUMBERS
        )
        found.add((dataset.target_mean, dataset.target_std))
    assert len(found) == 1


def test_targets_are_aligned_by_their_names(tmp_path):
    root = parquet(tmp_path / "data", {"a": pa.array(range(COUNT)), "b": pa.array([-v / 2 for v in range(COUNT)])})
    dataset = opened(root, problem_type=NUMBERS, label_column_name="a,b")
    turned = align_labels(dataset, {"b": 0, "a": 1})
    assert turned.target_names == ("b", "a") and turned.target_mean == dataset.target_mean[::-1]
    assert torch.equal(labels_by_image(batches(turned)), labels_by_image(batches(dataset)).flip(1))
    assert align_labels(dataset, {"LABEL_0": 0, "LABEL_1": 1}).target_names == ("a", "b")
    for names in ({"a": 0, "c": 1}, {"a": 0, "b": 1, "c": 2}, {"a": 0}):
        with pytest.raises(UserError, match="has other labels than the checkpoint"):
            align_labels(dataset, names, subset=True)


@pytest.mark.parametrize(("problem_type", "column"), [(MULTI, NAMED), (NUMBERS, [v / 3 for v in range(COUNT)])])
def test_what_is_held_out_has_the_figures_of_the_whole(tmp_path, problem_type, column):
    root = parquet(tmp_path / "data", {"label": pa.array(column)})
    parts = open_datasets(dataset_name=root, problem_type=problem_type, train_val_split=0.3)
    whole = opened(root, problem_type=problem_type)
    assert sum(part.num_examples for part in parts.values()) == COUNT
    for part in parts.values():
        assert (part.labelled, part.counts, part.target_std) == (COUNT, whole.counts, whole.target_std)
        assert sum(len(batch["labels"]) for batch in batches(part)) == part.num_examples
    assert describe_data(parts).count("per image" if problem_type == MULTI else "target  ") == 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("problem_type", "column"), [(MULTI, NAMED), (NUMBERS, [v / 3 for v in range(COUNT)])])
def test_a_stream_goes_on_bit_by_bit_where_it_was_left(tmp_path, problem_type, column, num_workers):
    dataset = opened(parquet(tmp_path / "data", {"label": pa.array(column)}), problem_type=problem_type)

    def loader():
        return make_loader(
            dataset, to_tensor, batch_size=4, training=True, num_workers=num_workers, shuffle_buffer_size=8, seed=3
        )

    whole, first, second = list(loader()), loader(), loader()
    for _ in zip(range(2), first, strict=False):
        pass
    assert second.load_state_dict(first.state_dict()) is None
    rest = list(second)
    assert len(rest) == len(whole) - 2 > 0
    for left, right in zip(whole[2:], rest, strict=True):
        assert torch.equal(left["labels"], right["labels"]) and torch.equal(
            left["pixel_values"], right["pixel_values"]
        )


@pytest.mark.parametrize("layout", ["parquet", "saved", "tar"])
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, NUMBERS])
def test_a_pass_is_remembered_until_the_data_changes(tmp_path, monkeypatch, layout, problem_type):
    monkeypatch.setattr(contents, "WORTH_KEEPING", 0)
    columns = {
        SINGLE: {"label": pa.array([NAMES[v % 3] for v in range(COUNT)])},
        MULTI: {"label": pa.array(NAMED)},
        NUMBERS: {"label": pa.array([v / 3 for v in range(COUNT)])},
    }[problem_type]
    root, cache = LAYOUTS[layout](tmp_path / "data", columns), tmp_path / "cache"
    arguments = {"problem_type": problem_type, "cache_dir": str(cache)}
    first = opened(root, **arguments)
    assert not list(cache.rglob("labels-*"))  # so new that it could change unseen
    for file in root.iterdir():
        os.utime(file, (1e9, 1e9))
    assert opened(root, **arguments).counts_from == ""
    (kept,) = cache.rglob("labels-*")
    again = opened(root, **arguments)
    assert again.counts_from == str(kept) and kept.name in describe_data({"train": again})
    figures = ("classes", "storage", "counts", "labelled", "per_image", "target_mean", "target_std", "target_range")
    assert [getattr(again, name) for name in figures] == [getattr(first, name) for name in figures]
    assert torch.equal(labels_by_image(batches(again)), labels_by_image(batches(first)))
    kept.write_text("{")
    assert opened(root, **arguments).counts_from == ""
    # Another question, and other data.
    other = {"label": columns["label"][: COUNT - 3]}
    shutil.rmtree(root)
    changed = opened(LAYOUTS[layout](root, other), **arguments)
    assert changed.counts_from == "" and changed.labelled == COUNT - 3


def test_two_processes_may_remember_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "WORTH_KEEPING", 0)
    root, cache = tars(tmp_path / "data", STORED["lists of names"][0]), tmp_path / "cache"
    os.utime(root / "00000.tar", (1e9, 1e9))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: opened(root, cache_dir=str(cache)).counts, range(8)))
    assert set(found) == {(12, 8, 6)} and opened(root, cache_dir=str(cache)).counts_from
    assert [file.suffix for file in (cache / "hf-poolformer").iterdir()] == [".json"]
