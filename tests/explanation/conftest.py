"""A saved classifier and an image."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor


LABELS = {0: "tabby, tabby cat", 1: "Egyptian cat", 2: "5", 3: "tiger", 4: "tiger"}


@pytest.fixture
def saved_classifier(tmp_path, scramble):
    config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(8, 16, 24, 32), id2label=LABELS)
    torch.manual_seed(1)
    scramble(PoolFormerForImageClassification(config)).save_pretrained(tmp_path / "cats")
    processor = PoolFormerImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128})
    processor.save_pretrained(tmp_path / "cats")
    return tmp_path / "cats"


@pytest.fixture
def photo(tmp_path):
    """A photograph's worth of gradients, wider than the crop."""
    y, x = np.mgrid[:120, :200]
    pixels = np.stack([x, y * 2, (x * y) // 100], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"
