"""Bulk prediction in its steady state."""

import pytest

from hf_poolformer.benchmark.case import Case
from hf_poolformer.benchmark.predict import (
    MODEL,
    PIPELINE,
    READING,
    WHOLE,
    find_bottleneck,
    measure_predict,
    steady_rate,
)
from hf_poolformer.benchmark.report import Report
from hf_poolformer.foundation.timing import Deadline


@pytest.mark.parametrize(
    ("reading", "model", "whole", "shared_cores", "bottleneck"),
    [
        (100, 400, 97, False, "reading"),
        (400, 100, 95, True, "model"),
        (100, 120, 55, True, "reading and model"),
        (100, 120, 55, False, "hand-over"),
        (100, 120, 30, True, "hand-over"),
    ],
)
def test_the_bottleneck_is_named(reading, model, whole, shared_cores, bottleneck):
    found, explanation = find_bottleneck({READING: reading, MODEL: model, WHOLE: whole}, shared_cores)
    assert found == bottleneck
    assert all(f"{number}" in explanation for number in (reading, model, whole))


def test_neither_the_start_nor_the_end_counts():
    # Three batches that were ready, five of a second each, three that come out of a buffer.
    times = [0.0, 0.1, 0.2, 1.2, 2.2, 3.2, 4.2, 5.2, 5.3, 5.4, 5.5]
    assert steady_rate(times, margin=3, batch_size=10) == pytest.approx(10)


def test_all_parts_are_measured(monkeypatch):
    monkeypatch.setattr("hf_poolformer.benchmark.predict.PHOTOGRAPH", (64, 48))
    report = Report("", "cpu", Deadline(None))
    case = Case("infer", "tiny", batch_size=4, image_size=32)
    report.predict = measure_predict(case, report.deadline, workers=0, batches=2, rounds=1)
    assert set(report.predict.rates) == {READING, MODEL, WHOLE, PIPELINE}
    assert min(report.predict.rates.values()) > 0
    assert f"Bottleneck: {report.predict.bottleneck}" in report.to_markdown()
