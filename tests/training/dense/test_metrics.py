"""Metrics against independent computations: by hand, by torchmetrics, by counting pixels."""

import numpy as np
import pytest
import torch

from hf_poolformer.data.dense.annotations import Objects
from hf_poolformer.evaluation.dense_metrics import DetectionMetric, SegmentationMetric


def objects(boxes, labels, masks=None, crowd=None, areas=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    if areas is None:
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) if masks is None else masks.sum((1, 2))
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    return Objects(boxes, np.array(labels, np.int64), masks, crowd, np.array(areas, np.float64))


def found(boxes, scores, labels, masks=None):
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(scores), np.array(labels, np.int64), masks


def test_mean_iou_is_what_counting_pixels_gives():
    rng = np.random.default_rng(0)
    truths = [rng.integers(0, 4, (30, 20 + extra)) for extra in range(3)]  # class 4 is nowhere
    truths[1][:9] = 255
    guesses = [np.where(rng.random(truth.shape) < 0.6, truth % 5, rng.integers(0, 4, truth.shape)) for truth in truths]
    guesses = [np.where(guess == 0, 1, guess) for guess in guesses]  # class 0 is never predicted
    halves = [SegmentationMetric(5), SegmentationMetric(5)]
    for index, pair in enumerate(zip(guesses, truths, strict=True)):
        halves[index % 2].update(*pair)
    results = SegmentationMetric.compute([half.state() for half in halves])

    guess, truth = (np.concatenate([part.ravel() for part in parts]) for parts in (guesses, truths))
    guess, truth = guess[truth != 255], truth[truth != 255]
    iou = [((guess == c) & (truth == c)).sum() / ((guess == c) | (truth == c)).sum() for c in range(4)]
    assert results["eval_per_class_iou"][:4] == pytest.approx(iou, rel=1e-12)
    assert iou[0] == 0 and np.isnan(results["eval_per_class_iou"][4])
    assert results["eval_miou"] == pytest.approx(np.mean(iou), rel=1e-12)
    assert results["eval_pixel_accuracy"] == pytest.approx((guess == truth).mean(), rel=1e-12)
    accuracy = [(guess[truth == c] == c).mean() for c in range(4)]
    assert results["eval_mean_accuracy"] == pytest.approx(np.mean(accuracy), rel=1e-12)


def test_average_precision_of_a_case_that_can_be_done_by_hand():
    """Two objects; the surest detection is right (IoU 1), the second wrong, the third right at IoU 0.6.

    At IoU .50 and .55 and .60 precision is 1 up to recall 1/2, then 2/3: of COCO's 101 points 51 and 50. Beyond .60
    the second object is missed: 51 points of 1, 50 of 0.
    """
    metric = DetectionMetric(1, with_masks=False)
    truth = objects([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0])
    guesses = found([[0, 0, 10, 10], [80, 80, 90, 90], [50, 50, 60, 56]], [0.9, 0.8, 0.7], [0, 0, 0])
    metric.update(b"1", (100, 100), *guesses, truth)
    results = DetectionMetric.compute([metric.state()])
    high, low = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert results["eval_map_50"] == pytest.approx(high, rel=1e-9)
    assert results["eval_map_75"] == pytest.approx(low, rel=1e-9)
    # IoU of exactly 0.6 counts at the threshold 0.6, if both are the same number.
    assert results["eval_map"] == pytest.approx((3 * high + 7 * low) / 10, rel=1e-9)
    assert results["eval_per_class_map"] == [pytest.approx(results["eval_map"])]


def random_image(rng, num_labels=3):
    height, width = int(rng.integers(60, 200)), int(rng.integers(60, 200))

    def boxes(count):
        corner = rng.random((count, 2)) * [width * 0.6, height * 0.6]
        return np.hstack([corner, corner + 4 + rng.random((count, 2)) * [width * 0.35, height * 0.35]])

    truth = boxes(rng.integers(0, 6))
    near = truth + rng.normal(0, 2, truth.shape)
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    guess = np.vstack([near, boxes(3)]).clip(0, [width, height] * 2)
    labels = rng.integers(0, num_labels, len(truth))
    guessed = np.concatenate([np.where(rng.random(len(truth)) < 0.8, labels, 0), rng.integers(0, num_labels, 3)])

    def masks(rows):
        y, x = np.mgrid[:height, :width] + 0.5
        inside = [(x > a) & (y > b) & (x < c) & (y < d) & (x + y > a + b + 3) for a, b, c, d in rows]
        return np.array(inside, bool).reshape(-1, height, width)

    crowd = rng.random(len(truth)) < 0.15
    truth_masks = masks(truth)
    return (
        (height, width),
        found(guess, rng.random(len(guess)), guessed, masks(guess)),
        objects(truth, labels, truth_masks, crowd, truth_masks.sum((1, 2))),
    )


