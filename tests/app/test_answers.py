"""What the app says about an image, against the models' own post-processing. Needs no Gradio."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    pipeline,
)

from hf_poolformer.app.answers import answer, open_image
from hf_poolformer.app.models import Models
from hf_poolformer.foundation.errors import UserError


@pytest.fixture
def load(saved_models):
    return lambda name: Models([str(saved_models / name)], device="cpu").get(None)


@pytest.fixture
def photo(pictures):
    return Image.open(pictures / "photo.png")


def test_a_classifier(load, saved_models, photo):
    found = answer(load("classifier"), photo)
    expected = pipeline("image-classification", str(saved_models / "classifier"), top_k=5)(photo)
    assert list(found.scores) == [item["label"] for item in expected]
    assert list(found.scores.values()) == pytest.approx([item["score"] for item in expected], rel=1e-4)
    assert found.picture.size == (600, 360), "a multiple of 200 x 120, above 448"
    assert f"Grad-CAM for “{expected[0]['label']}”" in found.note
    assert "centre crop" in found.note
    other = answer(load("classifier"), photo, expected[3]["label"])
    assert other.scores == pytest.approx(found.scores)
    assert np.asarray(other.picture).tolist() != np.asarray(found.picture).tolist()
    with pytest.raises(UserError, match="no class 'x'"):
        answer(load("classifier"), photo, "x")


def test_a_classifier_of_another_family_has_no_map(tmp_path, photo):
    from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

    config = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], id2label={0: "a", 1: "b"})
    ConvNextForImageClassification(config).save_pretrained(tmp_path / "other")
    ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path / "other")
    found = answer(Models([str(tmp_path / "other")], device="cpu").get(None), photo)
    assert found.picture is None
    assert found.note.startswith("No heat map: ")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "other").eval()
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "other")(photo, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits.softmax(-1)[0]
    assert found.scores == pytest.approx({"a": expected[0].item(), "b": expected[1].item()}, rel=1e-4)


def test_a_segmenter(load, saved_models, photo):
    found = answer(load("segmenter"), photo)
    processor = AutoImageProcessor.from_pretrained(saved_models / "segmenter")
    model = AutoModelForSemanticSegmentation.from_pretrained(saved_models / "segmenter").eval()
    with torch.inference_mode():
        outputs = model(**processor(photo, return_tensors="pt"))
    (classes,) = processor.post_process_semantic_segmentation(outputs, [(360, 600)])
    shares = {model.config.id2label[i]: (classes == i).float().mean().item() for i in range(6)}
    best = max(shares, key=shares.get)
    assert found.rows[0] == [best, f"{shares[best]:.1%}"]
    assert len(found.rows) == sum(share >= 0.001 for share in shares.values())
    assert found.scores == {}
    assert found.picture.width > found.picture.height


def test_a_detector(load, saved_models, photo):
    found = answer(load("detector"), photo)
    processor = AutoImageProcessor.from_pretrained(saved_models / "detector")
    model = AutoModelForObjectDetection.from_pretrained(saved_models / "detector").eval()
    with torch.inference_mode():
        outputs = model(**processor(photo, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, 0.4, [(120, 200)])
    assert len(expected["labels"]) > 0
    assert [row[0] for row in found.rows] == [model.config.id2label[i] for i in expected["labels"].tolist()]
    assert [row[2] for row in found.rows] == [
        ", ".join(str(round(value)) for value in box) for box in expected["boxes"].tolist()
    ]
    assert found.note == f"{len(found.rows)} found with a score of at least 40%."


def test_boxes_are_in_pixels_of_the_image_as_it_was(load, photo):
    large = photo.resize((2000, 1200), Image.Resampling.BICUBIC)
    small, enlarged = (answer(load("detector"), image).rows for image in (photo, large))
    first, second = ([int(value) for value in rows[0][2].split(", ")] for rows in (small, enlarged))
    assert second == pytest.approx([10 * value for value in first], abs=60)


def test_an_instance_segmenter(load, photo):
    found = answer(load("instances"), photo)
    assert found.picture is not None
    assert "found with a score" in found.note
    assert all(len(row) == 3 for row in found.rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [("broken.png", "not an image"), ("cut.jpg", "truncated"), ("bomb.png", "8000x8000 pixels, more than the limit")],
)
def test_files_that_cannot_be_used(pictures, name, message):
    with pytest.raises(UserError, match=f"This file cannot be used: .*{message}"):
        open_image(pictures / name, max_pixels=40_000_000)
