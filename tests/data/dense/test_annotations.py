import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from hf_poolformer.data.classes import Classes
from hf_poolformer.data.decoding import BrokenImage
from hf_poolformer.data.dense.annotations import (
    Frame,
    ObjectFields,
    decode_map,
    decode_objects,
    uncompressed,
    value_table,
)


SIZE = (20, 30)
FRAME = Frame(SIZE)
THREE = Classes.numbered(["a", "b", "c"])
FIELDS = ObjectFields("bbox", "category", "segmentation", THREE)


def disc():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.hypot(y - 9, x - 12) <= 6


def compressed(mask):
    runs = run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def one(**changes):
    return [{"bbox": [6, 3, 13, 13], "category": 2, "segmentation": compressed(disc()), **changes}]


def read(value, fields=FIELDS, with_masks=True):
    return decode_objects(value, FRAME, fields, with_masks=with_masks)


def test_run_lengths_polygons_pictures_and_text_are_the_same_mask():
    runs = uncompressed(compressed(disc())["counts"])
    assert sum(runs) == SIZE[0] * SIZE[1]
    picture = Image.fromarray(disc())
    forms = [
        compressed(disc()),
        {"size": list(SIZE), "counts": compressed(disc())["counts"].encode()},
        {"size": list(SIZE), "counts": runs},
        json.dumps({"size": list(SIZE), "counts": runs}),
        picture,
    ]
    for form in forms:
        found = read(one(segmentation=form))
        assert (found.masks == disc()[None]).all()
        assert found.areas == [disc().sum()] and found.labels == [2]
        assert (found.boxes == [[6, 3, 19, 16]]).all()
    square = read(one(segmentation=[[6, 3, 6, 16, 19, 16, 19, 3], [0, 0, 1, 1]]))
    assert square.masks.sum() == 13 * 13
    # A dictionary of lists, as datasets' Sequence gives it, and JSON text.
    columns = {"bbox": [[6, 3, 13, 13]], "category": [2], "segmentation": [forms[0]]}
    assert (read(columns).masks == read(one()).masks).all()
    assert (read(json.dumps(one())).masks == read(one()).masks).all()


def test_boxes_are_clipped_and_empty_ones_left_out():
    rows = [
        {"bbox": [-4, -4, 10, 10], "category": 0, "area": 7.0},
        {"bbox": [5, 5, 0, 4], "category": 1},
        {"bbox": [40, 5, 4, 4], "category": 1},
        {"bbox": [25, 15, 100, 100], "category": 1, "iscrowd": 1},
    ]
    found = read(rows, with_masks=False)
    assert found.boxes.tolist() == [[0, 0, 6, 6], [25, 15, 30, 20]]
    assert found.labels.tolist() == [0, 1] and found.crowd.tolist() == [False, True] and found.masks is None
    assert found.areas.tolist() == [7.0, 25.0]
    corners = read(
        [{"bbox": [1, 2, 3, 4], "category": 0}], ObjectFields("bbox", "category", None, THREE, "xyxy"), False
    )
    assert corners.boxes.tolist() == [[1, 2, 3, 4]]
    for nothing in (None, [], {"bbox": [], "category": [], "segmentation": []}):
        found = read(nothing)
        assert len(found) == 0 and found.boxes.shape == (0, 4) and found.masks.shape == (0, *SIZE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (one(bbox=[1, 2, 3]), "four finite numbers"),
        (one(bbox=[1, 2, float("nan"), 3]), "four finite numbers"),
        (one(bbox=None), "four finite numbers"),
        (one(bbox=["a", 2, 3, 4]), "not made of numbers"),
        (one(bbox=[5, 5, -2, 3]), "bbox_format"),
        (one(category=3), "none of the 3 known"),
        (one(category="cat"), "none of the 3 known"),
        (one(segmentation=None), "cannot be read"),
        (one(segmentation={"size": [5, 5], "counts": [25]}), "another size"),
        (one(segmentation={"size": list(SIZE), "counts": [5]}), "do not cover"),
        (one(segmentation={"size": list(SIZE), "counts": [-5, 605]}), "do not cover"),
        (one(segmentation={"size": list(SIZE), "counts": "zz~"}), "do not cover"),
        (one(segmentation={"size": list(SIZE), "counts": ""}), "do not cover"),
        (one(segmentation={"counts": [600]}), "cannot be read"),
        (one(segmentation=[[1, 2, "x", 4, 5, 6]]), "cannot be read"),
        (one(segmentation=[[1, 2, 1e12, 4, 5, 6]]), "far outside"),
        (one(segmentation=[[1, 2, float("nan"), 4, 5, 6]]), "far outside"),
        (one(segmentation="{"), "cannot be read"),
        (one(segmentation=np.zeros((3, 3), bool)), "cannot be read"),
        ({"bbox": [[0, 0, 1, 1]], "category": []}, "equally long"),
        ("{", "not JSON"),
        ([1, 2], "list of dictionaries"),
        (7, "list of dictionaries"),
    ],
)
def test_broken_objects_say_what_is_wrong(value, message):
    with pytest.raises(BrokenImage, match=message):
        read(value)


def test_classes_may_be_names():
    fields = ObjectFields("bbox", "category", None, Classes.named(["dog", "cat"]))
    assert read(one(category=" cat "), fields, False).labels.tolist() == [1]
    with pytest.raises(BrokenImage, match="none of the 2 known"):
        read(one(category="cow"), fields, False)


def test_annotation_maps():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, SIZE).astype(np.uint8)
    classes[0] = 255
    palette = Image.fromarray(classes)
    palette.putpalette(list(range(256)) * 3)
    grey = Image.fromarray(np.repeat(classes[..., None], 3, axis=2))
    for form in (Image.fromarray(classes), palette, grey, Image.fromarray(classes.astype(np.uint16))):
        assert (decode_map(form, FRAME, value_table(THREE)) == classes).all()
    reduced = decode_map(Image.fromarray(classes), FRAME, value_table(Classes.numbered(["a", "b"]), True))
    assert (reduced[classes == 0] == 255).all() and (reduced[0] == 255).all()
    assert (reduced[classes == 2] == 1).all()
    renumbered = decode_map(Image.fromarray(classes), FRAME, value_table(THREE.renumbered(["b", "c", "a"])))
    assert (renumbered == np.choose(np.where(classes == 255, 3, classes), [2, 0, 1, 255])).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no annotation map"),
        ({"bytes": b"", "path": None}, "cannot be read"),
        ({"bytes": b"\x89PNG\r\n", "path": None}, "cannot be read"),
        ({"bytes": None, "path": "/nowhere.png"}, "cannot be read"),
        (Image.new("L", (20, 30)), "20x30 pixels, but the image 30x20"),
        (Image.new("L", (30, 20), 3), "the value 3"),
        (Image.new("RGB", (30, 20), (1, 2, 3)), "not class indices"),
        (Image.new("F", (30, 20)), "not class indices"),
    ],
)
def test_broken_maps_say_what_is_wrong(value, message):
    with pytest.raises(BrokenImage, match=message):
        decode_map(value, FRAME, value_table(THREE))
