"""Annotations that train without an error and mean something else: found by a look at the first of them."""

import json
import time

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import ClassLabel, Features, Image, List, Value
from shapes import MAP_FEATURES, NAMES
from shards import encoded, write_shards

from hf_poolformer.data.classes import CONFIG_FIELD
from hf_poolformer.data.decoding import BrokenImage
from hf_poolformer.data.dense import plausibility
from hf_poolformer.data.dense.annotations import is_crowd
from hf_poolformer.data.dense.datasets import open_dense_datasets
from hf_poolformer.data.dense.plausibility import check_annotations
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training import loop


SIZE = (60, 80)
SPLITS = ("train", "validation")


def looked_at(settings):
    return check_annotations(open_dense_datasets(settings), settings, Accelerator(cpu=True))


def lines_of(settings):
    return looked_at(settings)[1]


# Annotation maps


def a_map(rng, values=(0, 1)):
    """The second value on a rectangle, others after it on dots."""
    pixels = np.full(SIZE, values[0], np.uint8)
    y, x = rng.integers(0, 30, 2)
    pixels[y : y + 20, x : x + 25] = values[1]
    for number, value in enumerate(values[2:]):
        pixels[50:55, 10 * number : 10 * number + 5] = value
    return pixels


@pytest.fixture
def maps(make_settings, tmp_path):
    """Settings for maps with these values in each split."""

    def make(train, validation=None, names="ground,thing", count=12, encode=encoded, **changes):
        rng = np.random.default_rng(0)
        for split, values in zip(SPLITS, (train, validation or train), strict=True):
            rows = [
                {
                    "image": encoded(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)),
                    "annotation": encode(a_map(rng, values)) if values else None,
                }
                for _ in range(count)
            ]
            write_shards(tmp_path / "data", split, rows, MAP_FEATURES, 2)
        settings = {"dataset_name": str(tmp_path / "data"), "label_names": names, **changes}
        return make_settings("semantic-segmentation", **settings)

    return make


@pytest.mark.parametrize("validation", [(0, 255), (0, 0)], ids=["alike", "ground only"])
def test_of_two_classes_255_is_the_second(maps, validation):
    settings = maps((0, 255), validation)
    datasets, report = looked_at(settings)
    assert "255 is taken for thing, 0 for ground" in "\n".join(report)
    for dataset in datasets.values():
        assert [dataset.classes.index(value) for value in (0, 255)] == [0, 1]


def test_a_model_of_0_and_255_knows_both(maps, tmp_path):
    loop.train(maps((0, 255), max_train_steps=1))
    config, results = (
        json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "all_results.json")
    )
    assert config["id2label"] == {"0": "ground", "1": "thing"}
    assert {key: index for key, index in config[CONFIG_FIELD].items() if key.isdigit()} == {"0": 0, "255": 1}
    # Were the things ignored, whatever the model says of the rest would be right.
    assert results["eval_per_class_iou"]["thing"] is not None


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        ((0, 255), {"names": "ground,thing,other"}, r"0 and 255 only.*\"255\""),
        ((0, 255), {"reduce_labels": True}, "0, 255 only, which stands for pixels without a class"),
        ((255, 255), {}, "255 only, which stands for pixels without a class"),
        ((0, 128, 255), {"names": "ground,thing,other"}, r'"0": "ground", "128": "thing", "255": "other"'),
        ((0, 127, 254), {"names": "ground,thing,other"}, r'"127": "thing", "254": "other"'),
        ((0, 1, 2), {}, r"12 of 12 annotation maps.*: 2, beside 0, 1\. Do the classes count from 1"),
        ((1, 2), {}, '"1": "ground", "2": "thing"'),
        ((0, 255), {"names": "thing"}, "single class, thing"),
        (None, {}, "12 of 12 rows .* it has no annotation map"),
    ],
)
def test_maps_that_cannot_be_meant(maps, values, changes, message):
    with pytest.raises(UserError, match=message):
        looked_at(maps(values, **changes))


def test_a_jpeg_is_no_annotation_map(maps):
    with pytest.raises(UserError, match="JPEGs, which change values: save maps as PNG"):
        looked_at(maps((0, 90), encode=lambda pixels: encoded(pixels, "JPEG")))


def test_validation_is_judged_too(maps):
    with pytest.raises(UserError, match=r"maps of .*\(validation\) hold .* 7, beside 0"):
        looked_at(maps((0, 1), (0, 7)))
    with pytest.raises(UserError, match=r"maps of .*\(validation\) hold 0 and 255 only"):
        looked_at(maps((0, 1), (0, 255)))
    # In training some pixels are ignored, and in a small split by chance all things.
    assert "of the pixels have no class" in lines_of(maps((0, 1, 255), (0, 255)))[-2]


def test_plausible_maps_say_what_they_hold(maps):
    lines = lines_of(maps((0, 1, 255), names="ground,thing,other"))
    assert "12 annotation maps looked at: ground in 12, thing in 12; 0.5% of the pixels have no class" in lines[0]
    assert "1 class not seen among them: other" in lines[1]
    assert "only one class of 2 occurs: ground" in lines_of(maps((0, 0)))[1]
    assert "0 is ignored, 1 is ground, 2 is thing" in lines_of(maps((1, 2), reduce_labels=True))[1]


