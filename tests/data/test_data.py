"""Opening, splitting, sharding and batching of streams, from every kind of local source."""

import dataclasses
import io
import logging
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from hf_poolformer.data.classes import Classes
from hf_poolformer.data.datasets import align_labels, open_datasets, open_images
from hf_poolformer.data.loader import make_loader
from hf_poolformer.foundation.errors import UserError


NAMES = ["cat", "dog", "eel"]
COUNT = 60


def encode(value: int, kind: str = "PNG") -> bytes:
    """An image whose first pixel tells which one it is, and whose label is `value % 3`."""
    pixels = np.random.default_rng(value).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels[0, 0] = value
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [encode(value) for value in range(COUNT)]


def to_tensor(image: PILImage.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def table(values=range(COUNT), label=None, names=NAMES, images=None) -> Dataset:
    images = images or [{"bytes": IMAGES[value], "path": f"{value}.png"} for value in values]
    labels = [(label or (lambda value: value % 3))(value) for value in values]
    features = Features({"image": Image(), "label": ClassLabel(names=names)}) if names else None
    dataset = Dataset.from_dict({"image": images, "label": labels}, features=features)
    return dataset if names else dataset.cast_column("image", Image())


def write_parquet(root, num_shards=3, prefix="part", **arguments):
    root.mkdir(parents=True, exist_ok=True)
    dataset = table(**arguments)
    for index in range(num_shards):
        shard = dataset.shard(num_shards, index)
        shard.to_parquet(root / f"{prefix}-{index:05d}-of-{num_shards:05d}.parquet", batch_size=7)
    return root


def write_folder(root, values=range(COUNT), names=NAMES):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
    for value in values:
        (root / names[value % 3] / f"{value}.png").write_bytes(IMAGES[value])
    return root


def write_tars(root, values=range(COUNT), num_shards=2, label=lambda value: ("cls", str(value % 3)), image="png"):
    root.mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        with tarfile.open(root / f"{index:05d}.tar", "w") as tar:
            for value in list(values)[index::num_shards]:
                suffix, text = label(value)
                kind = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[image]
                for name, data in ((image, encode(value, kind)), (suffix, text.encode())):
                    member = tarfile.TarInfo(f"{value:05d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


@pytest.fixture(params=["parquet", "folder", "tars", "saved"])
def source(request, tmp_path):
    root = tmp_path / request.param
    if request.param == "saved":
        table().save_to_disk(root)
        return root
    return {"parquet": write_parquet, "folder": write_folder, "tars": write_tars}[request.param](root)


def batches(dataset, *, batch_size=8, training=False, epoch=0, **arguments):
    loader = make_loader(dataset, to_tensor, batch_size=batch_size, training=training, **arguments)
    loader.set_epoch(epoch)
    return list(loader)


def values_of(found) -> list[int]:
    """Which images the batches hold, by their first pixel."""
    return [int(pixels[0, 0, 0]) for batch in found for pixels in batch["pixel_values"]]


def labels_of(found) -> list[int]:
    return [label for batch in found for label in batch["labels"].tolist()]


def test_datasets_reach_workers_that_are_not_forked(source):
    """They are pickled then: on macOS and Windows, and wherever somebody has chosen so."""
    dataset = open_datasets(dataset_name=source, train_val_split=0.2)["train"]
    sent = pickle.loads(pickle.dumps(dataset))
    assert values_of(batches(sent)) == values_of(batches(dataset)) != []


def skipped_of(found) -> list[str]:
    return [description for batch in found for description in batch["skipped"]]


def test_every_source_is_read_whole_and_labelled(source):
    dataset = open_datasets(dataset_name=source, train_val_split=0)["train"]
    assert dataset.num_examples == COUNT
    assert dataset.label_names == (["0", "1", "2"] if source.name == "tars" else NAMES)
    assert len(dataset.label_names) == 3 and dataset.problem_type == "single_label_classification"
    found = batches(dataset)
    assert sorted(values_of(found)) == list(range(COUNT))
    assert all(value % 3 == label for value, label in zip(values_of(found), labels_of(found), strict=True))
    assert found[0]["pixel_values"].shape == (8, 3, 8, 8) and found[0]["labels"].dtype == torch.int64
    assert [len(batch["labels"]) for batch in found] == [8] * 7 + [4]


def test_the_split_is_of_the_content_alone(tmp_path):
    held_out = set()
    for name, root in {
        "three shards": write_parquet(tmp_path / "three"),
        "one shard, reversed": write_parquet(tmp_path / "one", num_shards=1, values=range(COUNT)[::-1]),
        "tars": write_tars(tmp_path / "tars"),
        "folder": write_folder(tmp_path / "folder"),
    }.items():
        opened = open_datasets(dataset_name=root, train_val_split=0.3)
        parts = {key: frozenset(values_of(batches(dataset))) for key, dataset in opened.items()}
        assert parts["train"] | parts["validation"] == set(range(COUNT)), name
        assert not parts["train"] & parts["validation"], name
        assert {key: dataset.num_examples for key, dataset in opened.items()} == {
            key: len(part) for key, part in parts.items()
        }
        held_out.add(parts["validation"])
    assert len(held_out) == 1
    assert 8 <= len(held_out.pop()) <= 28


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_disjointly_and_completely(source, num_processes, num_workers, training):
    dataset = open_datasets(dataset_name=source, train_val_split=0)["train"]
    found = Counter()
    for index in range(num_processes):
        share = batches(
            dataset,
            num_workers=num_workers,
            process_index=index,
            num_processes=num_processes,
            training=training,
            drop_last=False,
        )
        assert share
        found.update(values_of(share))
    assert found == Counter(range(COUNT))


def test_workers_change_no_count_and_may_be_more_than_shards(tmp_path, caplog):
    dataset = open_datasets(dataset_name=write_tars(tmp_path / "tars"), train_val_split=0)["train"]
    loader = make_loader(dataset, to_tensor, batch_size=8, training=False, num_workers=3)
    assert loader.num_workers == 3
    assert loader.dealing == "2 shards for 3 data workers, which read 1 row in 3 of 2"
    found = list(loader)
    assert sorted(values_of(found)) == list(range(COUNT))
    # What the workers have left over makes common batches.
    assert sorted(len(batch["labels"]) for batch in found) == [4] + [8] * 7
    remote = dataclasses.replace(dataset, local=False)
    with caplog.at_level(logging.INFO):
        loader = make_loader(remote, to_tensor, batch_size=8, training=False, num_workers=5)
    assert loader.num_workers == 2
    assert "2 data workers per process instead of 5" in caplog.text


def test_parquet_is_divided_by_row_groups_when_files_are_few(tmp_path):
    root = write_parquet(tmp_path / "one", num_shards=1)
    dataset = open_datasets(dataset_name=root, train_val_split=0)["train"]
    loader = make_loader(dataset, to_tensor, batch_size=8, training=False, num_workers=2)
    assert loader.num_workers == 2
    assert sorted(values_of(list(loader))) == list(range(COUNT))


def test_epochs_shuffle_anew_and_repeat_exactly(source):
    dataset = open_datasets(dataset_name=source, train_val_split=0)["train"]

    def run(epoch, seed=0):
        loader = make_loader(dataset, to_tensor, batch_size=8, training=True, num_workers=2, seed=seed)
        loader.set_epoch(epoch)
        first = values_of(list(loader))
        loader.set_epoch(epoch + 1)  # the same workers
        return first, values_of(list(loader))

    zero, one = run(0)
    assert zero != one and zero != sorted(zero)
    assert len(zero) == len(one) == COUNT // 8 * 8 and len(set(zero)) == len(zero)
    assert run(0) == (zero, one)
    assert run(1)[0] == one
    assert run(0, seed=1)[0] != zero


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_repeats_and_leaves_global_generators_alone(tmp_path, num_workers):
    dataset = open_datasets(dataset_name=write_folder(tmp_path / "data"), train_val_split=0)["train"]

    def run(epoch):
        before = torch.get_rng_state()
        loader = make_loader(
            dataset,
            lambda image: torch.rand(2) + float(np.random.rand()),
            batch_size=8,
            training=True,
            num_workers=num_workers,
        )
        loader.set_epoch(epoch)
        drawn = torch.cat([batch["pixel_values"] for batch in loader])
        if num_workers == 0:
            assert torch.equal(torch.get_rng_state(), before)
        return drawn

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))
    assert len(first.unique(dim=0)) == len(first)


