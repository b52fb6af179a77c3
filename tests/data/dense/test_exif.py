"""Annotations of images that EXIF turns. The truth is Pillow's exif_transpose and pycocotools' masks."""

import io

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import ClassLabel, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps
from pycocotools import mask as run_lengths
from shapes import MAP_FEATURES, NAMES
from shards import encoded, write_shards

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.data.classes import Classes
from hf_poolformer.data.decoding import BrokenImage
from hf_poolformer.data.dense.annotations import Frame, ObjectFields, decode_map, decode_objects, value_table
from hf_poolformer.data.dense.datasets import open_dense_datasets
from hf_poolformer.data.dense.plausibility import check_annotations
from hf_poolformer.training.dense.task import make_dense_loader


STORED = (24, 36)  # height, width
TWO = Classes.numbered(NAMES)
FIELDS = ObjectFields("bbox", "category", "segmentation", TWO)
BOX = [5, 3, 12, 8]


def jpeg(pixels, orientation, kind="JPEG"):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, kind, exif=exif)
    return {"bytes": buffer.getvalue(), "path": None}


def upright(pixels, orientation):
    with PILImage.open(io.BytesIO(jpeg(pixels, orientation, "PNG")["bytes"])) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def stored_mask():
    mask = np.zeros(STORED, np.uint8)
    mask[BOX[1] : BOX[1] + BOX[3], BOX[0] : BOX[0] + BOX[2]] = 1
    return mask


def frame(orientation, **changes):
    size = STORED[::-1] if orientation >= 5 else STORED
    return Frame(size, orientation, **changes)


def box_of(mask):
    x, y, w, h = run_lengths.toBbox(run_lengths.encode(np.asfortranarray(mask)))
    return [x, y, x + w, y + h]


