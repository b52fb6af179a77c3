"""From the stored value to the class: in the data, in the model's configuration, and back from it."""

import json
from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Features, Image, List, Value
from PIL import Image as PILImage
from shapes import MAP_FEATURES, TINY_MODEL
from shards import encoded, write_shards

from hf_poolformer.data.classes import CONFIG_FIELD, Classes
from hf_poolformer.data.decoding import BrokenImage
from hf_poolformer.data.dense.annotations import Frame, decode_map, decode_objects, value_table
from hf_poolformer.data.dense.datasets import open_dense_datasets
from hf_poolformer.data.dense.naming import known_classes
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import loop


FRAME = Frame((20, 30))


@pytest.fixture
def settings_of(tmp_path):
    """Settings for a folder whose id2label.json, or whose --label_names, hold this."""

    def make(names, task="object-detection", beside=True, **changes):
        given = {}
        if isinstance(names, str):
            given["label_names"] = names
        elif names is not None:
            path = tmp_path / ("id2label.json" if beside else "names.json")
            path.write_text(json.dumps(names))
            given = {} if beside else {"label_names": str(path)}
        return TrainingSettings.from_recipe(
            "demo", task=task, dataset_name=str(tmp_path), output_dir=str(tmp_path / "run"), **{**given, **changes}
        )

    return make


@pytest.mark.parametrize(
    ("told", "feature", "stored"),
    [
        ({"1": "cat", "2": "dog"}, Value("int64"), {1: "cat", 2: "dog"}),
        ({"0": "cat", "7": "dog", "90": "cow"}, Value("int16"), {0: "cat", 7: "dog", 90: "cow"}),
        ({"10": "dog", "9": "cat"}, Value("float32"), {9.0: "cat", 10.0: "dog"}),
        ({"1": "cat", "3": "dog"}, Value("string"), {"1": "cat", " 3 ": "dog", "dog": "dog", "cat": "cat"}),
        ({"1": "Caf\u00e9", "2": "Th\u00e9"}, Value("string"), {"Cafe\u0301": "Caf\u00e9", "The\u0301": "Th\u00e9"}),
        ({"id2label": {"5": "cat", "6": "dog"}}, Value("int64"), {5: "cat", 6: "dog"}),
        ({"cat": 4, "dog": 2}, Value("int64"), {4: "cat", 2: "dog"}),  # label2id
        (
            {"categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}]},
            Value("int64"),
            {17: "cat", 18: "dog"},
        ),
        (["cat", "dog"], Value("int64"), {0: "cat", 1: "dog"}),
        (["cat", "dog"], Value("float64"), {0.0: "cat", 1.0: "dog"}),
        (["cat", "dog"], Value("string"), {"dog": "dog", "cat": "cat"}),
        ("3,1", Value("int64"), {3: "3", 1: "1"}),
        ("cat,dog", ClassLabel(names=["dog", "cat"]), {0: "dog", 1: "cat"}),
        ("cat,dog", ClassLabel(names=["a", "b"]), {0: "cat", 1: "dog"}),
        (None, ClassLabel(names=["1", "2"]), {0: "1", 1: "2"}),
    ],
)
def test_stored_values_of_objects(settings_of, told, feature, stored):
    classes, _ = known_classes(settings_of(told), feature, "data")
    assert {value: classes.names[classes.index(value)] for value in stored} == stored
    # The configuration is enough to read them again, whatever order a checkpoint gives the names.
    for again in (classes, classes.renumbered(classes.names[::-1])):
        config = type("Config", (), {"id2label": dict(enumerate(again.names)), "num_labels": len(again.names)})()
        setattr(config, CONFIG_FIELD, again.for_config())
        saved = Classes.of_config(config)
        assert {value: saved.names[saved.index(value)] for value in stored} == stored


@pytest.mark.parametrize(
    ("told", "reduce", "stored"),
    [
        ({"1": "a", "2": "b"}, False, {1: 0, 2: 1, 255: 255}),
        ({"0": "a", "128": "b", "255": "c"}, False, {0: 0, 128: 1, 255: 2}),
        ({"0": "a", "1000": "b", "40000": "c"}, False, {0: 0, 1000: 1, 40000: 2, 255: 255}),
        ({"0": "a", "1": "b", "255": "Void"}, False, {0: 0, 1: 1, 255: 255}),
        ({"0": "a", "1": "b"}, True, {0: 255, 1: 0, 2: 1, 255: 255}),  # as ADE20K is on the Hub
        ({"1": "a", "2": "b"}, True, {0: 255, 1: 0, 2: 1, 255: 255}),
        ({"2": "a", "5": "b"}, True, {0: 255, 2: 0, 5: 1}),
        (["a", "b"], True, {0: 255, 1: 0, 2: 1}),
        (["a", "b", "c"], False, {0: 0, 1: 1, 2: 2, 255: 255}),
        ("10,20", False, {10: 0, 20: 1}),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_stored_values_of_maps(settings_of, told, reduce, stored, beside):
    settings = settings_of(told, "semantic-segmentation", beside, reduce_labels=reduce)
    classes, _ = known_classes(settings, None, "data")
    table = value_table(classes, reduce)
    rng = np.random.default_rng(0)
    kinds = [np.uint16, np.int32] + [np.uint8] * (max(stored) < 256)
    for kind in kinds:
        values = rng.choice(list(stored), FRAME.size).astype(kind)
        found = decode_map(PILImage.fromarray(values), FRAME, table)
        assert (found == np.vectorize(stored.get)(values)).all()
        for wrong in {3, 254, 256, 65000} - set(stored):
            if wrong <= np.iinfo(kind).max:
                values[4, 5] = wrong
                with pytest.raises(BrokenImage, match=f"the value {wrong}, which no class has"):
                    decode_map(PILImage.fromarray(values), FRAME, table)
    negative = np.full(FRAME.size, -1, np.int32)
    assert (decode_map(PILImage.fromarray(negative), FRAME, table) == 255).all()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"one": "cat", "2": "dog"}, "its key 'one' is no number"),
        ({"1": "cat", "2": "cat"}, "names the class 'cat' twice"),
        ({"1": "Caf\u00e9", "2": "Cafe\u0301"}, "twice"),
        ({"1": "cat", "2": None}, "not a list of texts"),
        ({"1": "cat", "2": " "}, "not a list of texts"),
        ({}, "not a list of texts"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "a key twice"),
        ([{"id": 1}], "neither a list of names nor id2label"),
        (7, "neither a list of names nor id2label"),
    ],
)
def test_names_that_are_none(settings_of, told, message):
    with pytest.raises(UserError, match=message):
        known_classes(settings_of(told), Value("int64"), "data")


