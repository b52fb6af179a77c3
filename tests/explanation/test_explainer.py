"""From an image file to classes, scores and places."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_poolformer.explanation.explainer import DRAWN_SIDE, explain, find_class
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction.inference import Predictor


@pytest.fixture
def predictor(saved_classifier):
    return Predictor(str(saved_classifier), device="cpu")


def test_scores_are_those_of_the_pipeline(predictor, saved_classifier, photo):
    found = explain(predictor, Image.open(photo), top_k=3)
    expected = pipeline("image-classification", str(saved_classifier), top_k=3)(str(photo))
    assert [item.label.split(" (")[0] for item in found.classes] == [item["label"] for item in expected]
    assert [item.score for item in found.classes] == pytest.approx([item["score"] for item in expected], rel=1e-4)
    assert list(found.scores) == ["tabby, tabby cat", "Egyptian cat", "5", "tiger (3)", "tiger (4)"]


def test_the_map_covers_the_centre_crop(predictor, photo):
    found = explain(predictor, Image.open(photo), ["Egyptian cat"])
    (heat,) = [item.heat for item in found.classes]
    assert found.image.size == (600, 360), "small images grow to be drawn"
    assert heat.shape == (360, 600)
    # Shortest edge to floor(128 / .9) = 142, of which 128 are left in both directions.
    expected = np.zeros((360, 600), dtype=bool)
    expected[18:342, 138:462] = True
    assert (~np.isnan(heat)).sum() == pytest.approx(expected.sum(), rel=0.03)
    assert (~np.isnan(heat) & expected).sum() == pytest.approx(expected.sum(), rel=0.03)
    assert found.seen == pytest.approx((46, 6, 154, 114), abs=0.6)


def test_large_images_are_drawn_smaller_but_seen_whole(predictor, photo):
    small = Image.open(photo)
    large = small.resize((4000, 2400), Image.Resampling.BICUBIC)
    found, expected = (explain(predictor, image, [3], method="cam") for image in (large, small))
    assert found.image.size == (DRAWN_SIDE, round(DRAWN_SIDE * 0.6))
    assert found.classes[0].heat.shape == found.image.size[::-1]
    assert found.size == (4000, 2400)
    assert found.seen == pytest.approx([20 * value for value in expected.seen], abs=15)
    # The same picture, resampled.
    assert found.classes[0].logit == pytest.approx(expected.classes[0].logit, abs=0.05)


def test_classes_by_name_synonym_and_number(predictor):
    config = predictor.model.config
    assert find_class(config, "tabby, tabby cat") == 0
    assert find_class(config, "Tabby Cat") == 0
    assert find_class(config, "egyptian cat") == 1
    assert find_class(config, "5") == 2, "a name, though it looks like a number"
    assert find_class(config, "4") == 4
    assert find_class(config, "tiger (4)") == 4
    assert find_class(config, 3) == 3
    for name, message in {
        "egyptian bat": "did you mean Egyptian cat",
        "9": "no class '9'",
        "Tiger": r"several classes.*3 \(tiger\), 4 \(tiger\)",
    }.items():
        with pytest.raises(UserError, match=message):
            find_class(config, name)


def test_multi_label_and_regression_scores(predictor, photo):
    image = Image.open(photo)
    predictor.model.config.problem_type = "multi_label_classification"
    (found,) = explain(predictor, image, [1]).classes
    assert found.score == pytest.approx(torch.tensor(found.logit).sigmoid().item())
    assert found.score_text.endswith("%")
    predictor.model.config.problem_type = "regression"
    (found,) = explain(predictor, image, [1]).classes
    assert found.score == pytest.approx(found.logit)
    assert float(found.score_text) == pytest.approx(found.logit, rel=1e-3)