def test_named_splits(tmp_path):
    by_file = tmp_path / "files"
    write_parquet(by_file, values=range(40), prefix="train")
    write_parquet(by_file, num_shards=1, values=range(40, 60), prefix="validation")
    by_folder = tmp_path / "folders"
    write_folder(by_folder / "train", range(40))
    write_folder(by_folder / "val", range(40, 60))
    saved = tmp_path / "saved"
    DatasetDict({"train": table(range(40)), "valid": table(range(40, 60))}).save_to_disk(saved)
    tars = tmp_path / "tars"
    write_tars(tars / "training", range(40))
    write_tars(tars / "dev", range(40, 60))
    for root in (by_file, by_folder, saved, tars):
        opened = open_datasets(dataset_name=root)
        assert {key: dataset.num_examples for key, dataset in opened.items()} == {"train": 40, "validation": 20}
        assert sorted(values_of(batches(opened["validation"]))) == list(range(40, 60))
        only = open_datasets(dataset_name=root, train_split=None)
        assert list(only) == ["validation"] and only["validation"].num_examples == 20


def test_labelled_test_split_serves_for_validation_and_an_unlabelled_one_does_not(tmp_path):
    write_parquet(tmp_path / "a", values=range(40), prefix="train")
    write_parquet(tmp_path / "a", num_shards=1, values=range(40, 60), prefix="test")
    assert open_datasets(dataset_name=tmp_path / "a")["validation"].num_examples == 20
    write_parquet(tmp_path / "b", values=range(40), prefix="train")
    write_parquet(tmp_path / "b", num_shards=1, values=range(40, 60), prefix="test", label=lambda value: -1)
    opened = open_datasets(dataset_name=tmp_path / "b")
    assert opened["train"].num_examples + opened["validation"].num_examples == 40
    with pytest.raises(UserError, match="label -1"):
        open_datasets(dataset_name=tmp_path / "b", validation_split="test")


