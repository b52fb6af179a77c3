"""Errors of detectors by kind, thresholds and intervals against cases done by hand, and against COCO's own figures."""

import numpy as np
import pytest

from hf_poolformer.evaluation.dense_metrics import DetectionMetric, SegmentationMetric, described
from hf_poolformer.evaluation.dense_rows import MapRows, ObjectRows, at_threshold, curve_of, mean_iou_intervals


class Processor:
    image_mean = image_std = (0.5, 0.5, 0.5)


def truth_of(boxes, labels, crowd=None):
    crowd = [0] * len(boxes) if crowd is None else crowd
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    columns = {"iscrowd": np.array(crowd), "area": np.array(areas, float)}
    return described(np.array(boxes, float).reshape(-1, 4), np.array(labels), None, **columns)


def found_of(boxes, labels, scores):
    return described(
        np.array(boxes, float).reshape(-1, 4), np.array(labels), None, scores=np.array(scores, np.float32)
    )


def row_of(truth, found):
    return ObjectRows(Processor, keep=0).row({"truth": truth, "found": found})[0]


TRUTH = truth_of([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 90, 30]], [0, 0, 1, 1], [0, 0, 0, 1])
# One of each kind, the surest first: IoU 1; the same object again; IoU 1/3 with an object of its class; IoU 1
# with one of the other; IoU 1/3 with that; nowhere; inside the crowd.
FOUND = found_of(
    [
        [0, 0, 10, 10],
        [0, 0, 10, 9],
        [25, 0, 35, 10],
        [40, 0, 50, 10],
        [45, 0, 55, 10],
        [0, 80, 9, 99],
        [65, 5, 70, 10],
    ],
    [0, 0, 0, 0, 0, 0, 1],
    [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
)
KINDS = ["right", "duplicate", "badly_placed", "wrong_class", "wrong_class_and_place", "background", "ignored"]


def test_each_kind_of_error():
    row = row_of(TRUTH, FOUND)
    assert row["kinds"] == KINDS and row["of"].tolist()[:5] == [0, 0, 1, 2, 2]
    assert row["objects"] == 3 and row["true_labels"].tolist() == [0, 0, 1]
    # Two objects without a right detection, and 0.1 that the first lacks; wrong ones of 0.8 to 0.4.
    assert row["cost"] == pytest.approx(2.1 + 0.8 + 0.7 + 0.6 + 0.5 + 0.4, rel=1e-6)
    all_of_them = at_threshold(row, 0.0)
    assert {kind: all_of_them[kind] for kind in KINDS[:-1]} == dict.fromkeys(KINDS[:-1], 1)
    assert all_of_them["detections"] == 6 and all_of_them["missed"] == 0
    assert all_of_them["f1"] == pytest.approx(2 / 9)
    few = at_threshold(row, 0.65)
    assert few["detections"] == 3 and few["missed"] == 1 and few["f1"] == pytest.approx(2 / 6)
    none = at_threshold(row, 0.95)
    assert none["detections"] == 0 and none["missed"] == 3 and none["f1"] == 0


def test_the_surest_detection_gets_the_object():
    truth = truth_of([[0, 0, 10, 10]], [0])
    row = row_of(truth, found_of([[0, 0, 10, 10], [0, 0, 10, 8]], [0, 0], [0.3, 0.6]))
    assert row["kinds"] == ["duplicate", "right"]


def test_images_without_objects_and_without_detections():
    nothing, none = truth_of([], []), found_of([], [], [])
    empty = row_of(nothing, none)
    assert empty["cost"] == 0 and np.isnan(at_threshold(empty, 0.5)["f1"])
    alarm = row_of(nothing, found_of([[0, 0, 5, 5]], [0], [0.7]))
    assert alarm["kinds"] == ["background"] and alarm["cost"] == pytest.approx(0.7)
    missed = row_of(TRUTH, none)
    assert missed["cost"] == 3 and at_threshold(missed, 0.0)["missed"] == 3
    assert curve_of([empty, missed]).best is None and curve_of([alarm]).best is None


def test_the_threshold_of_the_best_f1():
    """Right, wrong, right and right at 0.9, 0.8, 0.8 and 0.2, of four objects; equal scores are taken together."""
    truth = truth_of([[20 * k, 0, 20 * k + 10, 10] for k in range(4)], [0] * 4)
    boxes = [[0, 0, 10, 10], [0, 50, 10, 60], [20, 0, 30, 10], [40, 0, 50, 10]]
    curve = curve_of([row_of(truth, found_of(boxes, [0] * 4, [0.9, 0.8, 0.8, 0.2]))])
    np.testing.assert_allclose(curve.thresholds, [0.9, 0.8, 0.2], rtol=1e-6)
    np.testing.assert_allclose(curve.precision, [1, 2 / 3, 3 / 4])
    np.testing.assert_allclose(curve.recall, [1 / 4, 1 / 2, 3 / 4])
    np.testing.assert_allclose(curve.f1, [2 / 5, 4 / 7, 6 / 8])
    assert curve.best == pytest.approx(0.2)


def average_precision(rows, label):
    """COCO's at an IoU of 0.5, from what the rows say."""
    pairs = [
        (-score, kind == "right")
        for row in rows
        for score, kind, own in zip(row["scores"], row["kinds"], row["labels"], strict=True)
        if own == label and kind != "ignored"
    ]
    right = np.array([hit for _, hit in sorted(pairs, key=lambda pair: pair[0])])
    objects = sum((row["true_labels"] == label).sum() for row in rows)
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1]
    places = np.searchsorted(hits / objects, np.linspace(0, 1, 101))
    return np.append(precision, 0)[np.minimum(places, len(precision))].mean()