def forms_of_mask():
    x, y, w, h = BOX
    runs = run_lengths.encode(np.asfortranarray(stored_mask()))
    yield [[x, y, x + w, y, x + w, y + h, x, y + h]]
    yield {"size": list(STORED), "counts": runs["counts"].decode()}
    yield encoded(stored_mask() * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_masks_and_maps_turn_as_pillow_turns_the_image(orientation):
    truth = upright(stored_mask(), orientation)
    for segmentation in forms_of_mask():
        objects = [{"bbox": BOX, "category": 1, "segmentation": segmentation}]
        found = decode_objects(objects, frame(orientation), FIELDS, with_masks=True)
        assert (found.masks[0] == truth).all() and found.boxes.tolist() == [box_of(truth)]
    classes = np.random.default_rng(orientation).integers(0, 2, STORED).astype(np.uint8)
    found = decode_map(encoded(classes), frame(orientation), value_table(TWO))
    assert (found == upright(classes, orientation)).all()
    # A map that has the same EXIF is turned once.
    found = decode_map(jpeg(classes, orientation, "PNG"), frame(orientation), value_table(TWO))
    assert (found == upright(classes, orientation)).all()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_size_tells_what_was_annotated(orientation):
    mask = upright(stored_mask(), orientation)  # annotated on the upright image
    left, top, right, bottom = box_of(mask)
    objects = [{"bbox": [left, top, right - left, bottom - top], "category": 0}]
    for said in ({"frame": frame(orientation, said=mask.shape)}, {"frame": frame(orientation, in_stored=False)}):
        found = decode_objects(objects, said["frame"], FIELDS, with_masks=False)
        assert found.boxes.tolist() == [[left, top, right, bottom]]
    runs = run_lengths.encode(np.asfortranarray(mask))
    objects[0]["segmentation"] = {"size": list(mask.shape), "counts": runs["counts"].decode()}
    found = decode_objects(objects, frame(orientation), FIELDS, with_masks=True)
    assert (found.masks[0] == mask).all() and found.boxes.tolist() == [[left, top, right, bottom]]
    assert (decode_map(encoded(mask), frame(orientation), value_table(TWO)) == mask).all()
    # Told what to take, the size has to fit.
    with pytest.raises(BrokenImage, match=f"EXIF orientation {orientation}"):
        decode_map(encoded(mask), frame(orientation, told_by_size=False), value_table(TWO))


def test_of_half_a_turn_no_size_tells():
    for orientation in (2, 3, 4):
        objects = [{"bbox": BOX, "category": 0}]
        as_stored, as_seen = (
            decode_objects(objects, frame(orientation, in_stored=stored, said=STORED), FIELDS, with_masks=False)
            for stored in (True, False)
        )
        assert as_stored.boxes.tolist() == [box_of(upright(stored_mask(), orientation))]
        assert as_seen.boxes.tolist() == [box_of(stored_mask())]


FEATURES = Features(
    {
        "image": Image(),
        "width": Value("int64"),
        "height": Value("int64"),
        "objects": List({"bbox": List(Value("float32")), "category": ClassLabel(names=NAMES)}),
    }
)


def written(folder, orientation, turn, features=FEATURES, sizes=True, count=12):
    """Bright squares on dark images, annotated in stored pixels, or on the upright image if `turn`."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        pixels, mask = np.zeros((*STORED, 3), np.uint8), np.zeros(STORED, np.uint8)
        y, x = int(rng.integers(0, 14)), int(rng.integers(0, 26))
        mask[y : y + 10, x : x + 10], pixels[y : y + 10, x : x + 10] = 1, 255
        annotated = upright(mask, orientation) if turn else mask
        left, top, right, bottom = box_of(annotated)
        row = {"image": jpeg(pixels, orientation), "objects": [{"bbox": [left, top, right - left, bottom - top]}]}
        row["objects"][0]["category"] = 1
        if sizes:
            row["height"], row["width"] = annotated.shape
        rows.append(row)
    for split in ("train", "validation"):
        write_shards(folder, split, rows, features, 2)
    return str(folder)


def truths(settings):
    accelerator = Accelerator(cpu=True)
    datasets, report = check_annotations(open_dense_datasets(settings), settings, accelerator)
    processor = PoolFormerImageProcessor.for_detection(size={"shortest_edge": 24, "longest_edge": 36}, do_pad=False)
    loader = make_dense_loader(datasets["validation"], settings, accelerator, processor, training=False)
    pairs = [
        (image, truth) for batch in loader for image, truth in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]
    return pairs, report


def assert_on_the_squares(pairs):
    for image, truth in pairs:
        bright = np.asarray(image.mean(0)) > 0
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(truth.objects.boxes[0] - expected).max() <= 1  # JPEG softens edges


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("turn", [False, True], ids=["stored", "upright"])
@pytest.mark.parametrize("sizes", [True, False], ids=["sizes", "bare"])
def test_boxes_lie_on_what_they_are_of(make_settings, tmp_path, orientation, turn, sizes):
    features = FEATURES if sizes else Features({name: FEATURES[name] for name in ("image", "objects")})
    name = written(tmp_path / "data", orientation, turn, features, sizes)
    # Of half a turn nothing tells: the flag does.
    flag = {"annotation_pixels": "upright"} if turn and orientation == 3 else {}
    pairs, lines = truths(make_settings("object-detection", dataset_name=name, **flag))
    assert len(pairs) == 12
    assert_on_the_squares(pairs)
    said = "upright pixels" if turn else "stored pixels"
    assert any(f"12 of 12 images are turned by EXIF: their annotations are taken in {said}" in line for line in lines)


def test_contradictory_hints_are_told(make_settings, tmp_path):
    written(tmp_path / "one", 6, False, count=9)
    written(tmp_path / "other", 6, True, count=3)
    for number, folder in enumerate(("one", "other")):
        for path in (tmp_path / folder).glob("*.parquet"):
            target = tmp_path / "data" / path.name.replace("of-00002", "of-00004").replace("0000", f"000{number}", 1)
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
    pairs, lines = truths(make_settings("object-detection", dataset_name=str(tmp_path / "data")))
    assert_on_the_squares(pairs)
    assert any("9 count stored pixels and 3 upright ones" in line for line in lines)


def test_turned_maps_through_the_loader(make_settings, tmp_path):
    rng, rows = np.random.default_rng(1), []
    for orientation in (1, 2, 3, 4, 5, 6, 7, 8):
        mask = (rng.random((3, 4)) > 0.5).repeat(8, 0).repeat(8, 1)
        pixels = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
        rows.append({"image": jpeg(pixels, orientation, "PNG"), "annotation": encoded(mask.astype(np.uint8))})
    for split in ("train", "validation"):
        write_shards(tmp_path / "data", split, rows, MAP_FEATURES, 1)
    settings = make_settings("semantic-segmentation", dataset_name=str(tmp_path / "data"), label_names="dark,bright")
    pairs, lines = truths(settings)
    for image, truth in pairs:
        bright = np.asarray(image.mean(0)) > 0
        assert bright.shape == truth.map.shape and (bright == truth.map).all()
    assert any("7 of 8 images are turned by EXIF" in line for line in lines)