def test_a_few_broken_maps_do_not_end_a_run(maps):
    numbers = iter(range(1000))

    def one_is_broken(pixels):
        number = next(numbers)
        return encoded(np.full(SIZE, 99, np.uint8) if number == 3 else pixels[:5] if number == 4 else pixels)

    settings = maps((0, 1), count=100, encode=one_is_broken, max_skipped=0.02)
    lines = lines_of(settings)
    assert "100 annotation maps looked at" in lines[0] and "2 rows that cannot be used" in lines[1]
    numbers = iter(range(1000))
    with pytest.raises(UserError, match=r"2 of 100 rows .* cannot be used, more than --max_skipped 1 allows"):
        looked_at(maps((0, 1), count=100, encode=one_is_broken, max_skipped=1))


# Objects


def features(**more):
    return Features(
        {
            "image": Image(),
            "objects": List({"bbox": List(Value("float64")), "category": ClassLabel(names=NAMES), **more}),
        }
    )


POLYGONS = {"segmentation": List(List(Value("float64")))}


def an_object(rng):
    height, width = (int(edge) for edge in rng.integers(15, 30, 2))
    x, y = int(rng.integers(0, SIZE[1] - width)), int(rng.integers(0, SIZE[0] - height))
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"bbox": [x, y, width, height], "category": int(rng.integers(2)), "segmentation": [polygon]}


@pytest.fixture
def objects(make_settings, tmp_path):
    """Settings for rows of one object each, changed in place by `change`."""

    def make(change=lambda entry, number: None, more=None, task="object-detection", rows=30, **changes):
        rng = np.random.default_rng(0)
        known = features(**(more or {}))
        for split in SPLITS:
            written = []
            for number in range(rows):
                entry = an_object(rng)
                changed = change(entry, number)
                entries = [entry] if changed is None else changed
                kept = [{name: one.get(name) for name in known["objects"].feature} for one in entries]
                written.append({"image": encoded(np.zeros((*SIZE, 3), np.uint8)), "objects": kept})
            write_shards(tmp_path / "data", split, written, known, 3)
        return make_settings(task, **{"dataset_name": str(tmp_path / "data"), **changes})

    return make


def as_corners(entry, number=0):
    x, y, w, h = entry["bbox"]
    entry["bbox"] = [x, y, x + w, y + h]


def from_the_centre(entry, number=0):
    x, y, w, h = entry["bbox"]
    entry["bbox"] = [x + w / 2, y + h / 2, w, h]


def in_parts(entry, number=0):
    entry["bbox"] = [value / SIZE[1 - place % 2] for place, value in enumerate(entry["bbox"])]


def of_a_larger_image(entry, number=0):
    entry["bbox"] = [4 * value for value in entry["bbox"]]


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (in_parts, {}, "all 30 boxes .* at most 1: .*normalised"),
        (as_corners, {}, r"stick out .* read as xywh. As --bbox_format xyxy they all fit"),
        (from_the_centre, {}, r"read as xywh. As --bbox_format cxcywh they all fit"),
        (lambda entry, number: None, {"bbox_format": "xyxy"}, r"read as xyxy. As --bbox_format xywh they all fit"),
        (of_a_larger_image, {}, "Which pixels do they count"),
        (lambda entry, number: [], {}, "none of the 30 rows .* has an object"),
        (lambda entry, number: [{**entry, "category": None}], {}, "30 of 30 objects .* have no class"),
        (lambda entry, number: [{**entry, "bbox": None}], {}, "not four finite numbers"),
    ],
)
def test_boxes_that_cannot_be_meant(objects, change, changes, message):
    with pytest.raises(UserError, match=message):
        looked_at(objects(change, **changes))


@pytest.mark.parametrize(("change", "name"), [(as_corners, "xyxy"), (from_the_centre, "cxcywh")])
def test_the_format_that_is_suggested_is_right(objects, change, name):
    settings = objects(change, bbox_format=name)
    as_coco = looked_at(objects())[1]
    assert looked_at(objects(change, bbox_format=name))[1] == as_coco and settings.bbox_format == name


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda x, y, w, h: [[x, y, x + w, y + h]], "30 are polygons of four numbers"),
        (lambda x, y, w, h: [[x, y]], "fewer than three corners"),
        (lambda x, y, w, h: [], "without any pixel"),
        (lambda x, y, w, h: [[x, y, x + w, y, x, y]], "without any pixel"),
        (
            lambda x, y, w, h: [[x / 80, y / 60, (x + w) / 80, y / 60, x / 80, (y + h) / 60]],
            "parts of the image's size",
        ),
        (lambda x, y, w, h: [[x + 500, y, x + w + 500, y, x + 500, y + h]], "without any pixel"),
        (lambda x, y, w, h: [[0, 0, 8, 0, 8, 8, 0, 8]], "elsewhere than their boxes"),
    ],
)
def test_masks_that_cannot_be_meant(objects, mask, message):
    def change(entry, number):
        entry["segmentation"] = [[float(value) for value in part] for part in mask(*entry["bbox"])]

    with pytest.raises(UserError, match=message):
        looked_at(objects(change, POLYGONS, "instance-segmentation"))


