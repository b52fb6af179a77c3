"""Datasets of our scripts, published, and read back by their id with `datasets`."""

import json
import re

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from huggingface_hub import DatasetCard
from PIL import Image

from hf_poolformer.hub import PublishError, publish
from hf_poolformer.hub.dataset_cards import dataset_card


NAMES = ["intact", "cracked | dark"]


@pytest.fixture
def parquet(tmp_path):
    """As scripts/demo.py writes one: shards per split."""
    folder = tmp_path / "cells"
    folder.mkdir()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    for split, rows in (("test", 3), ("train", 6)):
        images = [Image.new("L", (4, 4), 10 * row) for row in range(rows)]
        data = Dataset.from_dict({"image": images, "label": [row % 2 for row in range(rows)]}, features=features)
        for index in range(2):
            data.shard(2, index, contiguous=True).to_parquet(folder / f"{split}-{index:05d}-of-00002.parquet")
    (folder / ".part").mkdir()
    (folder / ".part" / "train-00002.parquet").write_bytes(b"half")
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for split, count in (("train", 3), ("validation", 1)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (4, 4)).save(folder / split / name / f"{index}.png")
    return folder


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


LOAD = """
import json, os, sys
import datasets
data = datasets.load_dataset(sys.argv[1], streaming=True)
print(json.dumps({split: [row["label"] for row in rows] for split, rows in data.items()}))
print(json.dumps(data["train"].features["label"].names))
"""


def test_published_and_streamed_by_its_id(online, run_with_hub, parquet):
    published = publish(parquet, "me/cells", repo_type="dataset", license="cc0-1.0", endpoint=online.url)
    assert published.url == f"{online.url}/datasets/me/cells"
    assert any("every SHA-256 the same" in note for note in published.notes)
    assert len(published.files) == 5
    text = online.files("me/cells", kind="datasets")["README.md"].decode()
    data = metadata(text)
    assert data["license"] == "cc0-1.0"
    assert data["task_categories"] == ["image-classification"]
    assert data["size_categories"] == ["n<1K"]
    assert [item["split"] for item in data["configs"][0]["data_files"]] == ["train", "test"]
    splits = {split["name"]: split["num_examples"] for split in data["dataset_info"]["splits"]}
    assert splits == {"train": 6, "test": 3}
    assert "9 images of 2 classes, in 2 splits" in text
    assert r"| 1 | cracked \| dark |" in text
    assert DatasetCard(text).data.license == "cc0-1.0"

    done = run_with_hub(LOAD, "me/cells")
    assert done.returncode == 0, done.stderr
    labels, names = map(json.loads, done.stdout.splitlines())
    assert labels == {"train": [0, 1] * 3, "test": [0, 1, 0]}
    assert names == NAMES


def test_a_folder_of_photos(online, photos):
    publish(photos, "me/photos", repo_type="dataset", endpoint=online.url, revision="trial", private=True)
    files = online.files("me/photos", "trial", "datasets")
    assert len(files) == 9
    text = files["README.md"].decode()
    assert metadata(text)["license"] == "unknown"
    assert "8 images of 2 classes, in 2 splits" in text
    assert "| validation | 2 | 2 |" in text


def test_its_own_card_stays(online, photos):
    (photos / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# Mine\n")
    publish(photos, "me/photos", repo_type="dataset", endpoint=online.url)
    assert online.files("me/photos", kind="datasets")["README.md"] == (photos / "README.md").read_bytes()


def test_refusals(online, photos, model_dir, tmp_path):
    with pytest.raises(PublishError, match="license 'mine'"):
        publish(photos, "me/photos", repo_type="dataset", license="mine", endpoint=online.url)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishError, match="holds no images"):
        publish(tmp_path / "empty", "me/photos", repo_type="dataset", endpoint=online.url)
    with pytest.raises(PublishError, match="holds a model"):
        publish(model_dir, "me/photos", repo_type="dataset", endpoint=online.url)
    with pytest.raises(PublishError, match="repo_type is 'thing'"):
        publish(photos, "me/photos", repo_type="thing", endpoint=online.url)
    assert online.requests == []


def test_shards_of_a_web_dataset(tmp_path):
    files = [f"{split}-{index:06d}.tar" for split in ("train", "val") for index in range(2)]
    for name in files:
        (tmp_path / name).write_bytes(b"tar")
    text = dataset_card(tmp_path, dict.fromkeys(files), repo_id="me/shards")
    assert [item["split"] for item in metadata(text)["configs"][0]["data_files"]] == ["train", "val"]
    assert "task_categories" not in metadata(text), "nothing is known about what is in them"
