"""What a report says besides the figures, against scikit-learn and scipy where they have it; and slices."""

import itertools
import math

import numpy as np
import pytest

from hf_poolformer.evaluation.metrics import calibration_error
from hf_poolformer.reports import analysis
from hf_poolformer.reports.slices import divide, fisher, holm, slices_of


sklearn_metrics = pytest.importorskip("sklearn.metrics")


def answers(images=500, classes=5, seed=0, sharp=1.0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, images)
    logits = draw.normal(0, 1.5, (images, classes))
    logits[np.arange(images), labels] += 2
    powers = np.exp(logits * sharp)
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32), labels


def test_confusions():
    probabilities, labels = answers()
    predicted = probabilities.argmax(1)
    matrix = analysis.confusion_matrix(labels, predicted, 5)
    np.testing.assert_array_equal(matrix, sklearn_metrics.confusion_matrix(labels, predicted))
    pairs = analysis.confused_pairs(labels, predicted, 5)
    assert sum(count for *_, count in pairs) == (labels != predicted).sum()
    assert all(matrix[a, b] == count for a, b, count in pairs)
    assert [count for *_, count in pairs] == sorted((count for *_, count in pairs), reverse=True)


def test_reliability_is_that_of_the_calibration_error():
    probabilities, labels = answers(sharp=2)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    rows = analysis.reliability(confidence, right)
    expected = calibration_error(confidence, right, np.ones((len(right), 1)))[0]
    assert analysis.calibration_error(rows) == pytest.approx(expected)
    assert all(row["right_interval"][0] <= row["right"] <= row["right_interval"][1] for row in rows)


def test_temperature():
    honest, labels = answers(images=4000)
    sure, _ = answers(images=4000, sharp=3)
    found = analysis.best_temperature(sure, labels)
    # The one makes the other's probabilities of it, and nothing is as good.
    assert found == pytest.approx(3 * analysis.best_temperature(honest, labels), rel=0.01)
    loss = [
        sklearn_metrics.log_loss(labels, analysis.at_temperature(sure, temperature))
        for temperature in (found, found * 0.8, found / 0.8)
    ]
    assert loss[0] == min(loss)


def test_ambiguous_images():
    probabilities = np.array(
        [[0.48, 0.46, 0.06], [0.5, 0.5, 0], [0.34, 0.33, 0.33], [0.9, 0.1, 0], [0.06, 0.48, 0.46]]
    )
    found = analysis.ambiguous_images(probabilities, np.array([1, 0, 0, 0, 0]))  # the last is labelled a third class
    assert found.images.tolist() == [1, 0]
    assert (found.first[1], found.second[1]) == (0, 1) and found.shares[1].tolist() == [0.48, 0.46]


def test_threshold_curves():
    draw = np.random.default_rng(0)
    targets = (draw.random((300, 3)) < [0.5, 0.1, 0]).astype(np.uint8)
    probabilities = np.clip(draw.normal(0.3 + 0.4 * targets, 0.2), 0, 1).astype(np.float32)
    curves = analysis.threshold_curves(probabilities, targets)
    for place in (0, 37, 50, 99):
        predicted = probabilities[:, 1] >= np.float32(analysis.THRESHOLDS[place])
        for name, score in (("precision", "precision_score"), ("recall", "recall_score"), ("f1", "f1_score")):
            expected = getattr(sklearn_metrics, score)(targets[:, 1], predicted, zero_division=np.nan)
            np.testing.assert_allclose(curves[name][1, place], expected, err_msg=f"{name} {place}")
    assert np.isnan(curves["recall"][2]).all()


def test_labels_that_are_confused_with_each_other():
    targets, predicted = np.zeros((2, 100, 4), dtype=np.uint8)
    targets[:10, 0] = predicted[:10, 1] = 1  # ten times 1 in the place of 0
    targets[50:60, 2] = 1  # missed, by itself
    predicted[70:75, 3] = 1  # too many, by itself
    assert analysis.confused_labels(targets, predicted) == [(0, 1, 10, 1.0)]


def test_numbers():
    draw = np.random.default_rng(0)
    truth = draw.normal(10, 3, 200).astype(np.float32)
    guess = (truth + draw.normal(0.5, 1, 200)).astype(np.float32)
    found = analysis.number_figures(guess, truth)
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(truth, guess), rel=1e-5)
    assert found["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(truth, guess), rel=1e-5)
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(truth, guess), rel=1e-5)
    ranges = analysis.target_ranges(truth)
    assert [len(members) for members in ranges] == [40] * 5
    assert all(truth[a].max() <= truth[b].min() for a, b in itertools.pairwise(ranges))
    assert math.isnan(analysis.number_figures(guess, np.full(200, 2.0))["r2"])


def test_fisher_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for hits, drawn, all_hits, count in [
        (0, 5, 3, 20),
        (3, 5, 3, 20),
        (40, 100, 60, 1000),
        (7, 7, 7, 7),
        (0, 9, 0, 30),
    ]:
        table = [[hits, drawn - hits], [all_hits - hits, count - drawn - all_hits + hits]]
        expected = stats.fisher_exact(table).pvalue
        assert fisher(hits, drawn, all_hits, count) == pytest.approx(expected, rel=1e-6), table


def test_holm():
    # By hand: 0.01 * 3, 0.02 * 2, 0.04 * 1 in ascending order, each at least the one before.
    np.testing.assert_allclose(holm([0.04, 0.01, math.nan, 0.02]), [0.04, 0.03, math.nan, 0.04])


def test_slices_tell_what_is_worse_from_what_is_chance():
    draw = np.random.default_rng(0)
    camera = draw.choice(["a", "b", "c", None], 2000, p=[0.5, 0.3, 0.1, 0.1])
    lot = draw.integers(0, 10, 2000).tolist()
    wrong = draw.random(2000) < np.where(camera == "c", 0.4, 0.1)
    found, left_out = slices_of(
        {"camera": camera.tolist(), "lot": lot}, lambda members: {"images": len(members)}, wrong
    )
    assert (found[0].column, found[0].value, found[0].verdict) == ("camera", "c", "worse")
    assert {part.verdict for part in found if part.column == "lot"} == {"within chance"}
    assert {part.value for part in found if part.column == "camera"} == {"a", "b", "c", "none"}
    assert all(part.figures["images"] == part.images for part in found) and not left_out
    # The same of numbers, by the mean.
    found, _ = slices_of({"camera": camera.tolist()}, lambda members: {}, wrong.astype(float))
    assert found[0].value == "c" and found[0].verdict == "worse"
    # One slice of everything has nothing to be compared with.
    (only,), _ = slices_of({"site": ["x"] * 2000}, lambda members: {}, wrong)
    assert only.verdict.startswith("no other images")


def test_numbers_become_quarters_and_many_values_are_bounded():
    codes, names, rest = divide([*np.arange(100.0), None, math.nan])
    assert names == ["0 to 24", "25 to 49", "50 to 74", "75 to 99"] and not rest
    assert codes[:100].tolist() == [0] * 25 + [1] * 25 + [2] * 25 + [3] * 25 and codes[100:].tolist() == [-1, -1]
    codes, names, rest = divide([f"image {index}" for index in range(1000)] + ["image 7"])
    assert len(names) == 200 and names[0] == "image 7" and rest == 800 and (codes >= 0).sum() == 201
