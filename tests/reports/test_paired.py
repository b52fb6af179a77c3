"""Tests and intervals of two models on the same images, next to scipy's and to figures in print."""

import numpy as np
import pytest
from evaluation_rows import answers
from scipy import stats

from hf_poolformer.evaluation.intervals import wilson
from hf_poolformer.foundation.tasks import CLASSIFICATION, MULTI_LABEL, REGRESSION, TASKS
from hf_poolformer.reports.paired import mcnemar, newcombe, paired_figures


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (0, 6), (3, 9), (12, 12), (7, 17)])
def test_few_discordant_images_are_tested_exactly(only_a, only_b):
    found = mcnemar(only_a, only_b)
    right = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert found.exact and found.method == "exact"
    assert found.p == pytest.approx(right, rel=1e-12)
    assert mcnemar(only_b, only_a).p == found.p


@pytest.mark.parametrize("only_a, only_b", [(0, 25), (10, 31), (59, 6), (13, 12), (400, 500), (40, 40)])
def test_many_discordant_images_are_tested_with_the_correction(only_a, only_b):
    found = mcnemar(only_a, only_b)
    squared = max(abs(only_a - only_b) - 1, 0) ** 2 / (only_a + only_b)
    assert not found.exact and "correction" in found.method
    assert found.p == pytest.approx(stats.chi2.sf(squared, 1), rel=1e-9)
    # A correction for continuity brings it near to the exact one.
    assert found.p == pytest.approx(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue, rel=0.3, abs=1e-3)


def test_a_table_in_print():
    """Agresti, Categorical Data Analysis (2002), table 10.1: of 1600 people 150 approved only before, 86 only after.

    The difference there is -0.04, with a standard error of 0.0095. So large a table has one interval by any method.
    """
    assert mcnemar(150, 86).p == pytest.approx(stats.chi2.sf(63**2 / 236, 1), rel=1e-9)
    assert newcombe(794, 150, 86, 570) == pytest.approx((-0.04 - 1.96 * 0.0095, -0.04 + 1.96 * 0.0095), abs=3e-4)


@pytest.mark.parametrize("cells", [(36, 12, 2, 0), (53, 16, 8, 9), (0, 0, 30, 0), (900, 3, 1, 96), (5, 5, 5, 5)])
def test_interval_of_the_difference(cells):
    """By the formula as it is printed, in the names of its tables: p1 - p2 with e, f, g, h."""
    e, f, g, h = cells
    count = sum(cells)
    p1, p2 = (e + f) / count, (e + g) / count
    (l1, u1), (l2, u2) = (wilson(np.array(hits), np.array(count)) for hits in (e + f, e + g))
    margins = (e + f) * (g + h) * (e + g) * (f + h)
    a = e * h - f * g
    a = max(a - count / 2, 0) if a > 0 else a
    phi = a / margins**0.5 if margins else 0
    delta = ((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2) ** 0.5
    epsilon = ((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2) ** 0.5
    low, high = newcombe(*cells)  # of B less A
    assert -high == pytest.approx(p1 - p2 - delta, abs=1e-12)
    assert -low == pytest.approx(p1 - p2 + epsilon, abs=1e-12)
    assert low <= p2 - p1 <= high


def columns_of(judge, labels, *answers):
    for logits in answers:
        yield {name: values.numpy() for name, values in judge.of_batch(labels, logits).items()}


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL, REGRESSION])
def test_a_model_against_itself(task):
    judge = TASKS[task].new_judge(4)
    labels, good, _ = answers(task)
    found = paired_figures(judge, *columns_of(judge, labels, good, good))
    assert {figure.key for figure in TASKS[task].figures if figure.least_classes <= 4} <= found.keys()
    for paired in found.values():
        for one in paired if isinstance(paired, list) else [paired]:
            assert (one.difference, one.interval, one.p) == (0, (0, 0), 1)
            assert one.interval_a == one.interval_b
            assert one.ahead(TASKS[task].figures[0]) is None


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL, REGRESSION])
def test_the_better_model_is_named(task):
    judge, figure = TASKS[task].new_judge(4), TASKS[task].figures[0]
    labels, good, middling = answers(task)
    a, b = columns_of(judge, labels, good, middling)
    found = paired_figures(judge, a, b)[figure.key]
    assert found.ahead(figure) == "A" and found.p < 0.01
    assert found.interval[0] < found.difference < found.interval[1]
    back = paired_figures(judge, b, a)[figure.key]
    assert back.ahead(figure) == "B" and back.difference == -found.difference
    assert back.interval == pytest.approx([-end for end in reversed(found.interval)])
    # Paired: narrower than two intervals by themselves would have it.
    widths = [high - low for low, high in (found.interval_a, found.interval_b)]
    assert found.interval[1] - found.interval[0] < sum(widths)


def test_the_bootstrap_is_scipys():
    """The interval of a mean difference, as scipy draws it: with as many resamples both are off by about 5 %."""
    judge = TASKS[REGRESSION].new_judge(1)
    labels, one, two = answers(REGRESSION, 300, 1)
    found = paired_figures(judge, *columns_of(judge, labels, one, two))["eval_mae"]
    errors = [(answer - labels).abs().numpy().ravel() for answer in (one, two)]
    right = stats.bootstrap((errors[1] - errors[0],), np.mean, n_resamples=5000, method="percentile", rng=0)
    width = right.confidence_interval.high - right.confidence_interval.low
    assert found.difference == pytest.approx(np.mean(errors[1] - errors[0]), rel=1e-5)
    assert found.interval == pytest.approx(tuple(map(float, right.confidence_interval)), abs=0.07 * float(width))