def test_a_key_twice_in_the_file(settings_of, tmp_path):
    (tmp_path / "names.json").write_text('{"0": "cat", "0": "dog"}')
    with pytest.raises(UserError, match=r"names\.json has a key twice"):
        known_classes(settings_of(str(tmp_path / "names.json")), Value("int64"), "data")


def test_objects_without_a_class_are_left_out_and_counted(make_settings):
    dataset = open_dense_datasets(make_settings("object-detection"))["train"]
    boxes = [{"bbox": [1, 1, 5, 5], "category": category} for category in (1, -1, None, float("nan"), -100, 0)]
    left_out = Counter()
    found = decode_objects(boxes, FRAME, dataset.fields, with_masks=False, left_out=left_out)
    assert found.labels.tolist() == [1, 0] and left_out == {"without a class": 4}
    for wrong in (2, "cow", 0.5, [1]):
        with pytest.raises(BrokenImage, match="none of the 2 known"):
            decode_objects([{"bbox": [1, 1, 5, 5], "category": wrong}], FRAME, dataset.fields, with_masks=False)


def test_nobody_names_the_classes(make_settings, tmp_path):
    objects = {"bbox": List(Value("float32")), "category": Value("int64")}
    rows = [
        {"image": encoded(np.zeros((9, 9, 3), np.uint8)), "objects": [{"bbox": [1, 1, 3, 3], "category": c}]}
        for c in (7, 3, 7)
    ]
    write_shards(tmp_path / "boxes", "train", rows, Features({"image": Image(), "objects": List(objects)}), 1)
    write_shards(tmp_path / "boxes", "val", rows, Features({"image": Image(), "objects": List(objects)}), 1)
    with pytest.raises(UserError, match=r"does not name its classes.*first rows hold 3, 7"):
        open_dense_datasets(make_settings("object-detection", dataset_name=str(tmp_path / "boxes")))
    rows = [{"image": row["image"], "annotation": encoded(np.full((9, 9), 40, np.uint8))} for row in rows]
    for split in ("train", "val"):
        write_shards(tmp_path / "maps", split, rows, MAP_FEATURES, 1)
    with pytest.raises(UserError, match=r"does not name its classes.*first rows hold 40"):
        open_dense_datasets(make_settings("semantic-segmentation", dataset_name=str(tmp_path / "maps")))


