"""Squares and discs on noise, in the layouts of COCO and ADE20K, and settings under which a run takes seconds."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from datasets.utils.logging import disable_progress_bar
from PIL import Image as PILImage
from pycocotools import mask as run_lengths

from hf_poolformer.settings.training import TrainingSettings


NAMES = ["square", "disc"]
SIDE = 64
COUNTS = {"train": 24, "validation": 11}
TINY_MODEL = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 16],
    "layer_scale_init_value": 0.1,
    "fpn_feature_size": 16,
    "decoder_hidden_size": 8,
    "box_head_hidden_size": 16,
    "mask_head_num_convs": 1,
    "rpn_num_proposals": 30,
    "rpn_batch_size": 32,
    "roi_batch_size": 16,
    "max_detections": 10,
}


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def scene(rng):
    """An image and its objects: (class, mask)."""
    height, width = SIDE, int(rng.integers(SIDE - 8, SIDE + 9))
    pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[:height, :width]
    objects = []
    for _ in range(rng.integers(0, 3)):  # none in every third
        label, radius = int(rng.integers(2)), int(rng.integers(6, 14))
        cy, cx = (int(rng.integers(radius, edge - radius)) for edge in (height, width))
        distance = np.maximum(abs(y - cy), abs(x - cx)) if label == 0 else np.hypot(y - cy, x - cx)
        mask = distance <= radius
        pixels[mask] = (230, 60, 60) if label == 0 else (60, 60, 230)
        objects = [(known, other & ~mask) for known, other in objects if (other & ~mask).any()] + [(label, mask)]
    return pixels, objects


def object_row(pixels, objects, **changes):
    described = []
    for label, mask in objects:
        runs = run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))
        described.append(
            {
                "bbox": run_lengths.toBbox(runs).tolist(),
                "category": label,
                "segmentation": {"size": list(mask.shape), "counts": runs["counts"].decode()},
            }
        )
    return {"image": encoded(pixels), "objects": described, **changes}


def map_row(pixels, objects):
    classes = np.zeros(pixels.shape[:2], np.uint8)
    for label, mask in objects:
        classes[mask] = label + 1
    return {"image": encoded(pixels), "annotation": encoded(classes)}


OBJECT_FEATURES = Features(
    {
        "image": Image(),
        "objects": List(
            {
                "bbox": List(Value("float32")),
                "category": ClassLabel(names=NAMES),
                "segmentation": {"size": List(Value("int32")), "counts": Value("string")},
            }
        ),
    }
)
MAP_FEATURES = Features({"image": Image(), "annotation": Image()})


def write_shards(folder, split, rows, features, count):
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(rows)), count)):
        name = f"{split}-{number:05d}-of-{count:05d}.parquet"
        Dataset.from_list([rows[index] for index in part], features=features).to_parquet(folder / name)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folders `detection` and `segmentation` with 24 training images in 3 shards and 11 for validation in 2."""
    disable_progress_bar()
    root = tmp_path_factory.mktemp("shapes")
    for number, (split, count) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(number)
        scenes = [scene(rng) for _ in range(count)]
        shards = 3 if split == "train" else 2
        write_shards(root / "detection", split, [object_row(*one) for one in scenes], OBJECT_FEATURES, shards)
        write_shards(root / "segmentation", split, [map_row(*one) for one in scenes], MAP_FEATURES, shards)
    (root / "segmentation/id2label.json").write_text(json.dumps({"0": "ground", "1": "square", "2": "disc"}))
    return root


@pytest.fixture
def late_damage(shapes, tmp_path):
    """The maps, with two unreadable images in one shard of the validation data."""
    folder = tmp_path / "damaged"
    shutil.copytree(shapes / "segmentation", folder)
    path = sorted(folder.glob("validation-*"))[-1]
    rows = pq.read_table(path).to_pylist()
    for row in rows[-2:]:
        row["image"]["bytes"] = b"not a picture"
    path.unlink()
    Dataset.from_list(rows, features=MAP_FEATURES).to_parquet(path)
    return folder


@pytest.fixture
def make_settings(shapes, tmp_path):
    """Settings of the demo recipe for a very small model on the shapes; keywords change them."""

    def make(task, **changes) -> TrainingSettings:
        layout = "segmentation" if task == "semantic-segmentation" else "detection"
        settings = {
            "dataset_name": str(shapes / layout),
            "output_dir": str(tmp_path / "run"),
            "config_overrides": json.dumps(TINY_MODEL),
            "image_size": SIDE,
            "longest_edge": SIDE + 8,
            "crop_size": None,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 3,
            "num_train_epochs": 1,
            "num_warmup_steps": 2,
            "num_workers": 0,
            "logging_steps": 2,
            "eval_epochs": 0,
            "shuffle_buffer_size": 16,
        }
        return TrainingSettings.from_recipe("demo", task=task, **{**settings, **changes})

    return make
