import json

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import ClassLabel, Features, Image, List, Value
from shapes import COUNTS, MAP_FEATURES, NAMES, OBJECT_FEATURES, map_row, object_row, scene
from shards import write_shards

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.data.dense.datasets import open_dense_datasets
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training.dense.task import make_dense_loader


def load(settings, split="train"):
    dataset = open_dense_datasets(settings)[split]
    accelerator = Accelerator(cpu=True)
    processor = PoolFormerImageProcessor.for_detection(size={"shortest_edge": 64, "longest_edge": 72})
    return make_dense_loader(dataset, settings, accelerator, processor, training=split == "train")


def test_coco_and_ade20k_layouts_are_understood(make_settings):
    for task, names in (
        ("object-detection", NAMES),
        ("instance-segmentation", NAMES),
        ("semantic-segmentation", ["ground", "square", "disc"]),
    ):
        opened = open_dense_datasets(make_settings(task))
        assert opened["train"].label_names == names and opened["train"].images.num_examples == COUNTS["train"]
        batches = list(load(make_settings(task)))
        assert len(batches) == 6
        for image, label in zip(batches[0]["pixel_values"], batches[0]["labels"], strict=True):
            if task == "semantic-segmentation":
                assert label.shape == image.shape[1:]
            else:
                assert ("masks" in label) == (task == "instance-segmentation")
        truths = [truth for batch in load(make_settings(task), "validation") for truth in batch["labels"]]
        assert len(truths) == COUNTS["validation"] == len({truth.key for truth in truths})


