"""Real digits as Parquet shards, and settings under which a run takes seconds."""

import io
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from datasets.utils.logging import disable_progress_bar
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from hf_poolformer import (
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerImageProcessor,
)
from hf_poolformer.settings.training import TrainingSettings


NAMES = [f"digit {number}" for number in range(10)]
TINY_MODEL = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 32, 32],
    "patch_sizes": [3, 3, 3, 3],
    "strides": [2, 2, 2, 2],
    "padding": [1, 1, 1, 1],
    "layer_scale_init_value": 0.1,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_shards(folder, split, images, labels, count):
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    for number, part in enumerate(np.array_split(np.arange(len(labels)), count)):
        encoded = []
        for image in images[part]:
            buffer = io.BytesIO()
            PILImage.fromarray(image).save(buffer, "PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        rows = {"image": encoded, "label": labels[part].tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-{number:05d}-of-{count:05d}.parquet")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder with 320 training digits in 3 shards and 75 test digits in 2."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    images = (images * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    disable_progress_bar()
    write_shards(folder, "train", images[:320], labels[:320], 3)
    write_shards(folder, "test", images[320:395], labels[320:395], 2)
    return folder


@pytest.fixture(scope="session")
def all_digits(tmp_path_factory):
    """Folder with four of five digits for training, in 4 shards, and every fifth for testing, in 2."""
    folder = tmp_path_factory.mktemp("all-digits")
    images, labels = load_digits(return_X_y=True)
    images = (images * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)
    held_out = np.arange(len(labels)) % 5 == 0
    disable_progress_bar()
    write_shards(folder, "train", images[~held_out], labels[~held_out], 4)
    write_shards(folder, "test", images[held_out], labels[held_out], 2)
    return folder


@pytest.fixture
def make_settings(digits, tmp_path):
    """Settings of the demo recipe for a very small model on the digits; keywords change them."""

    def make(**changes) -> TrainingSettings:
        settings = {
            "dataset_name": str(digits),
            "output_dir": str(tmp_path / "run"),
            "config_overrides": json.dumps(TINY_MODEL),
            "per_device_train_batch_size": 32,
            "num_train_epochs": 2,
            "num_warmup_epochs": 0.5,
            "num_workers": 0,
            "logging_steps": 2,
            "eval_epochs": 0,
            "shuffle_buffer_size": 64,
        }
        return TrainingSettings.from_recipe("demo", **{**settings, **changes})

    return make


@pytest.fixture
def make_checkpoint(tmp_path, scramble):
    """Saves a very small classifier of 32 px images with random weights, and returns its folder."""

    def make(name="checkpoint", labels=NAMES, metaformer=None, side=32, **changes) -> str:
        classes = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        fields = {**TINY_MODEL, "problem_type": "single_label_classification", **classes, **changes}
        if metaformer is None:
            model = PoolFormerForImageClassification(PoolFormerConfig(**fields))
        else:
            model = MetaFormerForImageClassification(
                MetaFormerConfig.from_variant(metaformer, **{"image_size": side, **fields})
            )
        scramble(model).save_pretrained(tmp_path / name)
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        PoolFormerImageProcessor(**size, crop_pct=1.0).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def make_settings_from(make_settings):
    """As `make_settings`, for a run that starts from a checkpoint."""

    def make(checkpoint: str, **changes) -> TrainingSettings:
        scratch = {"config_name": None, "config_overrides": None, "image_size": None}
        return make_settings(**{"model_name_or_path": checkpoint, **scratch, **changes})

    return make