def test_splits_under_any_name_can_be_chosen(tmp_path):
    write_folder(tmp_path / "data" / "autumn", range(40))
    write_folder(tmp_path / "data" / "winter", range(40, 60))
    opened = open_datasets(dataset_name=tmp_path / "data", train_split="autumn", validation_split="winter")
    assert [opened[key].num_examples for key in ("train", "validation")] == [40, 20]
    with pytest.raises(UserError, match=r"no split 'summer'.*--validation_split"):
        open_datasets(dataset_name=tmp_path / "data", validation_split="summer")


def test_train_and_validation_directories(tmp_path):
    write_folder(tmp_path / "here", range(40))
    # One class is missing there, so its own numbering would differ.
    write_folder(tmp_path / "there", [value for value in range(40, 60) if value % 3])
    (tmp_path / "there" / "cat").rmdir()
    opened = open_datasets(train_dir=tmp_path / "here", validation_dir=tmp_path / "there")
    found = batches(opened["validation"])
    assert opened["validation"].label_names == NAMES
    assert all(value % 3 == label for value, label in zip(values_of(found), labels_of(found), strict=True))
    (tmp_path / "there" / "fox").mkdir()
    (tmp_path / "there" / "fox" / "1.png").write_bytes(IMAGES[1])
    with pytest.raises(UserError, match="fox"):
        open_datasets(train_dir=tmp_path / "here", validation_dir=tmp_path / "there")
    assert list(open_datasets(validation_dir=tmp_path / "there")) == ["validation"]


def test_class_directories_named_like_splits_stay_classes(tmp_path):
    write_folder(tmp_path / "vehicles", names=["bus", "car", "train"])
    assert open_datasets(dataset_name=tmp_path / "vehicles", train_val_split=0)["train"].label_names == [
        "bus",
        "car",
        "train",
    ]


