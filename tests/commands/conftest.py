"""Models that are right and wrong in every way, and photographs, for any command."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import BertConfig, BertModel

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor


SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 16), "layer_scale_init_value": 0.1}


@pytest.fixture(scope="session")
def things(tmp_path_factory):
    """Folders that commands are given; nobody writes into them.

    Attributes:
        photos: two folders of 12 images, `up` brighter above, `down` brighter below.
        image: one of them.
        model: a classifier of the two, with random weights.
        no_config, text, corrupt: folders without config.json, of a BERT, and with cut-off weights.
        boxes: a Parquet file with a box in each image.
        missing: a folder that does not exist.
    """
    root = tmp_path_factory.mktemp("things")
    generator = np.random.default_rng(0)
    for name, sign in (("up", 1), ("down", -1)):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(12):
            pixels = 128 + sign * np.linspace(60, -60, 32)[:, None, None] + generator.normal(0, 20, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "photos" / name / f"{index}.png")
    torch.manual_seed(0)
    write_boxes(root / "photos", root / "boxes" / "train.parquet")
    config = PoolFormerConfig(**SMALL, id2label={0: "down", 1: "up"}, label2id={"down": 0, "up": 1})
    PoolFormerForImageClassification(config).save_pretrained(root / "model")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "crop_pct": 1.0}
    PoolFormerImageProcessor(**size).save_pretrained(root / "model")

    shutil.copytree(root / "model", root / "no-config")
    (root / "no-config" / "config.json").unlink()
    shutil.copytree(root / "model", root / "corrupt")
    weights = root / "corrupt" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    tiny = {
        "vocab_size": 9,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    BertModel(BertConfig(**tiny)).save_pretrained(root / "text")
    return SimpleNamespace(
        photos=root / "photos",
        image=root / "photos" / "up" / "0.png",
        model=root / "model",
        no_config=root / "no-config",
        text=root / "text",
        corrupt=root / "corrupt",
        boxes=root / "boxes",
        missing=root / "nowhere",
    )


def write_boxes(photos, path):
    """COCO's columns: the bright half of every image is an object."""
    features = Features(
        {
            "image": ImageFeature(),
            "objects": {"bbox": [[Value("float32")]], "category": [ClassLabel(names=["bright"])]},
        }
    )
    rows = {"image": [], "objects": []}
    for file in sorted(photos.rglob("*.png")):
        rows["image"].append({"bytes": file.read_bytes(), "path": None})
        top = 0 if file.parent.name == "up" else 16
        rows["objects"].append({"bbox": [[0, top, 32, 16]], "category": [0]})
    path.parent.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(path)