def test_right_is_what_coco_takes_for_right():
    """The average precision of each class at an IoU of 0.5, from the rows, is that of pycocotools."""
    rng = np.random.default_rng(0)
    metric, rows = DetectionMetric(3, with_masks=False), []
    for number in range(40):
        count = int(rng.integers(0, 6))
        corner = rng.random((count, 2)) * 60
        truth = np.hstack([corner, corner + 8 + rng.random((count, 2)) * 30])
        labels = rng.integers(0, 3, count)
        near = np.repeat(truth, 2, axis=0) + rng.normal(0, 3, (2 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        guessed = np.where(rng.random(2 * count) < 0.8, np.repeat(labels, 2), rng.integers(0, 3, 2 * count))
        objects = truth_of(truth.tolist(), labels, (rng.random(count) < 0.15).astype(int))
        found = found_of(near.reshape(-1, 4), guessed, rng.random(2 * count))
        metric.images.append({"key": bytes([number]), "size": (100, 100), "found": found, "truth": objects})
        rows.append(row_of(objects, found))
    expected = DetectionMetric.compute([metric.state()])["eval_per_class_map_50"]
    assert min(expected) > 0.2 and max(expected) < 0.95
    assert [average_precision(rows, label) for label in range(3)] == pytest.approx(expected, rel=1e-9)


def test_intervals_of_the_mean_iou():
    rng = np.random.default_rng(0)
    metric, maps = SegmentationMetric(4), MapRows(Processor, keep=0)
    rows = []
    for _ in range(30):
        truth = rng.integers(0, 3, (8, 9))  # class 3 is nowhere
        guess = np.where(rng.random(truth.shape) < rng.uniform(0.3, 1), truth, rng.integers(0, 3, truth.shape))
        rows.append(maps.row(metric.update(guess, truth))[0])
    result = SegmentationMetric.compute([metric.state()])
    intervals = mean_iou_intervals(rows, 4)
    low, high = intervals["eval_miou"]
    assert low < result["eval_miou"] < high and 0.02 < high - low < 0.3
    for value, (below, above) in zip(result["eval_per_class_iou"][:3], intervals["eval_per_class_iou"], strict=False):
        assert below < value < above
    assert np.isnan(intervals["eval_per_class_iou"][3]).all()
    same = mean_iou_intervals([rows[0]] * 30, 4)  # what is the same everywhere leaves nothing to chance
    assert same["eval_miou"][0] == pytest.approx(same["eval_miou"][1], rel=1e-12)
    assert mean_iou_intervals([], 4) == {}


def test_an_image_in_which_no_pixel_counts():
    metric, maps = SegmentationMetric(2), MapRows(Processor, keep=0)
    row, badness = maps.row(metric.update(np.zeros((4, 4), int), np.full((4, 4), 255)))
    assert np.isnan(row["iou"]) and not badness > 0
    whole, _ = maps.row(metric.update(np.ones((4, 4), int), np.repeat([[0], [1]], [8, 8], axis=0).reshape(4, 4)))
    assert whole["iou"] == pytest.approx(0.25)  # nothing of class 0, half of what was found of class 1