def test_odd_names_of_files(tmp_path):
    root = write_folder(tmp_path / "a [b] *c?" / "données")
    assert open_datasets(dataset_name=root, train_val_split=0)["train"].num_examples == COUNT
    root = write_parquet(tmp_path / "x [y] *z?")
    dataset = open_datasets(dataset_name=root, train_val_split=0)["train"]
    assert sorted(values_of(batches(dataset))) == list(range(COUNT))


def test_globs_and_files(tmp_path):
    root = write_parquet(tmp_path / "data")
    one = sorted(root.iterdir())[0]
    assert open_datasets(dataset_name=one, train_val_split=0)["train"].num_examples == 20
    assert open_datasets(dataset_name=f"{root}/*.parquet", train_val_split=0)["train"].num_examples == COUNT


@pytest.mark.parametrize("image", ["jpg", "webp"])
@pytest.mark.parametrize(
    "label",
    [("json", '{{"label": {}, "width": 8}}'), ("txt", "class {}\n"), ("cls", "{}")],
    ids=["json", "txt", "cls"],
)
def test_webdataset_forms(tmp_path, image, label):
    root = write_tars(tmp_path / "tars", label=lambda value: (label[0], label[1].format(value % 3)), image=image)
    dataset = open_datasets(dataset_name=root, train_val_split=0)["train"]
    assert len(dataset.label_names) == 3
    assert Counter(labels_of(batches(dataset))) == {0: 20, 1: 20, 2: 20}


@pytest.mark.parametrize("streaming", [True, False])
def test_labels_without_names(tmp_path, streaming):
    strings = write_parquet(tmp_path / "strings", names=None, label=lambda value: NAMES[value % 3])
    dataset = open_datasets(dataset_name=strings, train_val_split=0.2, streaming=streaming)["train"]
    assert dataset.label_names == NAMES
    found = batches(dataset)
    assert all(value % 3 == label for value, label in zip(values_of(found), labels_of(found), strict=True))
    numbers = write_parquet(tmp_path / "numbers", names=None, label=lambda value: 10 * (value % 3 + 1))
    dataset = open_datasets(dataset_name=numbers, train_val_split=0)["train"]
    assert dataset.label_names == ["10", "20", "30"] and set(labels_of(batches(dataset))) == {0, 1, 2}
    plain = write_parquet(tmp_path / "plain", names=None)
    assert (
        open_datasets(dataset_name=plain, classes=Classes.named(NAMES), train_val_split=0)["train"].label_names
        == NAMES
    )
    floats = write_parquet(tmp_path / "floats", names=None, label=lambda value: value / 60)
    with pytest.raises(UserError, match=r"'label' .* holds fractions, .* --task image-regression"):
        open_datasets(dataset_name=floats, train_val_split=0)


def test_parquet_written_without_datasets(tmp_path):
    rows = {"picture": IMAGES, "class": [NAMES[value % 3] for value in range(COUNT)]}
    pq.write_table(pa.table(rows), tmp_path / "plain.parquet")
    dataset = open_datasets(dataset_name=tmp_path / "plain.parquet", train_val_split=0)["train"]
    assert (dataset.image_column, dataset.label_column, dataset.label_names) == ("picture", "class", NAMES)
    assert values_of(batches(dataset)) == list(range(COUNT))


def test_columns_that_cannot_be_told(tmp_path):
    features = Features(
        {"left": Image(), "right": Image(), "coarse": ClassLabel(names=["a", "b"]), "fine": ClassLabel(names=NAMES)}
    )
    image = [{"bytes": data, "path": None} for data in IMAGES]
    columns = {"left": image, "right": image[::-1], "coarse": [value % 2 for value in range(COUNT)]}
    Dataset.from_dict({**columns, "fine": [value % 3 for value in range(COUNT)]}, features=features).to_parquet(
        tmp_path / "two.parquet"
    )
    where = tmp_path / "two.parquet"
    with pytest.raises(UserError, match=r"left, right.*--image_column_name"):
        open_datasets(dataset_name=where)
    with pytest.raises(UserError, match=r"coarse, fine.*--label_column_name"):
        open_datasets(dataset_name=where, image_column_name="left")
    with pytest.raises(UserError, match=r"no column 'middle'.*left \(Image\)"):
        open_datasets(dataset_name=where, image_column_name="middle")
    chosen = {"image_column_name": "right", "label_column_name": "fine", "train_val_split": 0}
    dataset = open_datasets(dataset_name=where, **chosen)["train"]
    assert values_of(batches(dataset)) == list(range(COUNT))[::-1]