def test_the_model_holds_the_table_and_a_second_run_its_own(make_settings, tmp_path):
    """Red is stored as 5 and blue as 9; the second dataset names the same classes by other numbers."""
    for name, keys in (("one", (5, 9)), ("two", (9, 2))):
        rows = []
        for number in range(16):
            pixels = np.full((64, 64, 3), 40, np.uint8)
            pixels[10:40, 10:40, 2 * (number % 2)] = 230
            rows.append(
                {"image": encoded(pixels), "objects": [{"bbox": [10, 10, 30, 30], "category": keys[number % 2]}]}
            )
        objects = {"bbox": List(Value("float32")), "category": Value("int64")}
        for split in ("train", "validation"):
            write_shards(tmp_path / name, split, rows, Features({"image": Image(), "objects": List(objects)}), 1)
        names = {str(key): label for key, label in zip(keys, ("red", "blue"), strict=True)}
        (tmp_path / name / "id2label.json").write_text(json.dumps(names))
    first = make_settings("object-detection", dataset_name=str(tmp_path / "one"), max_train_steps=1)
    loop.train(first)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["id2label"] == {"0": "red", "1": "blue"} and config[CONFIG_FIELD] == {"5": 0, "9": 1}
    second = make_settings(
        "object-detection",
        dataset_name=str(tmp_path / "two"),
        output_dir=str(tmp_path / "again"),
        config_name=None,
        config_overrides=None,
        model_name_or_path=str(tmp_path / "run"),
        max_train_steps=1,
    )
    assert open_dense_datasets(second)["train"].label_names == ["blue", "red"]
    loop.train(second)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["id2label"] == {"0": "red", "1": "blue"} and config[CONFIG_FIELD] == {"2": 1, "9": 0}
    # A dataset whose numbers are the indices leaves no table behind.
    (tmp_path / "one/id2label.json").unlink()
    third = {"dataset_name": str(tmp_path / "one"), "label_names": "x0,x1,x2,x3,x4,red,x6,x7,x8,blue"}
    loop.train(make_settings("object-detection", output_dir=str(tmp_path / "third"), max_train_steps=1, **third))
    assert CONFIG_FIELD not in json.loads((tmp_path / "third/config.json").read_text())
    assert TINY_MODEL["hidden_sizes"] == config["hidden_sizes"]


def test_another_split_is_numbered_as_training(make_settings, tmp_path):
    """Each with a ClassLabel of its own."""
    for names, found in ((["dog", "cat"], [1, 0]), (["dog", "emu"], None)):
        objects = {"bbox": List(Value("float32")), "category": ClassLabel(names=names)}
        row = {"image": encoded(np.zeros((9, 9, 3), np.uint8)), "objects": [{"bbox": [1, 1, 3, 3], "category": 0}]}
        folder = tmp_path / "-".join(names)
        for split in ("train", "test"):
            write_shards(folder, split, [row], Features({"image": Image(), "objects": List(objects)}), 1)
        dataset = open_dense_datasets(make_settings("object-detection", dataset_name=str(folder)))["train"]
        if found is None:
            with pytest.raises(UserError, match="the class 'emu'"):
                dataset.with_class_order(["cat", "dog", "cow"])
        else:
            classes = dataset.with_class_order(["cat", "dog", "cow"]).classes
            assert [classes.index(stored) for stored in (0, 1)] == found