def test_average_precision_is_torchmetrics_for_boxes_and_masks_in_two_parts():
    torchmetrics = pytest.importorskip("torchmetrics.detection")
    rng = np.random.default_rng(1)
    images = [random_image(rng) for _ in range(25)]
    parts = [DetectionMetric(4, with_masks=True) for _ in range(2)]  # class 3 is nowhere
    # COCO's recall thresholds: torchmetrics' own are rounded to float32, which shifts the result by a thousandth.
    recalls = np.linspace(0, 1, 101).tolist()
    reference = torchmetrics.MeanAveragePrecision(
        iou_type=("bbox", "segm"), class_metrics=True, rec_thresholds=recalls
    )
    for number, (size, guess, truth) in enumerate(images):
        parts[number % 2].update(bytes([number]), size, *guess, truth)
        boxes, scores, labels, masks = map(torch.from_numpy, guess)
        reference.update(
            [{"boxes": boxes, "scores": scores, "labels": labels, "masks": masks}],
            [
                {
                    "boxes": torch.from_numpy(truth.boxes),
                    "labels": torch.from_numpy(truth.labels),
                    "masks": torch.from_numpy(truth.masks),
                    "iscrowd": torch.from_numpy(truth.crowd.astype(int)),
                    "area": torch.from_numpy(truth.areas),
                }
            ],
        )
    results, expected = DetectionMetric.compute([part.state() for part in parts]), reference.compute()
    for name in ("map", "map_50", "map_75", "map_small", "map_medium", "mar_100"):
        # torchmetrics keeps float32.
        assert results[f"eval_{name}"] == pytest.approx(expected[f"bbox_{name}"].item(), rel=1e-6), name
        assert results[f"eval_mask_{name}"] == pytest.approx(expected[f"segm_{name}"].item(), rel=1e-6), name
    assert 0.1 < results["eval_map"] < 0.9
    assert results["eval_per_class_map"][:3] == pytest.approx(expected["bbox_map_per_class"].tolist(), rel=1e-6)
    assert np.isnan(results["eval_per_class_map"][3])

    whole = DetectionMetric(4, with_masks=True)
    for number, (size, guess, truth) in reversed(list(enumerate(images))):
        whole.update(bytes([number]), size, *guess, truth)
    again = DetectionMetric.compute([whole.state()])
    assert again.keys() == results.keys()
    for name, value in results.items():
        assert again[name] == pytest.approx(value, rel=0, abs=0, nan_ok=True), name


def test_images_without_objects_and_without_detections():
    nothing = found(np.zeros((0, 4)), [], [], np.zeros((0, 9, 9), bool))
    none = objects([], [], np.zeros((0, 9, 9), bool))
    one = objects([[1, 1, 5, 5]], [1], np.ones((1, 9, 9), bool))

    def compute(*images):
        metric = DetectionMetric(2, with_masks=True)
        for number, (guess, truth) in enumerate(images):
            metric.update(bytes([number]), (9, 9), *guess, truth)
        return DetectionMetric.compute([metric.state()])

    assert np.isnan(compute((nothing, none))["eval_map"])
    missed = compute((nothing, none), (nothing, one))
    assert missed["eval_map"] == missed["eval_mask_map_50"] == 0
    assert np.isnan(missed["eval_per_class_map"][0]) and missed["eval_per_class_map"][1] == 0
    hit = found([[1, 1, 5, 5]], [0.5], [1], np.ones((1, 9, 9), bool))
    assert compute((nothing, none), (hit, one))["eval_map"] == pytest.approx(1.0)
    # A detection where there is nothing costs precision.
    assert compute((found([[1, 1, 5, 5]], [0.9], [1], hit[3]), none), (hit, one))["eval_map"] == pytest.approx(0.5)
