"""Thresholds of several labels: the best F1, found by trying every one, and what keeps few images from deciding."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from hf_poolformer.evaluation.thresholds import PRIOR_IMAGES, best_threshold, choose_thresholds


def made_up(images, shares, decimals=None, seed=0):
    """Probabilities and labels; with few decimals many probabilities are equal."""
    generator = np.random.default_rng(seed)
    labels = (generator.random((images, len(shares))) < shares).astype(np.float32)
    logits = generator.normal(size=labels.shape) + 2 * labels - 2
    probabilities = 1 / (1 + np.exp(-logits))
    return (probabilities if decimals is None else probabilities.round(decimals)).astype(np.float32), labels


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_better_f1(seed, decimals):
    probabilities, labels = (values[:, 0] for values in made_up(60, [0.2], decimals, seed))
    labels[0] = 1
    edges = np.unique(probabilities)
    scores = [f1_score(labels, probabilities >= edge) for edge in edges]
    found = best_threshold(probabilities, labels > 0)
    assert f1_score(labels, probabilities >= found) == max(scores)
    # Halfway down to the next probability, and of several as good ones the highest.
    place = max(index for index, score in enumerate(scores) if score == max(scores))
    assert found == pytest.approx((edges[place] + (edges[place - 1] if place else 0)) / 2, rel=1e-6)


def test_few_images_count_for_little_and_none_for_nothing():
    probabilities, labels = made_up(400, [0.4, 0.01, 0.2, 0.1])
    labels[:, 3] = 0
    labels[7, 1] = 1
    own = [best_threshold(probabilities[:, index], labels[:, index] > 0) for index in range(3)]
    common = best_threshold(probabilities[:, :3].ravel(), labels[:, :3].ravel() > 0)
    counts = labels.sum(0)
    expected = [
        (count * mine + PRIOR_IMAGES * common) / (count + PRIOR_IMAGES)
        for count, mine in zip(counts, own, strict=False)
    ]
    chosen = choose_thresholds(probabilities, labels)
    assert chosen == pytest.approx([*expected, 0.5], rel=1e-6)
    assert abs(chosen[0] - own[0]) < 0.02 and abs(chosen[0] - 0.5) > 0.05
    assert choose_thresholds(probabilities, np.zeros_like(labels)) == [0.5] * 4


def test_they_do_not_depend_on_the_order_of_the_images():
    probabilities, labels = made_up(200, [0.3, 0.05, 0.5], decimals=2)
    shuffled = np.random.default_rng(1).permutation(200)
    assert choose_thresholds(probabilities, labels) == choose_thresholds(probabilities[shuffled], labels[shuffled])


def test_they_are_better_than_one_half_on_other_images():
    (probabilities, labels), (others, truth) = (made_up(300, [0.3, 0.05, 0.15, 0.1], seed=seed) for seed in (1, 2))
    thresholds = choose_thresholds(probabilities, labels)
    chosen = f1_score(truth, others >= np.array(thresholds), average="macro")
    assert chosen > f1_score(truth, others >= 0.5, average="macro") + 0.03


def test_one_image_and_probabilities_at_the_ends():
    assert choose_thresholds(np.array([[0.0, 1.0]]), np.array([[1, 1]])) == pytest.approx([0.0, 1 / 6])
    assert choose_thresholds(np.array([[0.2]], dtype=np.float32), np.array([[1]])) == pytest.approx([0.1])