@pytest.mark.parametrize("form", ["flat", "points"])
def test_polygons_that_are_written_otherwise(objects, form):
    def change(entry, number):
        (flat,) = entry["segmentation"]
        entry["segmentation"] = flat if form == "flat" else np.reshape(flat, (-1, 2)).tolist()

    kind = {"segmentation": List(Value("float64"))} if form == "flat" else POLYGONS
    expected = lines_of(objects(more=POLYGONS, task="instance-segmentation"))
    assert lines_of(objects(change, kind, "instance-segmentation")) == expected


def test_what_is_missing_stands_in_the_first_line(objects):
    def change(entry, number):
        return {
            1: [],
            2: [entry, {**entry, "category": -1}],
            3: [entry, {**entry, "category": None}],
            4: [{**entry, "bbox": [5, 5, 0, 3]}],
            5: [{**entry, "bbox": None}],
        }.get(number)

    settings = objects(change, max_skipped=2)
    lines = lines_of(settings)
    first = lines[0].partition(": ")[2]
    assert first.startswith("30 annotations looked at: 31 objects, square ")
    assert "1 row without objects; 1 null box; 2 objects without a class, left out" in first
    assert "1 object without area within the image, left out" in first
    assert "1 row that cannot be used" in lines[1]


@pytest.mark.parametrize(
    ("flag", "crowd"),
    [
        *[
            (flag, False)
            for flag in ("0", " 0 ", "false", "False", "", "no", 0, 0.0, "0.0", False, None, float("nan"))
        ],
        *[(flag, True) for flag in ("1", "true", "TRUE", "yes", 1, 1.0, "1.0", True, np.int64(1), np.True_)],
        *[(flag, None) for flag in ("maybe", 2, -1, 0.5, [1], "11")],
    ],
)
def test_crowd_flags(flag, crowd):
    if crowd is None:
        with pytest.raises(BrokenImage, match="is neither 0 nor 1"):
            is_crowd(flag, 0)
    else:
        assert is_crowd(flag, 0) is crowd


def test_sizes_that_contradict_the_images(make_settings, tmp_path):
    rng = np.random.default_rng(0)
    known = Features({**features(), "width": Value("int64"), "height": Value("int64")})
    rows = []
    for number in range(20):
        entry = {name: value for name, value in an_object(rng).items() if name != "segmentation"}
        size = {"height": SIZE[0], "width": SIZE[1]} if number % 4 else {"height": 600, "width": 800}
        rows.append({"image": encoded(np.zeros((*SIZE, 3), np.uint8)), "objects": [entry], **size})
    for split in SPLITS:
        write_shards(tmp_path / "data", split, rows, known, 1)
    settings = make_settings("object-detection", dataset_name=str(tmp_path / "data"))
    assert "5 rows with another width and height than the image: 800x600 instead of 80x60" in lines_of(settings)[1]
    for row in rows:
        row["height"], row["width"] = 600, 800
    for split in SPLITS:
        write_shards(tmp_path / "all", split, rows, known, 1)
    changes = {"dataset_name": str(tmp_path / "all")}
    with pytest.raises(UserError, match=r"20 of 20 rows .* give other widths and heights"):
        looked_at(make_settings("object-detection", **changes))
    looked_at(make_settings("object-detection", annotation_pixels="stored", **changes))


def test_who_knows_better_goes_on(objects):
    lines = lines_of(objects(as_corners, check_annotations=False))
    assert any("As --bbox_format xyxy they all fit" in line for line in lines)


def test_the_look_is_short(objects, monkeypatch):
    settings = objects()
    datasets = open_dense_datasets(settings)
    clock = iter(np.arange(0, 1000, 0.1))
    monkeypatch.setattr(plausibility, "SECONDS", {"train": 1.0, "validation": 0.0})
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    lines = check_annotations(datasets, settings, Accelerator(cpu=True))[1]
    rows = [int(line.partition(": ")[2].split()[0]) for line in lines if "looked at" in line]
    assert 8 <= rows[0] <= 12 and rows[1] == 1


def test_the_look_is_wide(make_settings, tmp_path):
    """Of sorted data the first rows show one class only."""
    known, rows = features(), []
    for number in range(1000):
        entry = {"bbox": [1, 1, 5, 5], "category": number // 500}
        rows.append({"image": encoded(np.zeros((8, 8, 3), np.uint8)), "objects": [entry]})
    for split in SPLITS:
        write_shards(tmp_path / "data", split, rows, known, 20)
    seen = lines_of(make_settings("object-detection", dataset_name=str(tmp_path / "data")))[0].partition(": ")[2]
    count = int(seen.split()[0])
    assert NAMES[0] in seen and (count < 200 or NAMES[1] in seen)  # a slow machine sees less