BROKEN = {
    "empty": b"",
    "text": b"this is no image",
    "cut": encode(1)[:-60],
    "none": None,
}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_skipped_and_told(tmp_path, num_workers):
    images = [{"bytes": data, "path": f"{index}.png"} for index, data in enumerate(IMAGES)]
    for index, (name, data) in zip((0, 17, 40, 59), BROKEN.items(), strict=True):  # the very first and last, too
        images[index] = {"bytes": data, "path": f"{name}.png"} if data is not None else None
    root = write_parquet(tmp_path / "data", images=images)
    dataset = open_datasets(dataset_name=root, train_val_split=0)["train"]
    loader = make_loader(dataset, to_tensor, batch_size=8, training=False, num_workers=num_workers, max_skipped=0.5)
    for _ in range(2):
        found = list(loader)
        assert len(values_of(found)) == COUNT - 4
        told = " ".join(skipped_of(found))
        assert len(skipped_of(found)) == loader.skipped == 4 and loader.seen == COUNT
        assert "empty.png: empty (0 bytes)" in told
        assert "text.png: not an image" in told and "cut.png: " in told and "no image in this row" in told


def test_a_folder_with_broken_files(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "cat" / "empty.jpg").touch()
    (root / "cat" / "page.jpeg").write_text("<html>404</html>")
    (root / "cat" / "notes.txt").write_text("not counted")
    opened = open_datasets(dataset_name=root, train_val_split=0.3)
    assert opened["train"].num_examples + opened["validation"].num_examples == COUNT + 2
    told = [description for dataset in opened.values() for description in skipped_of(batches(dataset))]
    assert len(told) == 2 and any("cat/empty.jpg: empty file" in description for description in told)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_images_stop_the_run(tmp_path, num_workers):
    images = [{"bytes": IMAGES[0] if index % 2 else b"junk", "path": f"{index}.png"} for index in range(200)]
    root = write_parquet(tmp_path / "data", values=range(200), images=images)
    dataset = open_datasets(dataset_name=root, train_val_split=0)["train"]
    with pytest.raises(
        UserError, match=r"\d+ of the first \d+ images .* --max_skipped allows \(20.0%\): 0.png: not an image"
    ) as caught:
        batches(dataset, num_workers=num_workers, max_skipped=0.2)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(UserError, match=r"--max_skipped allows \(3\)"):
        batches(dataset, num_workers=num_workers, max_skipped=3)
    assert len(values_of(batches(dataset, num_workers=num_workers, max_skipped=1.0))) == 100


def test_nothing_readable(tmp_path):
    images = [{"bytes": b"junk", "path": None} for _ in range(4)]
    root = write_parquet(tmp_path / "data", num_shards=1, values=range(4), images=images)
    with pytest.raises(UserError, match="none of the 4 images"):
        batches(open_datasets(dataset_name=root, train_val_split=0)["train"], max_skipped=1.0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_outside_the_range(tmp_path, num_workers):
    features = Features({"image": Image(), "label": Value("int64")})
    rows = [
        {"image": {"bytes": data, "path": f"{index}.png"}, "label": index % 3} for index, data in enumerate(IMAGES)
    ]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    dataset = open_datasets(dataset_name=tmp_path / "data.parquet", classes=Classes.named(NAMES), train_val_split=0)[
        "train"
    ]
    rows[30]["label"] = 7
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"none of the classes cat.*'7' \(1 rows\)"):
        open_datasets(dataset_name=tmp_path / "data.parquet", classes=Classes.named(NAMES), train_val_split=0)
    # Where nobody could count, the loader meets it.
    with pytest.raises(UserError, match=r"30.png .* label 7 is none of the 3 classes") as caught:
        batches(dataset, num_workers=num_workers)
    assert "Traceback" not in str(caught.value)
    rows[30]["label"] = -1
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    uncounted = dataclasses.replace(dataset, labelled=None)
    assert skipped_of(batches(uncounted, num_workers=num_workers)) == [
        "30.png: its label is -1, which stands for none"
    ]
    assert skipped_of(batches(dataset, num_workers=num_workers)) == []
    rows[30]["label"] = None
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    assert skipped_of(batches(uncounted, num_workers=num_workers)) == ["30.png: it has no label"]


