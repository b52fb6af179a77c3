"""Saved models of every task, images, and a page that serves them on the loopback interface."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from hf_poolformer import (
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerForInstanceSegmentation,
    PoolFormerForObjectDetection,
    PoolFormerForSemanticSegmentation,
    PoolFormerImageProcessor,
)
from hf_poolformer.reports.page import Gallery, Page, Section, Table, Tile, write_page


TINY = {
    "depths": (1, 1, 1, 1),
    "hidden_sizes": (8, 16, 16, 32),
    "fpn_feature_size": 16,
    "decoder_hidden_size": 8,
    "box_head_hidden_size": 16,
    "mask_head_num_convs": 1,
    "rpn_num_proposals": 30,
    "max_detections": 10,
    "id2label": {0: "intact", 1: "cracked", 2: "dark", 3: "broken <b>", 4: "wet", 5: "dry"},
}
PROBLEMS = {
    "labels": {"problem_type": "multi_label_classification", "label_thresholds": [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]},
    "numbers": {"problem_type": "regression"},
}
DENSE = {
    "segmenter": PoolFormerForSemanticSegmentation,
    "detector": PoolFormerForObjectDetection,
    "instances": PoolFormerForInstanceSegmentation,
}


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory):
    """Folders `classifier`, `segmenter`, `detector`, `instances`, `labels` and `numbers`; random weights find things.

    Of `labels` some always apply, and the others never.
    """
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    classifiers = dict.fromkeys(PROBLEMS, PoolFormerForImageClassification)
    kinds = {"classifier": PoolFormerForImageClassification, **DENSE, **classifiers}
    for name, kind in kinds.items():
        model = kind(PoolFormerConfig(**TINY, **PROBLEMS.get(name, {})))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
                if "cls_logits.bias" in key:  # of the detectors, which would otherwise start out sure of nothing
                    parameter.fill_(0.5)
        model.save_pretrained(root / name)
        if name == "classifier" or name in PROBLEMS:
            processor = PoolFormerImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
        elif name == "segmenter":
            processor = PoolFormerImageProcessor.for_segmentation(size={"shortest_edge": 96, "longest_edge": 192})
        else:
            processor = PoolFormerImageProcessor.for_detection(size={"shortest_edge": 96, "longest_edge": 192})
        processor.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """`photo.png`, `other.jpg`, `broken.png` (no image), `cut.jpg` (ends too early), `bomb.png` (64 megapixels)."""
    root = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[:120, :200]
    pixels = np.stack([x, y * 2, (x * y) // 100], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(root / "photo.png")
    noise = np.random.default_rng(0).integers(0, 255, (150, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "other.jpg")
    (root / "broken.png").write_bytes(b"not a picture")
    (root / "cut.jpg").write_bytes((root / "other.jpg").read_bytes()[:2000])
    Image.new("1", (8000, 8000)).save(root / "bomb.png")
    return root


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """The folder of a report: a table of three classes, and one image."""
    folder = tmp_path_factory.mktemp("report")
    table = Table(["class", "F1"], [["intact", 0.9], ["<script>cracked</script>", 0.2], ["dark", 0.5]])
    images = Gallery([Tile([Image.new("RGB", (40, 30), "red")], ["dark.png"])])
    sections = [Section("Classes", [table]), Section("Images", [images])]
    write_page(folder / "report.html", Page("How it does", "", sections))
    return folder


@pytest.fixture(scope="module")
def serve():
    """`hf_poolformer.app.interface.serve` on a free loopback port; every page is closed in the end."""
    pytest.importorskip("gradio", minversion="6.20", reason="needs gradio: pip install 'hf-poolformer[app]'")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    from hf_poolformer.app import interface

    pages = []

    def run(*models, **options):
        pages.append(interface.serve([str(model) for model in models], device="cpu", **options))
        return pages[-1]

    yield run
    for page in pages:
        page.close(verbose=False)