def test_lists_of_columns_other_names_and_corners(make_settings, tmp_path):
    """As datasets' older Sequence stores objects, with boxes as corners and classes as text."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        row = object_row(*scene(rng))
        boxes = [one["bbox"] for one in row["objects"]]
        corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
        rows.append({"image": row["image"], "things": {"boxes": corners, "label": ["disc"] * len(corners)}})
    features = Features(
        {"image": Image(), "things": {"boxes": List(List(Value("float32"))), "label": List(Value("string"))}}
    )
    write_shards(tmp_path / "data", "train", rows, features, 1)
    write_shards(tmp_path / "data", "val", rows, features, 1)
    changes = {"dataset_name": str(tmp_path / "data"), "bbox_format": "xyxy", "label_names": "square,disc"}
    truths = [t for b in load(make_settings("object-detection", **changes), "validation") for t in b["labels"]]
    assert sum(len(truth.objects) for truth in truths) > 0
    for truth, row in zip(truths, rows, strict=True):
        np.testing.assert_allclose(truth.objects.boxes.reshape(-1), np.ravel(row["things"]["boxes"]), rtol=1e-6)
        assert set(truth.objects.labels) <= {1}


def test_classes_are_numbered_by_name(make_settings):
    dataset = open_dense_datasets(make_settings("object-detection"))["train"]
    turned = dataset.with_class_order(["disc", "cross", "square"])
    assert turned.fields.classes.table == {"0": 2, "1": 0} and turned.label_names == ["disc", "cross", "square"]
    maps = open_dense_datasets(make_settings("semantic-segmentation"))["train"]
    renumbered = maps.with_class_order(["disc", "ground", "square"]).classes
    assert [renumbered.index(value) for value in (0, 1, 2)] == [1, 2, 0]
    with pytest.raises(UserError, match="the class 'square'"):
        dataset.with_class_order(["disc", "cross"])


def test_without_a_validation_split_a_part_is_held_out(make_settings, shapes, tmp_path):
    (tmp_path / "data").mkdir()
    for path in (shapes / "detection").glob("train-*"):
        (tmp_path / "data" / path.name).symlink_to(path)
    settings = make_settings("object-detection", dataset_name=str(tmp_path / "data"), train_val_split=0.3)
    opened = open_dense_datasets(settings)
    counts = [opened[split].images.num_examples for split in ("train", "validation")]
    assert sum(counts) == COUNTS["train"] and min(counts) > 0


def broken_rows():
    rng = np.random.default_rng(3)
    scenes = []
    while len(scenes) < 10:
        one = scene(rng)
        if one[1]:
            scenes.append(one)
    return scenes


@pytest.mark.parametrize("task", ["instance-segmentation", "semantic-segmentation"])
def test_broken_annotations_are_counted_and_left_out(make_settings, tmp_path, task):
    scenes = broken_rows()
    if task == "semantic-segmentation":
        rows, features = [map_row(*one) for one in scenes], MAP_FEATURES
        rows[2]["annotation"] = {"bytes": b"not a picture", "path": None}
        rows[5]["annotation"] = None
        rows[7]["annotation"] = rows[0]["annotation"] if rows[0] != rows[7] else None
        (tmp_path / "data").mkdir()
        (tmp_path / "data/id2label.json").write_text(json.dumps(["ground", "square", "disc"]))
    else:
        rows, features = [object_row(*one) for one in scenes], OBJECT_FEATURES
        rows[2]["objects"][0]["bbox"] = [1, 2, 3]
        rows[5]["objects"][0]["segmentation"]["counts"] = "4"
        rows[7]["image"] = {"bytes": b"not a picture", "path": None}
    write_shards(tmp_path / "data", "train", rows, features, 2)
    write_shards(tmp_path / "data", "validation", rows, features, 2)
    changes = {"dataset_name": str(tmp_path / "data"), "max_skipped": 3, "per_device_train_batch_size": 2}
    for split in ("train", "validation"):
        loader = load(make_settings(task, **changes), split)
        batches = list(loader)
        skipped = [text for batch in batches for text in batch["skipped"]]
        read = sum(len(batch["labels"]) for batch in batches)
        assert loader.skipped == len(skipped) and 2 <= len(skipped) <= 3 and loader.seen == 10
        assert read == 10 - len(skipped) - (split == "train" and (10 - len(skipped)) % 2)
        assert any("annotation map" in text or "object 0" in text for text in skipped)
    with pytest.raises(UserError, match="are broken"):
        list(load(make_settings(task, **{**changes, "max_skipped": 1}), "train"))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("object-detection", {"dataset_name": "/nowhere/at/all"}, "nowhere"),
        ("object-detection", {"annotation_column_name": "things"}, "no objects in a column 'things'"),
        ("semantic-segmentation", {"annotation_column_name": "things"}, "no column 'things'"),
        ("semantic-segmentation", {"label_names": "a,b,a"}, "names the class 'a' twice"),
        ("semantic-segmentation", {"label_names": "/nowhere.json"}, "cannot read the names"),
        ("object-detection", {"image_column_name": "picture"}, "no column 'picture'"),
        ("object-detection", {"validation_split": "dev2"}, "no split 'dev2'"),
    ],
)
def test_mistakes_are_reported(make_settings, task, changes, message):
    with pytest.raises(UserError, match=message):
        open_dense_datasets(make_settings(task, **changes))


def test_layouts_that_do_not_fit_the_task(make_settings, shapes, tmp_path):
    with pytest.raises(UserError, match="no column of annotation maps"):
        open_dense_datasets(make_settings("semantic-segmentation", dataset_name=str(shapes / "detection")))
    with pytest.raises(UserError, match="no column of objects"):
        open_dense_datasets(make_settings("object-detection", dataset_name=str(shapes / "segmentation")))
    row = object_row(*broken_rows()[0])
    del row["objects"][0]["segmentation"]
    row["objects"] = [{"bbox": one["bbox"], "category": 0} for one in row["objects"]]
    bare = {"bbox": List(Value("float32")), "category": ClassLabel(names=NAMES)}
    write_shards(tmp_path / "boxes", "train", [row], Features({"image": Image(), "objects": List(bare)}), 1)
    settings = {"dataset_name": str(tmp_path / "boxes"), "train_val_split": 0.5}
    with pytest.raises(UserError, match="has no masks"):
        write_shards(tmp_path / "boxes", "test", [row], Features({"image": Image(), "objects": List(bare)}), 1)
        open_dense_datasets(make_settings("instance-segmentation", **settings))
    unnamed = {"bbox": List(Value("float32")), "category": Value("int64")}
    for split in ("train", "test"):
        write_shards(tmp_path / "unnamed", split, [row], Features({"image": Image(), "objects": List(unnamed)}), 1)
    with pytest.raises(UserError, match="does not name its classes"):
        open_dense_datasets(make_settings("object-detection", dataset_name=str(tmp_path / "unnamed")))


def test_a_broken_map_is_one_image_where_a_part_is_held_out(make_settings, tmp_path):
    """The filter that divides the data must not decode it."""
    rows = [map_row(*one) for one in broken_rows()]
    rows[4]["annotation"] = {"bytes": b"not a picture", "path": None}
    write_shards(tmp_path / "data", "train", rows, MAP_FEATURES, 2)
    settings = make_settings(
        "semantic-segmentation",
        dataset_name=str(tmp_path / "data"),
        label_names="ground,square,disc",
        train_val_split=0.4,
        max_skipped=1,
        per_device_train_batch_size=1,
    )
    skipped = []
    for split in ("train", "validation"):
        skipped += [text for batch in load(settings, split) for text in batch["skipped"]]
    assert len(skipped) == 1 and "annotation map cannot be read" in skipped[0]