def test_alignment_with_a_checkpoint(tmp_path):
    root = write_folder(tmp_path / "data")
    dataset = open_datasets(dataset_name=root, train_val_split=0)["train"]
    other = align_labels(dataset, {"eel": 0, "cat": 1, "dog": 2})
    found = batches(other)
    assert other.label_names == ["eel", "cat", "dog"]
    assert all((value + 1) % 3 == label for value, label in zip(values_of(found), labels_of(found), strict=True))
    again = batches(align_labels(other, {"cat": 0, "dog": 1, "eel": 2}))
    assert all(value % 3 == label for value, label in zip(values_of(again), labels_of(again), strict=True))
    assert align_labels(dataset, {f"LABEL_{index}": index for index in range(3)}).label_names == NAMES
    with pytest.raises(UserError, match=r"cat, dog, eel against cat, dog, fox.*only in the dataset: eel"):
        align_labels(dataset, {"cat": 0, "dog": 1, "fox": 2})
    wider = {"ant": 0, "cat": 1, "dog": 2, "eel": 3}
    with pytest.raises(UserError, match="only in the checkpoint: ant"):
        align_labels(dataset, wider)
    assert set(labels_of(batches(align_labels(dataset, wider, subset=True)))) == {1, 2, 3}


def test_a_dataset_smaller_than_a_batch_still_trains(tmp_path):
    dataset = open_datasets(dataset_name=write_folder(tmp_path / "data", range(6)), train_val_split=0)["train"]
    found = batches(dataset, batch_size=16, training=True, num_workers=2)
    assert [len(batch["labels"]) for batch in found] == [6]


def test_sources_that_are_no_dataset(tmp_path, monkeypatch):
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_datasets(dataset_name=tmp_path / "void")
    (tmp_path / "void" / "notes.txt").touch()
    with pytest.raises(UserError, match="1 files but no images"):
        open_datasets(dataset_name=tmp_path / "void")
    with pytest.raises(UserError, match="no such file"):
        open_datasets(dataset_name=tmp_path / "missing")
    with pytest.raises(UserError, match="no such file"):
        open_datasets(train_dir="./missing")
    with pytest.raises(UserError, match="'someone/pets'"):  # offline: the Hub cannot be asked
        open_datasets(dataset_name="someone/pets")
    with pytest.raises(UserError, match="either --dataset_name or --train_dir"):
        open_datasets()
    with pytest.raises(UserError, match="train_val_split"):
        open_datasets(dataset_name=tmp_path, train_val_split=1.5)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"broken.parquet"):
        open_datasets(dataset_name=tmp_path / "broken.parquet")
    (tmp_path / "broken.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match=r"broken.tar"):
        open_datasets(dataset_name=tmp_path / "broken.tar")
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"no image column .* text \(string\), label \(int64\)"):
        open_datasets(dataset_name=tmp_path / "text.parquet")
    # datasets 5.0 divides by the number of rows when it writes a file.
    pq.write_table(table([]).data.table, tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="empty"):
        open_datasets(dataset_name=tmp_path / "empty.parquet")


