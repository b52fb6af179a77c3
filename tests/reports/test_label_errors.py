"""Confident learning: by hand from the paper's definitions, and how many of the planted errors are found."""

import numpy as np
import pytest

from hf_poolformer.reports.label_errors import confident_learning, confident_learning_of_each


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


def planted(images=4000, classes=6, flipped=0.05, seed=0):
    """Probabilities of a model that is mostly right, labels of which some were exchanged, and which."""
    draw = np.random.default_rng(seed)
    true = draw.integers(0, classes, images)
    logits = draw.normal(0, 1, (images, classes))
    logits[np.arange(images), true] += draw.normal(3.5, 1.2, images)
    wrong = draw.random(images) < flipped
    labels = np.where(wrong, (true + draw.integers(1, classes, images)) % classes, true)
    return softmax(logits), labels, wrong, true


def test_the_example_by_hand():
    # thresholds: (.9 + .6 + .15) / 3, (.8 + .6) / 2, (.8 + .4) / 2; the third image is confidently of class 1, the
    # fifth and the seventh reach no threshold.
    of_0 = [[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.15, 0.8, 0.05]]
    of_1, of_2 = [[0.1, 0.8, 0.1], [0.2, 0.6, 0.2]], [[0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]
    probabilities = np.array([*of_0, *of_1, *of_2])
    found = confident_learning(probabilities, np.array([0, 0, 0, 1, 1, 2, 2]))
    np.testing.assert_allclose(found.thresholds, [0.55, 0.7, 0.6])
    assert found.confident.tolist() == [0, 0, 1, 1, -1, 2, -1]
    joint = np.zeros((3, 3), dtype=int)
    joint[found.given, found.meant] = found.counts
    assert joint.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert found.estimate == pytest.approx(1.0)  # a third of the three images of class 0
    assert found.found.tolist() == [2] and found.suggested[2] == 1
    assert found.scores[2] == pytest.approx(np.log(0.8 / 0.15))


def test_of_two_classes_that_reach_their_thresholds_the_more_probable_one_counts():
    # Class 1 is never probable, so that its threshold is low: "label collision" in the paper.
    probabilities = np.array([[0.7, 0.3], [0.7, 0.3], [0.8, 0.2]])
    found = confident_learning(probabilities, np.array([0, 1, 1]))
    np.testing.assert_allclose(found.thresholds, [0.7, 0.25])
    assert found.confident.tolist() == [0, 0, 0] and found.found.tolist() == [2, 1]


def test_planted_errors_are_found_and_come_first():
    probabilities, labels, wrong, true = planted()
    found = confident_learning(probabilities, labels)
    hits = wrong[found.found]
    half = np.searchsorted(hits.cumsum(), wrong.sum() / 2) + 1
    assert hits[:half].mean() > 0.9
    assert hits.sum() > 0.6 * wrong.sum()
    assert found.estimate == pytest.approx(wrong.sum(), rel=0.5)
    right = found.suggested[found.found[hits]] == true[found.found[hits]]
    assert right.mean() > 0.95
    # What the model contradicts more comes first, and a temperature changes nothing of the order.
    assert (np.diff(found.scores[found.found]) <= 0).all()
    cooler = confident_learning(softmax(np.log(probabilities.astype(np.float64)) / 2), labels)
    both = np.intersect1d(found.found, cooler.found)
    np.testing.assert_array_equal(found.found[np.isin(found.found, both)], cooler.found[np.isin(cooler.found, both)])


def test_right_labels_of_a_sure_model_are_not_doubted():
    probabilities, _, _, true = planted()
    sure = np.full_like(probabilities, 0.01)
    sure[np.arange(len(true)), true] = 0.95
    found = confident_learning(sure, true)
    assert not len(found.found) and found.estimate == 0 and not found.systematic()


def test_a_folder_with_the_images_of_another_class():
    probabilities, labels, _, true = planted(flipped=0)
    labels = np.where((true == 2) & (np.arange(len(true)) % 2 == 0), 4, labels)  # half of class 2 lies in folder 4,
    kept = true != 4  # whose own images are gone
    ((given, meant, doubted, confident),) = confident_learning(probabilities[kept], labels[kept]).systematic()
    assert (given, meant) == (4, 2) and doubted > 0.6 * confident


@pytest.mark.parametrize("classes", [1, 3])
def test_one_class_and_classes_without_images(classes):
    probabilities = np.eye(classes)[[0, 0]] * 0.9 + 0.1 / classes
    found = confident_learning(probabilities, np.array([0, 0]))
    assert not len(found.found) and np.isnan(found.thresholds[1:]).all() and np.isfinite(found.scores).all()


def test_probabilities_that_were_rounded_to_zero():
    probabilities = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=np.float32)
    found = confident_learning(probabilities, np.array([0, 1, 1, 1]))
    assert found.found.tolist() == [1] and np.isfinite(found.scores).all()


def test_missing_and_extra_labels():
    draw = np.random.default_rng(0)
    true = draw.random((3000, 3)) < [0.5, 0.2, 0.05]
    probabilities = 1 / (1 + np.exp(-draw.normal(np.where(true, 3, -3), 1.3)))
    targets = true.copy()
    flipped = draw.random(true.shape) < 0.03
    targets[flipped] ^= True
    found = confident_learning_of_each(probabilities.astype(np.float32), targets.astype(np.uint8))
    hits = flipped[found.images, found.labels]
    assert hits[: flipped.sum() // 2].mean() > 0.9 and hits.sum() > 0.6 * flipped.sum()
    np.testing.assert_array_equal(found.missing, ~targets[found.images, found.labels])
    # A label that every image has, or none, is not asked about.
    assert not len(confident_learning_of_each(probabilities, np.ones_like(targets)).images)