def test_images_without_labels(tmp_path):
    (tmp_path / "plain").mkdir()
    for value in range(5):
        (tmp_path / "plain" / f"{value}.png").write_bytes(IMAGES[value])
    with pytest.raises(UserError, match="no label column"):
        open_datasets(dataset_name=tmp_path / "plain")
    dataset = open_images(tmp_path / "plain")
    assert dataset.num_examples == 5 and dataset.label_column is None
    with pytest.raises(UserError, match="has no labels"):
        make_loader(dataset, to_tensor, batch_size=2, training=False)
    write_folder(tmp_path / "mixed")
    (tmp_path / "mixed" / "loose.png").write_bytes(IMAGES[0])
    with pytest.raises(UserError, match=r"loose.png"):
        open_datasets(dataset_name=tmp_path / "mixed")
    write_folder(tmp_path / "single", [0, 3, 6], names=["cat"] * 3)
    with pytest.raises(UserError, match="single class"):
        open_datasets(dataset_name=tmp_path / "single", train_val_split=0)
    unique = write_parquet(tmp_path / "captions", values=range(120), names=None, label=str, images=[None] * 120)
    with pytest.raises(UserError, match="no class label"):
        open_datasets(dataset_name=unique)


def test_too_few_to_hold_any_out(tmp_path):
    write_folder(tmp_path / "data", range(3))
    with pytest.raises(UserError, match="too few"):
        open_datasets(dataset_name=tmp_path / "data", train_val_split=0.001)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_that_breaks_off(tmp_path, num_workers):
    shard = write_parquet(tmp_path / "data", num_shards=1) / "part-00000-of-00001.parquet"
    dataset = open_datasets(dataset_name=shard, train_val_split=0)["train"]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: shard 0 ends after [1-9]") as caught:
        batches(dataset, num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


def test_a_truncated_tar_is_told(tmp_path, caplog):
    shard = write_tars(tmp_path / "tars", num_shards=1) / "00000.tar"
    open_datasets(dataset_name=shard, train_val_split=0)
    assert "truncated" not in caplog.text
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    open_datasets(dataset_name=shard, train_val_split=0)
    assert "00000.tar has no end-of-archive mark" in caplog.text


def test_a_folder_described_by_metadata(tmp_path):
    root = tmp_path / "described"
    root.mkdir()
    lines = ["file_name,label"]
    for value in range(30):
        (root / f"{value}.png").write_bytes(IMAGES[value])
        lines.append(f"{value}.png,{NAMES[value % 3]}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    dataset = open_datasets(dataset_name=root, train_val_split=0)["train"]
    found = batches(dataset)
    assert dataset.label_names == NAMES and sorted(values_of(found)) == list(range(30))
    assert all(value % 3 == label for value, label in zip(values_of(found), labels_of(found), strict=True))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs POSIX signals")
def test_workers_survive_signals_to_the_group_and_end_with_their_parent(tmp_path):
    root = write_folder(tmp_path / "data")
    script = textwrap.dedent("""
        import os, signal, subprocess, sys, time, numpy, torch
        from hf_poolformer.data.datasets import open_datasets
        from hf_poolformer.data.loader import make_loader
        transform = lambda image: torch.from_numpy(numpy.array(image))
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        dataset = open_datasets(dataset_name=sys.argv[1], train_val_split=0)["train"]
        loader = make_loader(dataset, transform, batch_size=2, training=True, num_workers=2)
        iterator = iter(loader)
        next(iterator)
        for name in ("TERM", "INT"):
            subprocess.run(["kill", "-" + name, "--", "-" + str(os.getpgrp())])
        time.sleep(0.3)
        print(1 + sum(1 for _ in iterator))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=300,
        env=os.environ,
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == "30", done.stderr
    assert "Traceback" not in done.stderr


def test_leaving_an_epoch_early_and_starting_again(tmp_path):
    dataset = open_datasets(dataset_name=write_folder(tmp_path / "data"), train_val_split=0)["train"]
    loader = make_loader(dataset, to_tensor, batch_size=4, training=True, num_workers=2)
    start = time.perf_counter()
    for _ in loader:
        break
    assert sorted(values_of(list(loader))) == list(range(COUNT))
    assert time.perf_counter() - start < 20
